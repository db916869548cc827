"""All objectives, five seeds, a learning rate each: `taid compare` on two pairs of models, and on a small one.

    python benchmarks/comparison.py stories --teacher DIR/stories260k --student DIR/stories280k-weak
    python benchmarks/comparison.py instructions --teacher ... --student ... --rows DIR/dolly_6400.jsonl
    python benchmarks/comparison.py small

`stories`: a trained teacher of 260 k weights writes stories, and teaches a weak student of 280 k. `instructions`:
that teacher is fine-tuned on instructions first, and teaches them; answers to 64 test prompts are measured too.
`small`: the demo's pair on this Python's standard library, five methods and two seeds in a few minutes, without other
data.

Each makes rows to train on, to choose a learning rate by and to test on, and a recipe.yaml, and calls `taid compare`,
which goes on where it was when it is called again. The table goes to benchmarks/results/comparison_NAME.md and .json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from stories import generate, write_rows

RESULTS = Path(__file__).parent / "results"
RECIPE = {
    "per_device_train_batch_size": 4, "per_device_eval_batch_size": 32, "num_train_epochs": 1, "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine", "max_length": 256, "taid_alpha": "auto", "bf16": False, "logging_steps": 16,
    "activation_checkpointing": False, "eval_strategy": "steps", "eval_steps": 64, "save_strategy": "no",
    "report_to": "none", "use_cpu": True, "sampling_max_new_tokens": 64,
}  # fmt: skip
EVERY = (
    "sft,forward_kl,reverse_kl,jsd,tvd,skew_forward_kl,skew_reverse_kl,adaptive_kl,dkd,ctkd,abkd,amid,taid,taid_linear"
)
RATES = "3e-4,1e-3,3e-3"
TRAINED, HELD_OUT = 1_024, 128  # rows of stories
INSTRUCTED, MOST_CHARACTERS = 1_024, 400  # rows of instructions, and how long both sides of one may be


def taid(*arguments: object) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "taid", *map(str, arguments)], check=True, env=environment)


def stories(out: Path, options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    if not (out / "test.jsonl").exists():
        generate(options.teacher, out, TRAINED, 2 * HELD_OUT)
        rows = [json.loads(line) for line in (out / "held_out.jsonl").read_text().splitlines()]
        write_rows(out / "validation.jsonl", rows[:HELD_OUT])
        write_rows(out / "test.jsonl", rows[HELD_OUT:])
    return models(options.student, options.teacher), ["--objectives", EVERY, "--learning_rates", RATES, "--seeds", "5"]


def instructions(out: Path, options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()]
    rows = [row for row in rows if len(row["prompt"]) + len(row["completion"]) <= MOST_CHARACTERS]
    random.Random(0).shuffle(rows)
    ends = [0, HELD_OUT, 2 * HELD_OUT, 2 * HELD_OUT + INSTRUCTED]
    for name, start, end in zip(("validation", "test", "train"), ends, ends[1:], strict=False):
        write_rows(out / f"{name}.jsonl", rows[start:end])
    teacher = out / "teacher"
    if not (teacher / "model.safetensors").exists():  # it knows stories, and no instructions
        recipe = {"model_name_or_path": str(options.teacher), "num_train_epochs": 6} | files(out)
        write_recipe(
            out / "teacher.yaml",
            recipe | {"objective": "sft", "learning_rate": 3e-3, "per_device_train_batch_size": 16},
        )
        taid("train", "--config", out / "teacher.yaml", "--output_dir", teacher, "--overwrite_output_dir")
    more = [
        "--objectives",
        f"{EVERY},gkd,distillm,taid_sampled",
        "--learning_rates",
        RATES,
        "--seeds",
        "5",
        "--generate",
        "32",
    ]
    return models(options.student, teacher), more


def small(out: Path, options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    from taid import stdlib_text

    for name, split, number in (("train", "train", 160), ("validation", "validation", 32), ("test", "held_out", 32)):
        texts = "\n".join(stdlib_text.read(split))
        starts = random.Random(0).sample(range(0, len(texts) - 700, 700), number)
        write_rows(out / f"{name}.jsonl", [{"text": texts[start : start + 700]} for start in starts])
    assets = Path(str(resources.files("taid") / "assets"))
    recipe = models(assets / "student", assets / "teacher")
    recipe |= {"per_device_train_batch_size": 8, "eval_steps": 10, "logging_steps": 2}
    methods = ["--objectives", "sft,forward_kl,reverse_kl,amid,taid", "--seeds", "2", "--learning_rates", "3e-4,1e-3"]
    return recipe, methods


def models(student: Path, teacher: Path) -> dict[str, Any]:
    return {"model_name_or_path": str(student), "teacher_model_name_or_path": str(teacher)}


def files(out: Path) -> dict[str, Any]:
    return {"dataset_name": str(out / "train.jsonl"), "eval_dataset_name": str(out / "validation.jsonl")}


def write_recipe(path: Path, options: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(RECIPE | options, sort_keys=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("stories", "instructions", "small"))
    parser.add_argument("--teacher", type=Path, help="the trained story teacher")
    parser.add_argument("--student", type=Path, help="the weak student")
    parser.add_argument("--rows", type=Path, help="instructions: a JSONL file with `prompt` and `completion`")
    parser.add_argument("--out", type=Path, help="default: runs/comparison/NAME")
    parser.add_argument("--processes", default="2", help="runs at a time (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="leave benchmarks/results as it is")
    options, more = parser.parse_known_args()
    wanted = {"stories": ("teacher", "student"), "instructions": ("teacher", "student", "rows"), "small": ()}
    for name in wanted[options.name]:
        if getattr(options, name) is None:
            parser.error(f"{options.name} needs --{name}")
    out = options.out or Path("runs/comparison") / options.name
    out.mkdir(parents=True, exist_ok=True)
    recipe, arguments = globals()[options.name](out, options)
    write_recipe(out / "recipe.yaml", recipe | files(out))
    arguments = [*arguments, "--test", str(out / "test.jsonl"), "--processes", options.processes, *more]
    taid("compare", "--config", out / "recipe.yaml", "--output_dir", out / "comparison", *arguments)
    if not options.keep:
        record(options.name, out / "comparison")


def record(name: str, comparison: Path) -> None:
    from step import _machine

    command = f"`python benchmarks/comparison.py {' '.join(sys.argv[1:])}`"
    table = (comparison / "comparison.md").read_text()
    head = f"# Comparison: {name}\n\n{command}; {date.today()}, {_machine()}.\n\n"
    (RESULTS / f"comparison_{name}.md").write_text(head + table)
    shutil.copyfile(comparison / "comparison.json", RESULTS / f"comparison_{name}.json")


if __name__ == "__main__":
    main()
