"""Engines on several processes, through the real command line: each gives what one process gives on the same rows."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from taid import engines, run_folder

pytestmark = pytest.mark.cli

ROOT = Path(__file__).parents[1]
DEEPSPEED = ROOT / ".venv" / "deepspeed"  # by `make dev`, apart: it would speak in every other test
SENTENCE = "It was a bright cold day in April, and the clocks were striking thirteen. Who is there? Nobody at all. "
TIMING = ("tokens_per_second", "seconds", "epoch")
ENGINES = ["ddp", "fsdp2", "zero2", "zero3"]
# What each case changes.
PLACES = ("model_name_or_path", "teacher_cache", "dataset_name")
CASES = {
    "packed rows": {"packing": True, "max_length": 24},
    "LoRA, an optimizer with state": {
        "use_peft": True, "lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": ["q_proj", "v_proj"], "optim": "adamw_torch",
        "learning_rate": 0.01,
    },
    "a cache, and a last batch that is empty on a rank": {
        "teacher_cache": "cache", "dataset_name": "five.jsonl", "num_train_epochs": 2, "max_steps": -1,
    },
    "tied heads, a teacher in the memory of the CPU": {"model_name_or_path": "tied", "teacher_placement": "cpu"},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_model, tokenizer, student_folder, teacher_folder):
    """Models, rows and a recipe."""
    root = tmp_path_factory.mktemp("engines")
    make_model(300, tied=False).save_pretrained(root / "student")
    tokenizer.save_pretrained(root / "student")
    (root / "tied").symlink_to(student_folder)
    rows = [{"prompt": SENTENCE[: 5 + 2 * i], "completion": SENTENCE[5 + 2 * i : 20 + 7 * i]} for i in range(8)]
    for name, some in {"train": rows, "five": rows[:5]}.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (root / "held_out.jsonl").write_text("".join(json.dumps({"text": SENTENCE[3 * i : 40 + 5 * i]}) + "\n" for i in range(7)))
    recipe = {
        "model_name_or_path": str(root / "student"), "teacher_model_name_or_path": str(teacher_folder),
        "dataset_name": str(root / "train.jsonl"), "eval_dataset_name": str(root / "held_out.jsonl"), "max_steps": 4,
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 2, "learning_rate": 0.3, "optim": "sgd",
        "lr_scheduler_type": "constant", "max_grad_norm": 0.5, "bf16": False, "activation_checkpointing": False,
        "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "taid_alpha": 0.8, "taid_beta": 0.5,
    }  # fmt: skip
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


def environment():
    path = os.pathsep.join([str(DEEPSPEED), str(ROOT / "src")])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}


def arguments_of(root, case, output, *more):
    options = {name: str(root / value) if name in PLACES else value for name, value in CASES[case].items()}
    given = [f"--{name}={value}" for name, value in options.items() if not isinstance(value, list)]
    listed = [word for name, value in options.items() if isinstance(value, list) for word in (f"--{name}", *value)]
    return ["train", "--config", str(root / "recipe.yaml"), "--output_dir", str(output), *given, *more, *listed]


def run(runs, root, engine=None, processes=2):
    """One run after another in the processes of one engine, or in one process."""
    path = root / f"{engine}-{processes}.json"
    path.write_text(json.dumps(runs))
    file = engine and f"{ROOT / 'src' / 'taid' / 'assets' / 'engines' / engine}.yaml"
    launcher = ["accelerate.commands.launch", "--config_file", file, "--num_processes", str(processes)] if engine else []
    command = [sys.executable, *(["-m", *launcher] if engine else []), str(ROOT / "tests" / "engine_runs.py"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment())
    assert done.returncode == 0, done.stderr[-5000:]
    return done


def metrics(folder):
    return [{k: v for k, v in row.items() if k not in TIMING} for row in run_folder.read_metrics(folder)]


def weights(folder):
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def require_equal(one, other):
    """Loss, gradient norm, t and everything else that is logged, and the final weights: to 1e-5."""
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert (weight - found[name]).norm() <= 1e-5 * weight.norm(), name
    rows = list(zip(metrics(one), metrics(other), strict=True))
    assert {"loss", "grad_norm", "t", "kl", "eval_kl"} <= set().union(*(row for row, _ in rows))
    for a, b in rows:
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert abs(value - b[name]) <= 1e-5 * abs(value) + 1e-9, (name, a["step"], value, b[name])


@pytest.fixture(scope="module")
def alone(folder):
    """What one process gives in each case, and a cache of the teacher."""
    recipe = ["--config", str(folder / "recipe.yaml")]
    runs = [
        ["cache", *recipe, "--teacher_cache", str(folder / "cache"), "--output_dir", str(folder / "unused")],
        *(arguments_of(folder, case, folder / "one" / str(i)) for i, case in enumerate(CASES)),
    ]
    run(runs, folder)
    return folder / "one"


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_of_an_engine_give_what_one_process_gives(engine, folder, alone):
    if engine.startswith("zero") and not DEEPSPEED.is_dir():
        pytest.skip("DeepSpeed is not there: `make dev` puts it into .venv/deepspeed")
    more = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    run([arguments_of(folder, case, folder / engine / str(i), *more) for i, case in enumerate(CASES)], folder, engine)
    for i in range(len(CASES)):
        require_equal(alone / str(i), folder / engine / str(i))
    versions = json.loads((folder / engine / "0" / "versions.json").read_text())
    assert (versions["engine"], versions["processes"]) == (engine, 2)
