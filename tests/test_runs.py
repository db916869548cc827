"""Whole runs through the real command line: two processes, a kill, a resume, a report."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from command_line import Command
from prompt_server import PromptServer
from taid.artifacts import run_folder
from taid.teachers.cache import Cache

pytestmark = pytest.mark.cli

SENTENCE = "It was a bright cold day in April, and the clocks were striking thirteen. Who is there? Nobody at all. "
TIMING = ("tokens_per_second", "seconds")


@pytest.fixture
def recipe(tmp_path, student_folder, teacher_folder):
    """Write a recipe for a run in `folder` and return its path."""
    rows = [{"prompt": SENTENCE[: 5 + 2 * i], "completion": SENTENCE[5 + 2 * i : 20 + 7 * i]} for i in range(8)]
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out.write_text("".join(json.dumps({"text": SENTENCE[3 * i : 40 + 5 * i]}) + "\n" for i in range(7)))

    def write(folder, **options):
        values = {
            "model_name_or_path": str(student_folder), "teacher_model_name_or_path": str(teacher_folder),
            "dataset_name": str(train), "eval_dataset_name": str(held_out), "output_dir": str(folder), "max_steps": 4,
            "per_device_train_batch_size": 8, "per_device_eval_batch_size": 2, "learning_rate": 0.3, "optim": "sgd",
            "lr_scheduler_type": "constant", "max_grad_norm": 1e9, "bf16": False, "activation_checkpointing": False,
            "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no", "report_to": "none",
            "use_cpu": True, "taid_alpha": 0.8, "taid_beta": 0.5,
        }  # fmt: skip
        path = tmp_path / f"{folder.name}.yaml"
        path.write_text(yaml.safe_dump(values | options))
        return path

    return write


def command(*arguments, processes=1):
    if processes == 1:
        return Command(arguments)
    # accelerate's own --cpu starts one process only (or mpirun); --multi_gpu is its name for torchrun.
    return by_python(
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", processes, "-m", "taid", *arguments
    )


def by_python(*words):
    """A module as a user starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out


def metrics(folder):
    return [{k: v for k, v in row.items() if k not in TIMING} for row in run_folder.read_metrics(folder)]


@pytest.mark.slow  # three processes that load the libraries each
def test_a_killed_and_resumed_run_ends_like_one_left_alone_byte_for_byte(recipe, tmp_path):
    options = {"max_steps": 24, "logging_steps": 5, "save_strategy": "steps", "save_steps": 4, "eval_steps": 6,
               "optim": "adamw_torch", "learning_rate": 1e-3, "per_device_train_batch_size": 3}  # fmt: skip
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    finish(command("train", "--config", recipe(alone, **options)))

    process = by_python("taid", "train", "--config", recipe(killed, **options))
    deadline = time.time() + 300
    while run_folder_step(killed) < 8 and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "model.safetensors").exists(), "the run was over before the kill"

    finish(by_python("taid", "train", "--config", recipe(killed, **options), "--resume_from_checkpoint"))
    assert (killed / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    assert metrics(killed) == metrics(alone)
    states = [json.loads((f / "checkpoint-24" / "trainer_state.json").read_text()) for f in (alone, killed)]
    schedules = [state["stateful_callbacks"]["TAIDTrainer"]["schedule"] for state in states]
    assert schedules[0] == schedules[1]
    assert schedules[0]["step"] == 24


def run_folder_step(folder: Path) -> int:
    checkpoint = run_folder.last_checkpoint(folder) if folder.exists() else None
    return int(checkpoint.name.split("-")[1]) if checkpoint else 0


def test_a_run_leaves_its_report_and_a_configuration_that_repeats_it(recipe, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    out = finish(command("train", "--config", recipe(first)))
    assert str(first / "report.html") in out
    page = (first / "report.html").read_text()
    assert "TAID" in page
    assert "data:image/png;base64," in page
    finish(command("train", "--config", first / "config.yaml", "--output_dir", second))
    assert (second / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert metrics(second) == metrics(first)
    (first / "report.html").unlink()
    finish(command("report", first))
    assert (first / "report.html").read_text() == page


# The command line with shards of one row, so that there is something on disk when it is killed.
SMALL_SHARDS = (
    "import sys, taid.teachers.cache; taid.teachers.cache.Writer.__init__.__defaults__ = (1, 120.0); "
    "from taid.cli.main import main; sys.exit(main(sys.argv[1:]))"
)


def capturing(*arguments):
    return Command(["cache", *arguments], code=SMALL_SHARDS)


def test_a_killed_capture_continues_and_training_from_it_ends_like_with_the_teacher(recipe, tmp_path):
    local, cached, folder = tmp_path / "local", tmp_path / "cached", tmp_path / "cache"
    finish(command("train", "--config", recipe(local)))
    path = recipe(cached, per_device_train_batch_size=1, gradient_accumulation_steps=8)

    process = capturing("--config", path, "--teacher_cache", folder)
    deadline = time.time() + 300
    while len(list(folder.glob("shards/*.safetensors"))) < 4 and time.time() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert json.loads((folder / "manifest.json").read_text())["shards"] is None, "it was over before the kill"

    out = finish(capturing("--config", path, "--teacher_cache", folder))
    assert "trained tokens to capture" in out
    assert not list(folder.rglob("*.partial"))
    finish(command("train", "--config", recipe(cached), "--teacher_cache", folder))
    for a, b in zip(metrics(cached), metrics(local), strict=True):
        for name in a.keys() - {"epoch"}:
            allowed = 1e-6 if name == "momentum" else 1e-6 * abs(a[name]) + 1e-12
            assert abs(a[name] - b[name]) <= allowed, (name, a["step"])
    assert "teacher_cache" in (cached / "config.yaml").read_text()


@pytest.mark.slow
def test_two_processes_capture_what_one_does(recipe, tmp_path):
    path = recipe(tmp_path / "run", per_device_train_batch_size=2)
    folders = [tmp_path / "one", tmp_path / "two"]
    for processes, folder in enumerate(folders, 1):
        finish(command("cache", "--config", path, "--teacher_cache", folder, processes=processes))
    one, two = map(Cache, folders)
    assert one._places.keys() == two._places.keys()
    assert len(one) == 8 + 7
    for key in one._places:
        difference = one.read(key)["hidden"] - two.read(key)["hidden"]
        assert difference.norm() <= 1e-6 * one.read(key)["hidden"].norm()
    finish(command("train", "--config", path, "--teacher_cache", folders[0], processes=2))


def test_a_capture_needs_its_folder_and_no_other_at_work_in_it(recipe, tmp_path):
    path = recipe(tmp_path / "run")
    process = command("cache", "--config", path)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert err.strip().splitlines()[-1].startswith("taid: error: teacher_cache is not set")
    process = command("cache", "--config", recipe(tmp_path / "other", teacher_model_name_or_path=None),
                      "--teacher_cache", tmp_path / "cache")  # fmt: skip
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert err.strip().splitlines()[-1].startswith("taid: error: teacher_model_name_or_path is not set")
    with run_folder.claimed(tmp_path / "cache"):
        process = command("cache", "--config", path, "--teacher_cache", tmp_path / "cache")
        _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "is in use by another taid process" in err


@pytest.mark.slow
def test_two_processes_ask_one_server_and_captures_from_it_need_a_folder_only(recipe, tmp_path, teacher_folder):
    model, tokenizer = (cls.from_pretrained(teacher_folder) for cls in (AutoModelForCausalLM, AutoTokenizer))
    with PromptServer(model, tokenizer, max_logprobs=-1) as server:
        given = {"teacher_server_url": server.url, "teacher_top_k": 8}
        one, two = tmp_path / "one", tmp_path / "two"
        finish(command("train", "--config", recipe(one, **given)))
        finish(command("train", "--config", recipe(two, per_device_train_batch_size=4, **given), processes=2))
        for a, b in zip(metrics(one), metrics(two), strict=True):
            for name in a.keys() - {"epoch"}:
                assert abs(a[name] - b[name]) <= 1e-5 * abs(a[name]) + 1e-12, (name, a["step"])
        path = recipe(tmp_path / "out", per_device_train_batch_size=4, teacher_cache_format="top_k", **given)
        finish(command("cache", "--config", path, "--teacher_cache", tmp_path / "cache", processes=2))
    finish(command("train", "--config", recipe(tmp_path / "alone", teacher_server_url=None, teacher_top_k=8),
                   "--teacher_cache", tmp_path / "cache"))  # fmt: skip


@pytest.mark.slow
def test_fewer_rows_than_processes_do_not_hang_a_run_from_a_cache(recipe, tmp_path):
    held_out = tmp_path / "one_row.jsonl"
    held_out.write_text(json.dumps({"text": SENTENCE}) + "\n")
    path = recipe(tmp_path / "run", per_device_train_batch_size=2, eval_dataset_name=str(held_out))
    for arguments in (("cache",), ("train",)):
        finish(command(*arguments, "--config", path, "--teacher_cache", tmp_path / "cache", processes=2))
