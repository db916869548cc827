"""Does `taid plan` say what a run holds? Peak of each process's memory in training, over what it had before models.

    python benchmarks/memory.py [--only WORDS] [--kept] [--out runs/memory]

A random pair is written to a folder and trained for three steps by `taid train`, on one process and on two of each
engine; `taid plan` is asked about the same recipe. A process's peak is that of the steps behind the first (VmHWM, from
/proc/self/status) without what it had before the models were read. glibc is told to give freed pages back at once
(MALLOC_MMAP_THRESHOLD_), so that resident memory is what is held.

The table goes to benchmarks/results/memory.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "memory.md"
VOCABULARY, LENGTH, ROWS = 8192, 256, 24
MODELS = {
    "student": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12},
    "teacher": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 14, "num_attention_heads": 16},
}
PARTS = ("weights", "gradients", "optimizer", "activations", "buffers", "teacher")
ENGINES = ("ddp", "zero2", "zero3", "fsdp2")
# What is measured, by the options that it has beside the base recipe.
CASES: dict[str, dict[str, object]] = {
    "one process": {},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "lora": {"use_peft": True, "lora_target_modules": "all-linear"},
    "sgd": {"optim": "sgd"},
    "plain loss": {"fused": False},
    "bf16": {"bf16": True, "per_device_train_batch_size": 1},  # for which most CPUs are slow
    "objective sft": {"objective": "sft"},
    "ddp, checkpointing": {"engine": "ddp", "gradient_checkpointing": True},
    **{f"{engine}, {placement}": {"engine": engine, "teacher_placement": placement}
       for engine in ENGINES for placement in ("replicated", "sharded")},
    **{f"{engine}, bf16": {"engine": engine, "bf16": True, "per_device_train_batch_size": 1}
       for engine in ("zero2", "zero3", "fsdp2")},
}  # fmt: skip


def peak(field: str = "VmHWM") -> int:
    """Bytes of the largest resident memory since it was last reset, or of today's (VmRSS)."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def worker(arguments: list[str], out: Path) -> None:
    """`taid train` that measures itself."""
    import trl  # noqa: F401  # all that is imported counts as before
    from transformers import TrainerCallback
    from transformers.trainer import DEFAULT_CALLBACKS

    import taid.training.trainer  # noqa: F401
    from taid.__main__ import run

    before = peak("VmRSS")

    class Watch(TrainerCallback):
        def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
            if state.global_step == 1:  # type: ignore[attr-defined]
                Path("/proc/self/clear_refs").write_text("5")

        def on_train_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
            (out / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(peak() - before))

    DEFAULT_CALLBACKS.append(Watch)
    sys.exit(run(["train", *arguments]))


def write_pair(folder: Path) -> None:
    import random

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from taid.planning.recipe import make_tokenizer

    words = make_tokenizer(ordinary=VOCABULARY - 1, special=["<|endoftext|>"], eos_token="<|endoftext|>")
    for role, sizes in MODELS.items():
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=role == "student", **sizes)
        LlamaForCausalLM(config).save_pretrained(folder / role)
        words.save_pretrained(folder / role)
    draw = random.Random(0)
    rows = [{"text": " ".join(str(draw.randrange(10**6)) for _ in range(LENGTH))} for _ in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def options(folder: Path, case: dict[str, object]) -> list[str]:
    recipe = {
        "model_name_or_path": folder / "student", "teacher_model_name_or_path": folder / "teacher",
        "dataset_name": folder / "rows.jsonl", "max_length": LENGTH, "max_steps": 3, "per_device_train_batch_size": 4,
        "gradient_checkpointing": False, "use_cpu": True, "bf16": False, "save_strategy": "no", "report_to": "none",
        "overwrite_output_dir": True, "output_dir": folder / "run", "logging_steps": 1,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in (recipe | case).items() if name != "engine"]


def measured(folder: Path, case: dict[str, object]) -> list[int]:
    """Return the peak of each process."""
    from taid.cli.launch import config_file

    for path in folder.glob("[0-9].json"):
        path.unlink()
    engine = case.get("engine")
    launcher = []
    if engine:
        config = str(config_file(str(engine)))
        launcher = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes=2"]
    deepspeed = Path(__file__).parents[1] / ".venv" / "deepspeed"
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "100000", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(deepspeed), "PATH": f"{deepspeed / 'bin'}:{os.environ['PATH']}",
    }  # fmt: skip
    command = [sys.executable, *launcher, __file__, "--worker", *options(folder, case), "--out", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stderr[-3000:]}")
    return [json.loads(path.read_text()) for path in sorted(folder.glob("[0-9].json"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name holds this; nothing is written")
    parser.add_argument("--out", type=Path, default=Path("runs/memory"))
    parser.add_argument("--kept", action="store_true", help="what OUT has from before is not measured again")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.worker:
        return worker(rest, args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    write_pair(args.out)
    lines, store = [], args.out / "measured.json"
    known = json.loads(store.read_text()) if args.kept and store.exists() else {}
    for name, case in CASES.items():
        if args.only in name:
            parts, found = planned(args.out, case), known.get(name) or measured(args.out, case)
            store.write_text(json.dumps(known := known | {name: found}))
            total = sum(parts.values())
            cells = [name, f"{max(found) / 1e6:,.0f}", f"{total / 1e6:,.0f}", f"{total / max(found):.3f}"]
            cells += [f"{parts.get(part, 0) / 1e6:,.0f}" for part in PARTS]
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    if not args.only:
        RESULTS.write_text(markdown(lines))


def planned(folder: Path, case: dict[str, object]) -> dict[str, float]:
    """Return what a process holds by `taid plan`."""
    from taid.cli.main import _recipe
    from taid.planning.footprint import Layout, size
    from taid.planning.plan import footprint_of

    recipe, _ = _recipe(options(folder, case), "plan")
    student, teacher = size(recipe.config("student"), peft_config=recipe.adapter), size(recipe.config("teacher"))
    layout = Layout(str(case.get("engine", "none")), str(case.get("teacher_placement", "replicated")),
                    2 if "engine" in case else 1)  # fmt: skip
    return footprint_of(recipe, student, teacher, LENGTH).held(layout)


def markdown(lines: list[str]) -> str:
    import torch

    from step import _machine

    return f"""# What a run holds, measured and planned

MB of the process that holds most, over what it held before models were read: `VmHWM` of the steps behind the first, and
what `taid plan` says from the configurations. Student {sizes("student")}, teacher {sizes("teacher")}, float32 unless
said, 4 rows of {LENGTH} tokens a micro-batch; engines on 2 processes. {date.today()}, {_machine()}, torch
{torch.__version__}.

| run | measured | planned | planned / measured | {" | ".join(f"of it {part}" for part in PARTS)} |
|---|---|---|---|{"---|" * len(PARTS)}
{chr(10).join(lines)}

`python benchmarks/memory.py`
"""


def sizes(role: str) -> str:
    shape = MODELS[role]
    return f"{shape['num_hidden_layers']} layers x {shape['hidden_size']}"


if __name__ == "__main__":
    main()
