"""The model card: what it says of made-up run folders, and what a real run pushes to the Hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects

from taid.artifacts.model_card import write_card
from taid.cli.main import main

CONFIG = {
    "objective": "taid", "taid_t_start": 0.4, "model_name_or_path": "org/small",
    "teacher_model_name_or_path": "org/large", "dataset_name": "org/chats", "learning_rate": 1e-4,
    "eval_dataset_name": "/home/alice/secret plans/held_out.jsonl", "output_dir": "/home/alice/runs/first",
    "teacher_server_url": "http://10.0.0.7:8000", "hub_model_id": None,
}  # fmt: skip
ROWS = [
    {"step": 0, "eval_cross_entropy": 3.5, "eval_teacher_cross_entropy": 2.5, "eval_kl": 1.2,
     "eval_mean_token_accuracy": 0.3},
    {"step": 300, "loss": 0.2, "t": 0.9, "num_tokens": 123456},
    {"step": 300, "eval_cross_entropy": 2.9, "eval_teacher_cross_entropy": 2.5, "eval_kl": 0.45,
     "eval_mean_token_accuracy": 0.4},
]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """run(**config): a run folder named `first`."""

    def make(rows: list[dict[str, Any]] = ROWS, **config: Any) -> Path:
        folder = tmp_path / "first"
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | config))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "versions.json").write_text(json.dumps({"torch": "2.13.0", "total_steps": 300}))
        (folder / "config.json").write_text('{"model_type": "llama"}')
        return folder

    return make


def card(folder: Path, **options: Any) -> str:
    path = write_card(folder, **options)
    assert path == folder / "README.md"
    return path.read_text(encoding="utf-8")


def rows_of(text: str, heading: str) -> dict[str, list[str]]:
    """The table whose head begins with these words: first cell -> the others."""
    (body,) = re.findall(rf"^\| {re.escape(heading)} \|.*\n\|[ -|]*\n((?:\|.*\n)*)", text, re.MULTILINE)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()]
    return {first: rest for first, *rest in cells}


def test_the_front_matter_says_what_came_from_what(run):
    data = ModelCard(card(run(), tags=["a-tag"])).data.to_dict()
    assert data == {
        "library_name": "transformers", "base_model": "org/small", "base_model_relation": "finetune",
        "datasets": ["org/chats"], "pipeline_tag": "text-generation", "tags": ["a-tag", "distillation", "taid", "trl"],
    }  # fmt: skip


def test_results_are_those_of_the_run_before_after_and_the_teachers(run):
    text = card(run())
    assert rows_of(text, "held out") == {
        "cross-entropy, nats/token": ["3.5000", "2.9000", "2.5000"],
        "KL to the teacher, nats/token": ["1.2000", "0.4500", "0.0000"],
        "token accuracy": ["30.00%", "40.00%", ""],
    }
    assert "TAID distilled org/large into org/small in 300 steps" in text
    assert "which closed 60% of the gap to the teacher" in text
    assert "Trained on `org/chats` (123,456 tokens) and evaluated on `held_out.jsonl`." in text
    assert rows_of(text, "option")["`learning_rate`"] == ["0.0001"]
    assert "![t over the training steps](t.png)" in text
    assert "| torch | 2.13.0 |" in text
    assert "Makoto Shing" in text


def test_no_path_server_or_secret_of_the_users_is_in_it(run):
    folder = run(
        model_name_or_path="/home/alice/models/small/", teacher_model_name_or_path="~/models/large",
        dataset_name=["/home/alice/a.jsonl", "org/chats"], teacher_cache="/mnt/big/cache", hub_token="hf_abc",
    )  # fmt: skip
    text = card(folder)
    assert not re.search(r"alice|/home|/mnt|~/|10\.0\.0\.7|hf_abc|secret plans", text)
    assert rows_of(text, "option") | {"`model_name_or_path`": ["small"]} == rows_of(text, "option")
    assert rows_of(text, "option")["`dataset_name`"] == ["a.jsonl, org/chats"]
    data = ModelCard(text).data
    assert data.base_model is None, "a folder is no model of the Hub"
    assert data.datasets == ["org/chats"]


def test_an_evaluation_beside_the_run_is_in_it(run):
    folder = run()
    measures = {"cross_entropy": 2.0, "perplexity": 7.389, "bits_per_byte": None, "kl": 0.25, "accuracy": 0.5}
    task = {"task": "arc", "metric": "acc", "n_shot": 25, "value": 0.5, "stderr": None}
    speed_row = {"name": "student", "bits": None, "parameters": 5e6, "rounds": {"tokens_per_second": [1.0]}}
    machine = {"name": "a machine", "device": "cpu", "dtype": "float32", "threads": 2, "versions": {}}
    found = {
        "data": "/home/alice/held.jsonl", "held_out": {"student": measures}, "tasks": [task],
        "speed": {"rows": [speed_row], "prompt_tokens": 128, "new_tokens": 64, "machine": machine},
    }  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(found))
    text = card(folder)
    assert "| student | 2.0000 | 7.389 |  | 0.2500 | 50.00% |" in text
    assert "| arc | acc | 25 | 0.5000 |  |" in text
    assert "| student | 5 |" in text
    assert "On `held.jsonl`" in text
    of_tokens = {"reverse_kl": 0.5, "agreement": 0.25, "head_mass": 0.9, "tail_mass": 1.5e-6, "entropy": 2.5,
                 "calibration_error": 0.125}  # fmt: skip
    found["held_out"]["student"] |= of_tokens
    answers = {"rouge_l": 0.25, "exact_match": 0.1, "answer_tokens": 20.0, "finished": 1.0, "self_bleu": 0.5}
    found["generations"] = {"student": answers}
    (folder / "evaluation.json").write_text(json.dumps(found))
    newer = card(folder)
    assert "| student | 0.5000 | 25.00% | 0.9000 | 1.5e-06 | 2.5000 | 0.1250 |" in newer
    assert "| student | 0.2500 | 10.00% | 20.0 | 100.00% |" in newer
    assert "| student |  |  |  |  | 0.5000 |  |  |" in newer
    assert [line for line in text.splitlines() if line not in newer] == []
    (folder / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match=r"evaluation\.json cannot be read"):
        write_card(folder)


def test_the_snippet_is_for_what_lies_in_the_folder(run):
    folder = run(objective="forward_kl", hub_model_id="me/student")
    text = card(folder)
    assert 'AutoModelForCausalLM.from_pretrained("me/student")' in text
    assert text.partition("# student\n")[1], "the title is the name on the Hub"
    assert "t.png" not in text
    (folder / "chat_template.jinja").touch()
    assert "apply_chat_template" in card(folder)
    (folder / "config.json").write_text('{"vision_config": {}}')
    assert 'AutoModelForImageTextToText.from_pretrained("me/student")' in card(folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "them/base"}')
    text = card(folder)
    assert 'PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained("them/base"), "me/student")' in text
    assert ModelCard(text).data.pipeline_tag == "image-text-to-text"
    (folder / "config.json").unlink()
    text = card(folder)
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/student")' in text
    assert (ModelCard(text).data.library_name, ModelCard(text).data.base_model_relation) == ("peft", "adapter")
    for program in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(program, "README.md", "exec")


def test_a_license_is_the_students_or_what_the_card_says_already(run, tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "README.md").write_text("---\nlicense: mit\n---\n")
    folder = run(model_name_or_path=str(tmp_path / "small"))
    assert ModelCard(card(folder)).data.license == "mit"
    (folder / "README.md").write_text((folder / "README.md").read_text().replace("license: mit", "license: apache-2.0"))
    assert ModelCard(card(folder)).data.license == "apache-2.0"


def test_report_writes_it_again_but_not_over_a_text_of_ones_own(run, capsys):
    folder = run()
    assert main(["report", str(folder)]) == 0
    first = (folder / "README.md").read_text()
    assert "Written by taid" in first
    assert main(["report", str(folder)]) == 0
    assert (folder / "README.md").read_text() == first
    (folder / "README.md").write_text("My own words.")
    assert main(["report", str(folder)]) == 0
    assert (folder / "README.md").read_text() == "My own words."
    assert "Written by taid" in card(folder, overwrite=True)


@pytest.mark.parametrize("peft", [False, True])
def test_a_run_pushes_student_card_and_report_once_and_no_token(
    peft, tmp_path, student_folder, teacher_folder, rows, monkeypatch
):
    repositories, uploads = [], []

    def create_repo(self, name, **options):
        repositories.append((name, options["token"]))
        return type("Url", (), {"repo_id": name})()

    def upload_folder(self, *, folder_path, ignore_patterns, **options):
        folder = Path(folder_path)
        names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        kept = filter_repo_objects(names, ignore_patterns=ignore_patterns)
        uploads.append({name: (folder / name).read_bytes() for name in kept})

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    arguments = {
        "model_name_or_path": student_folder, "teacher_model_name_or_path": teacher_folder,
        "dataset_name": rows(tmp_path / "train.jsonl"), "output_dir": tmp_path / "run", "max_steps": 2, "save_steps": 1,
        "use_cpu": True, "push_to_hub": True, "hub_model_id": "me/student", "hub_token": "hf_never_shown",
        "logging_steps": 1, "per_device_train_batch_size": 2,
    }  # fmt: skip
    arguments |= {"use_peft": True, "lora_target_modules": "all-linear"} if peft else {}
    assert main(["train", *(word for name, value in arguments.items() for word in (f"--{name}", str(value)))]) == 0
    assert repositories == [("me/student", "hf_never_shown")]
    (uploaded,) = uploads
    model = {"adapter_model.safetensors", "adapter_config.json"} if peft else {
        "model.safetensors", "config.json", "generation_config.json"
    }  # fmt: skip
    assert set(uploaded) == model | {
        "README.md", "report.html", "t.png", "loss.png", "config.yaml", "metrics.jsonl", "versions.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert not [name for name, content in uploaded.items() if b"hf_never_shown" in content]
    text = uploaded["README.md"].decode()
    assert ("AutoPeftModelForCausalLM" if peft else "AutoModelForCausalLM") + '.from_pretrained("me/student")' in text
    assert str(tmp_path) not in text
    assert len(uploaded["report.html"]) > 10_000
    assert b'"step": 2' in uploaded["metrics.jsonl"]
