"""The model card: a run folder in, its README.md out, without the names of the machine's folders.

It reads only the folder's files, as the report does, so that it can be written again at any time. A README.md without
the line of :data:`_MARK` is the user's own, and ``taid report`` leaves it alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from taid.artifacts import tables
from taid.artifacts.report import Run, opening, read_run
from taid.artifacts.run_folder import EVALUATION, read_mapping, write_atomically

CARD = "README.md"
_MARK = "<!-- Written by taid, and again by `taid report`. Delete this line to keep a text of your own. -->"
_NOT_PUBLIC = ("output_dir", "teacher_server_url")
_ADAPTER = ("lora_r", "lora_alpha", "lora_target_modules", "use_dora")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILE = re.compile(r".*\.(jsonl|json|parquet|txt|csv)(\.\w+)?")
_PAPER = """```bibtex
@inproceedings{shing2025taid,
  title     = {{TAID}: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in Language Models},
  author    = {Makoto Shing and Kou Misaki and Han Bao and Sho Yokoi and Takuya Akiba},
  booktitle = {The Thirteenth International Conference on Learning Representations},
  year      = {2025},
  url       = {https://arxiv.org/abs/2501.16937}
}
```"""  # noqa: E501
_LOADING = {
    "text": """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name})
model = AutoModelForCausalLM.from_pretrained({name})""",
    "adapter": """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name})
model = AutoPeftModelForCausalLM.from_pretrained({name})""",
    "vision adapter": """from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained({name})
tokenizer = processor.tokenizer
model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained({base}), {name})""",
    "vision": """from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained({name})
tokenizer = processor.tokenizer
model = AutoModelForImageTextToText.from_pretrained({name})""",
}
_ASKING = """inputs = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""
_CHATTING = """messages = [{"role": "user", "content": "Who is there?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def write_card(run_dir: Path, *, model_name: str | None = None, tags: Any = (), overwrite: bool = False) -> Path | None:
    """Write a run folder's model card.

    Args:
        run_dir: the `output_dir` of a run.
        model_name: its title; the name on the Hub or of the folder if None.
        tags: beside taid's own.
        overwrite: also where README.md is not one that taid wrote.

    Returns:
        README.md, or None where there is one of somebody's own.

    Raises:
        FileNotFoundError: `run_dir` is no run folder.
        ValueError: no step is logged yet, or a file is broken; names it.
    """
    run, path = read_run(run_dir), run_dir / CARD
    before = path.read_text(encoding="utf-8") if path.is_file() else _MARK
    if _MARK not in before and not overwrite:
        return None
    kind = _kind(run_dir)
    name = model_name or str(run.config.get("hub_model_id") or run_dir.resolve().name).rpartition("/")[2]
    sections = [
        f"---\n{_front_matter(run, path, kind, tags)}\n---\n\n{_MARK}",
        f"# {' '.join(name.split())}\n\n{opening(run)}",
        f"## How to use it\n\n```python\n{_snippet(run, run_dir, kind)}\n```",
        _section("Results", [_held_out(run), *_evaluated(run_dir)]),
        _section("Training", [_data(run), _recipe(run), _curve(run)]),
        _section("Versions", [_table(("", ""), [(key, str(value)) for key, value in run.versions.items()], texts=2)]),
        f"## Citation\n\nMade with taid, an independent implementation of TAID:\n\n{_PAPER}",
    ]
    write_atomically(path, "\n\n".join(section for section in sections if section) + "\n")
    return path


def _kind(run_dir: Path) -> str:
    is_adapter = (run_dir / "adapter_config.json").is_file()
    # Beside an adapter's weights lies no configuration, but the processor, if it is of a model that sees.
    sees = any(run_dir.glob("*processor_config.json")) or "vision_config" in read_mapping(run_dir / "config.json")
    return " ".join([*["vision"] * sees, *["adapter"] * is_adapter]) or "text"


def _front_matter(run: Run, path: Path, kind: str, tags: Any) -> str:
    kept = (metadata_load(path) or {}) if path.is_file() else {}
    of_student = Path(str(run.config.get("model_name_or_path"))).expanduser() / CARD
    license_ = kept.get("license") or (metadata_load(of_student) or {} if of_student.is_file() else {}).get("license")
    base = _on_hub(run.config.get("model_name_or_path"))
    names = [name for key in ("dataset_name", "eval_dataset_name") for name in _names(run.config.get(key))]
    data = ModelCardData(
        library_name="peft" if "adapter" in kind else "transformers",
        license=license_,
        language=kept.get("language"),
        base_model=base,
        base_model_relation=None if base is None else "adapter" if "adapter" in kind else "finetune",
        datasets=sorted({name for name in names if _on_hub(name)}) or None,
        pipeline_tag="image-text-to-text" if "vision" in kind else "text-generation",
        tags=sorted({"taid", "trl", "distillation", *([tags] if isinstance(tags, str) else tags or ())}),
    )
    return str(data.to_yaml())


def _names(value: Any) -> list[str]:
    return [] if value is None else [str(name) for name in value] if isinstance(value, list) else [str(value)]


def _on_hub(name: Any) -> str | None:
    """Return the name if it is one on the Hub and no file or folder."""
    is_file = name is None or _FILE.fullmatch(str(name)) or Path(str(name)).expanduser().exists()
    return str(name) if not is_file and _HUB_NAME.fullmatch(str(name)) and str(name)[0] != "." else None


def _public(value: Any) -> str:
    """Return a value as the card shows it: of paths only the last name."""
    if isinstance(value, list):
        return ", ".join(_public(item) for item in value)
    if isinstance(value, str) and _on_hub(value) is None:
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _snippet(run: Run, run_dir: Path, kind: str) -> str:
    name = json.dumps(str(run.config.get("hub_model_id") or run_dir.resolve().name))
    chats = (run_dir / "chat_template.jinja").is_file() or "chat_template" in read_mapping(
        run_dir / "tokenizer_config.json"
    )
    adapter = read_mapping(run_dir / "adapter_config.json") if kind == "vision adapter" else {}
    base = json.dumps(_public(adapter.get("base_model_name_or_path")))
    return _LOADING[kind].format(name=name, base=base) + "\n\n" + (_CHATTING if chats else _ASKING)


# --- results ----------------------------------------------------------------------------------------------------------


def _held_out(run: Run) -> str:
    """Return the run's own measures of its held-out rows: before, after, and the teacher's."""
    rows = []
    for name, prefix in run.held_out.items():
        of = f", {name}" if name else ""
        for key, words, form in (
            ("cross_entropy", "cross-entropy, nats/token", "{:.4f}"),
            ("kl", "KL to the teacher, nats/token", "{:.4f}"),
            ("mean_token_accuracy", "token accuracy", "{:.2%}"),
        ):
            if series := run.series(prefix + key):
                teacher = run.series(f"{prefix}teacher_{key}")
                last = form.format(teacher[-1][1]) if teacher else form.format(0) if key == "kl" else ""
                before = form.format(series[0][1]) if len(series) > 1 else ""
                rows.append((words + of, before, form.format(series[-1][1]), last))
    return _table(("held out", "before", "after", "teacher"), rows, texts=1)


def _evaluated(run_dir: Path) -> list[str]:
    """Return the tables of `taid evaluate --output RUN/evaluation.json`."""
    found = read_mapping(run_dir / EVALUATION)
    parts = []
    if measures := found.get("held_out"):
        parts.append(f"On `{_public(str(found.get('data')))}` (taid evaluate):")
        parts += [_measures(tables.HELD_OUT, measures), _measures(tables.DISTRIBUTIONS, measures)]
    if answers := found.get("generations"):
        parts += [_measures(tables.ANSWERS, answers), _measures(tables.SAMPLES, answers)]
    if tasks := found.get("tasks"):
        parts.append(tables.task_table(tasks).markdown().strip())
    return parts + ([tables.speed_table(found["speed"]).markdown().strip()] if "speed" in found else [])


def _measures(columns: Sequence[tables.Column], found: dict[str, dict[str, Any]]) -> str:
    """Return measures by model; nothing where no model has one of them."""
    return tables.measures(columns, found).markdown().strip() if tables.has_any(columns, found) else ""


# --- training ---------------------------------------------------------------------------------------------------------


def _data(run: Run) -> str:
    told = [f"Trained on `{_public(run.config['dataset_name'])}`"] if run.config.get("dataset_name") else []
    if told and (tokens := run.series("num_tokens")):
        told.append(f"({tokens[-1][1]:,.0f} tokens)")
    if told and run.config.get("eval_dataset_name"):
        told.append(f"and evaluated on `{_public(run.config['eval_dataset_name'])}`")
    return " ".join(told) + "." if told else ""


def _recipe(run: Run) -> str:
    names = [name for name in run.important if name not in _NOT_PUBLIC]
    names += _ADAPTER if run.config.get("use_peft") else ()
    names += ("packing", "packing_strategy") if run.config.get("packing") else ()
    names += ("streaming", "dataset_weights", "train_tokens") if run.config.get("streaming") else ()
    if (run.config.get("max_steps") or -1) > 0 or run.config.get("train_tokens"):
        names = [name for name in names if name != "num_train_epochs"]
    rows = [(f"`{name}`", _public(run.config[name])) for name in names if run.config.get(name) is not None]
    return _table(("option", "value"), rows, texts=2)


def _curve(run: Run) -> str:
    if run.objective != "taid" or not run.series("t"):
        return ""
    return "t: 0 is the student, 1 the teacher, over the training steps:\n\n![t over the training steps](t.png)"


def _section(title: str, parts: list[str]) -> str:
    there = [part for part in parts if part]
    return "\n\n".join([f"## {title}", *there]) if there else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int) -> str:
    return tables.Table(head, rows, texts=texts).markdown().strip() if rows else ""
