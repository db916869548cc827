"""The command line: quick help, exit status 2 and one line for a mistake, and nothing left behind or taken away."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from taid.cli import main as cli
from taid.cli.main import main

HEAVY = "torch transformers trl datasets accelerate peft numpy matplotlib safetensors tokenizers".split()


def in_a_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False)


def snapshot(folder: Path) -> dict[str, bytes | None] | None:
    """Everything in a folder, with what it holds; None where there is no folder."""
    if not folder.exists():
        return None
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture
def options(tmp_path, student_folder, teacher_folder, rows) -> dict[str, Any]:
    """A run of one small step, right in everything."""
    return {
        "model_name_or_path": str(student_folder),
        "teacher_model_name_or_path": str(teacher_folder),
        "dataset_name": str(rows(tmp_path / "rows.jsonl", number=4)),
        "output_dir": str(tmp_path / "run"),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
    }


@pytest.fixture
def train(tmp_path, monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """train(options, *argv): run ``taid train`` in this process; returns the exit status and stderr."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")

    def train(options: dict[str, Any], *argv: str) -> tuple[int, str]:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(options))
        capsys.readouterr()
        status = main(["train", "--config", str(recipe), *argv])
        return status, capsys.readouterr().err

    return train


# --- quick and plain --------------------------------------------------------------------------------------------------


@pytest.mark.cli
@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--help"],
        ["--version"],
        ["nope"],
        ["report", "--help"],
        ["demo", "--help"],
        ["export", "--help"],
        ["train", "--help"],
        ["cache", "--help"],
        ["compare", "--help"],
        ["plan", "--help"],
        ["evaluate", "--help"],
        ["train", "--config", "absent.yaml"],
        ["train", "--taid_betta", "1"],
        ["cache", "--objective", "tadi"],
        ["plan", "--gpus", "8", "--kd_ratio", "2"],
        ["train", "--dry_run", "--seed", "many"],
        ["compare", "--objectives", "tadi"],
        ["compare", "--config", "absent.yaml"],
        ["train", "--model_name_or_path", "a", "--dataset_name", "absent.jsonl"],
        ["train", "--model_name_or_path", "./absent", "--dataset_name", "a/b"],
        ["train", "--accelerate_config", "ddp", "--num_processes", "2", "--skew", "2"],
        "train --model_name_or_path a --dataset_name a/b --output_dir b --resume_from_checkpoint absent".split(),
        ["demo", "--steps", "0"],
        ["evaluate", "nope"],
        ["evaluate", "a/b", "--data", "absent.jsonl"],
        ["evaluate", "./absent", "--data", "a/b"],
    ],
    ids=lambda argv: " ".join(argv) or "none",
)
def test_what_needs_no_model_imports_nothing_heavy(argv):
    program = (
        "import sys\nfrom taid.cli.main import main\n"
        f"try:\n    main({argv!r})\nexcept SystemExit:\n    pass\n"
        f"print('heavy:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = in_a_process("-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"


@pytest.mark.cli
def test_python_m_taid_is_the_command():
    done = in_a_process("-m", "taid", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"taid {metadata.version('taid')}\n", "")


@pytest.mark.cli
def test_a_mistake_in_a_process_of_its_own_is_one_line_and_status_2(tmp_path):
    (tmp_path / "recipe.yaml").write_text("taid_betta: 0.9\n")
    done = in_a_process("-m", "taid", "train", "--config", str(tmp_path / "recipe.yaml"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"taid: error: {tmp_path / 'recipe.yaml'}: unknown key 'taid_betta'; did you mean 'taid_beta'?\n"
    )


def test_a_torchvision_of_another_torch_is_named(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        'raise RuntimeError("operator torchvision::nms\\n is missing")'
    )
    about = tmp_path / "torchvision-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "taid", "train", "--model_name_or_path", "a/b", "--dataset_name", "a/b", "--output_dir",
         str(tmp_path / "run")],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-800:]
    assert done.stderr.splitlines()[-1].startswith(
        "taid: error: transformers cannot be imported, because torchvision does not fit this torch (operator "
        "torchvision::nms is missing): install the torchvision of the same build"
    )


def test_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"taid {metadata.version('taid')}\n"


def test_help_names_every_command(capsys):
    assert main([]) == 0
    bare = capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == bare
    for command in ("train", "cache", "plan", "report", "demo"):
        assert f"\n    {command} " in bare


def test_an_unknown_command_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["trian"])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("taid: error: ")
    assert "'trian' (choose from 'train', 'cache', 'compare', 'plan', 'evaluate', 'report', 'export', 'demo')" in error


# --- mistakes ---------------------------------------------------------------------------------------------------------


def other_teacher(tmp_path: Path, teacher_folder: Path) -> str:
    """The teacher with two ordinary tokens in each other's place."""
    folder = tmp_path / "other_teacher"
    shutil.copytree(teacher_folder, folder)
    description = json.loads((folder / "tokenizer.json").read_text())
    vocab = description["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    (folder / "tokenizer.json").write_text(json.dumps(description))
    return str(folder)


def bad_rows(tmp_path: Path) -> str:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ""}\n')
    return str(tmp_path / "bad.jsonl")


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"taid_betta": 1}, "recipe.yaml: unknown key 'taid_betta'; did you mean 'taid_beta'?"),
    "value out of range": ({"kd_ratio": 2}, "kd_ratio must lie in [0, 1], got 2.0"),
    "wrong type": ({"max_steps": "many"}, "recipe.yaml: max_steps: invalid int value: 'many'"),
    "missing data": ({"dataset_name": "absent.jsonl"}, "data file absent.jsonl does not exist"),
    "missing held-out data": ({"eval_dataset_name": "absent.jsonl"}, "data file absent.jsonl does not exist"),
    "bad row": ({"dataset_name": bad_rows}, "bad.jsonl, line 2: completion is empty"),
    "no data": ({"dataset_name": None}, "dataset_name is not set"),
    "missing student": ({"model_name_or_path": "./absent"}, "student folder './absent' does not exist"),
    "missing teacher": ({"teacher_model_name_or_path": "./absent"}, "teacher folder './absent' does not exist"),
    "no student": ({"model_name_or_path": None}, "model_name_or_path is not set"),
    "no teacher": ({"teacher_model_name_or_path": None}, "'taid' needs a teacher: set teacher_model_name_or_path"),
    "different tokenizers": (
        {"teacher_model_name_or_path": other_teacher},
        "the first difference is token 'A', id 35 for the student and 36 for the teacher",
    ),
    "every token cut away": ({"max_length": 1}, "raise max_length"),
    "no such module to adapt": ({"use_peft": True, "lora_target_modules": ["nope"]}, "nope"),
    "evaluation without rows": ({"eval_strategy": "steps"}, "eval_dataset"),
}


def made_wrong(
    options: dict[str, Any], mistake: dict[str, Any], tmp_path: Path, teacher_folder: Path
) -> dict[str, Any]:
    helps = {bad_rows: (tmp_path,), other_teacher: (tmp_path, teacher_folder)}
    return options | {name: value(*helps[value]) if callable(value) else value for name, value in mistake.items()}


def assert_one_line(error: str, message: str) -> None:
    assert error.startswith("taid: error: ")
    assert error.endswith("\n")
    assert len(error.splitlines()) == 1
    assert message in error


@pytest.mark.parametrize(("mistake", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_status_2_and_leaves_nothing(
    options, train, tmp_path, teacher_folder, mistake, message
):
    status, error = train(made_wrong(options, mistake, tmp_path, teacher_folder))
    assert status == 2
    assert_one_line(error, message)
    assert snapshot(tmp_path / "run") is None


@pytest.mark.parametrize(("mistake", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_costs_nothing_of_the_run_that_was_to_be_overwritten(
    options, train, tmp_path, teacher_folder, mistake, message
):
    before = a_run(tmp_path / "run")
    wrong = made_wrong(options, mistake, tmp_path, teacher_folder) | {"overwrite_output_dir": True}
    status, error = train(wrong)
    assert status == 2
    assert_one_line(error, message)
    assert snapshot(tmp_path / "run") == before


def a_run(folder: Path) -> dict[str, bytes | None] | None:
    """Make a folder that holds a run without a whole checkpoint, and return what is in it."""
    (folder / "checkpoint-5").mkdir(parents=True)
    (folder / "checkpoint-5" / "model.safetensors").write_bytes(b"cut")
    (folder / "config.yaml").write_text("objective: taid\n")
    (folder / "metrics.jsonl").write_text('{"step": 5, "loss": 1.0}\n')
    return snapshot(folder)


def test_a_folder_that_holds_another_run_is_refused_and_left_alone(options, train, tmp_path):
    before = a_run(tmp_path / "run")
    status, error = train(options)
    assert status == 2
    assert_one_line(error, f"output_dir {tmp_path / 'run'} holds another run")
    assert snapshot(tmp_path / "run") == before


@pytest.mark.parametrize("argv", [[], ["--overwrite_output_dir"]], ids=["plain", "overwrite"])
def test_a_folder_of_other_files_is_refused_and_left_alone(options, train, tmp_path, argv):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    status, error = train(options, *argv)
    assert status == 2
    assert_one_line(error, f"output_dir {tmp_path / 'run'} holds files that are no taid run")
    assert snapshot(tmp_path / "run") == {"notes.txt": b"mine"}


def test_an_empty_folder_stays_empty_after_a_mistake(options, train, tmp_path):
    (tmp_path / "run").mkdir()
    status, _ = train(options | {"teacher_model_name_or_path": None})
    assert status == 2
    assert snapshot(tmp_path / "run") == {}


def test_a_run_without_a_whole_checkpoint_cannot_be_resumed_and_is_left_alone(options, train, tmp_path):
    before = a_run(tmp_path / "run")
    status, error = train(options, "--resume_from_checkpoint")
    assert status == 2
    assert_one_line(error, f"cannot resume: {tmp_path / 'run'} holds no complete checkpoint")
    assert snapshot(tmp_path / "run") == before


def test_a_run_that_never_was_cannot_be_resumed(options, train, tmp_path):
    status, error = train(options, "--resume_from_checkpoint")
    assert status == 2
    assert_one_line(error, f"cannot resume: {tmp_path / 'run'} holds no complete checkpoint")
    assert snapshot(tmp_path / "run") is None
    status, error = train(options, "--resume_from_checkpoint", str(tmp_path / "absent"))
    assert status == 2
    assert_one_line(error, f"cannot resume: folder {tmp_path / 'absent'} does not exist")
    assert snapshot(tmp_path / "run") is None


def test_the_command_without_a_mistake_succeeds_and_overwrites_when_asked(options, train, tmp_path):
    a_run(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    status, error = train(options, "--overwrite_output_dir")
    assert (status, error) == (0, "")
    files = snapshot(tmp_path / "run")
    assert files is not None
    assert {"config.yaml", "versions.json", "metrics.jsonl", "report.html", "model.safetensors"} <= files.keys()
    assert not any(name.startswith("checkpoint-5") for name in files)
    assert files["notes.txt"] == b"mine"
    assert b'"step": 5' not in (files["metrics.jsonl"] or b"")


def test_a_missing_recipe_is_one_line(capsys):
    assert main(["train", "--config", "absent.yaml"]) == 2
    assert_one_line(capsys.readouterr().err, "absent.yaml")


def test_a_report_of_no_run_is_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path / "absent")]) == 2
    assert_one_line(capsys.readouterr().err, f"{tmp_path / 'absent'}")
    assert not (tmp_path / "absent").exists()


def absent(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is not None, reason=f"{package} is installed")


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        pytest.param({"attn_implementation": "flash_attention_2"}, "FlashAttention2", marks=absent("flash_attn")),
        pytest.param({"load_in_4bit": True, "use_peft": True}, "bitsandbytes", marks=absent("bitsandbytes")),
        pytest.param({"optim": "adamw_bnb_8bit"}, "bitsandbytes", marks=absent("bitsandbytes")),
        pytest.param({"report_to": "wandb"}, "wandb", marks=absent("wandb")),
        pytest.param({"deepspeed": "absent.json"}, "deepspeed", marks=absent("deepspeed")),
        ({"teacher_model_init_kwargs": {"foo": 1}}, "foo"),
        pytest.param(
            {"activation_offloading": True},
            "activation_offloading moves activations from a GPU to the CPU",
            marks=pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU"),
        ),
        ({"teacher_model_init_kwargs": {"dtype": "bfloat17"}}, "bfloat17"),
    ],
)
def test_a_missing_package_or_unknown_argument_is_one_line_too(options, train, tmp_path, mistake, message):
    before = a_run(tmp_path / "run")
    status, error = train(options | mistake, "--overwrite_output_dir")
    assert status == 2
    assert_one_line(error, message)
    assert snapshot(tmp_path / "run") == before


def test_a_best_checkpoint_by_a_measure_that_is_not_there_ends_before_the_first_step(options, train, tmp_path):
    rows = {"eval_dataset_name": options["dataset_name"], "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    best = {"save_strategy": "steps", "load_best_model_at_end": True, "metric_for_best_model": "eval_kll"}
    status, error = train(options | rows | best)
    assert status == 2
    assert_one_line(error, "metric_for_best_model: 'eval_kll' is not measured; there is eval_cross_entropy, ")
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert train(options | rows | best | {"metric_for_best_model": "kl"}, "--overwrite_output_dir") == (0, "")


def test_an_error_of_the_training_itself_is_not_hidden(options, train, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr("taid.training.trainer.TAIDTrainer.compute_loss", fail)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        train(options)


def test_config_without_its_file_is_one_line(capsys):
    assert main(["train", "--config"]) == 2
    assert_one_line(capsys.readouterr().err, "--config: expected one argument")


def test_arguments_of_the_teacher_that_are_no_mapping_are_refused_by_name(options, train):
    status, error = train(options | {"teacher_model_init_kwargs": "bfloat16"})
    assert status == 2
    assert_one_line(error, "teacher_model_init_kwargs")


# --- exit status ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ValueError("a is 3; use 4"), 2, "taid: error: a is 3; use 4\n"),
        (FileNotFoundError(2, "No such file or directory", "a.yaml"), 2, "'a.yaml'\n"),
        (FloatingPointError("step 7: the loss is nan"), 2, "taid: error: step 7: the loss is nan\n"),
        (KeyboardInterrupt(), 130, "taid: interrupted\n"),
    ],
)
def test_each_kind_of_end_has_its_status(monkeypatch, capsys, error, status, text):
    def fail(_: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "train", fail)
    assert main(["train"]) == status
    captured = capsys.readouterr().err
    assert captured.endswith(text)
    assert "Traceback" not in captured


def test_an_error_of_our_own_is_not_hidden(monkeypatch):
    def fail(_: Any) -> None:
        raise AssertionError("an invariant")

    monkeypatch.setattr(cli, "train", fail)
    with pytest.raises(AssertionError, match="an invariant"):
        main(["train"])


def test_the_traceback_is_shown_where_it_is_asked_for(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TAID_TRACEBACK", "1")
    assert main(["report", str(tmp_path / "absent")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.splitlines()[-1].startswith("taid: error: ")


def test_the_rank_is_named_where_there_are_several(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RANK", "3")
    assert main(["report", str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err.startswith("taid: error (rank 3): ")


def test_machine_and_arguments_stay_private_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY")
    main([])
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    main([])
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "0"
