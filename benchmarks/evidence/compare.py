"""The evidence: `taid compare` on pairs of small models, one setting at a time, and on a small one in minutes.

    python benchmarks/evidence/compare.py small
    python benchmarks/evidence/compare.py stories --teacher DIR/stories260k --student DIR/stories280k-weak
    python benchmarks/evidence/compare.py instructions --teacher ... --student ... --rows DIR/dolly_6400.jsonl
    python benchmarks/evidence/compare.py books --models runs/evidence/models

`small`: the demo's pair on this Python's standard library. `stories`: a trained teacher of 260 k weights writes
stories, and teaches a weak student of 280 k. `instructions`: that teacher is fine-tuned on instructions first, and
teaches them. The others are of models.py's pairs, on passages of books that no model has read:

    books                           every method, and schedules of t
    teacher_0.2M, _0.5M, _1M        the same student under smaller teachers
    short, long                     in 48 steps and in 320
    epochs_5, epochs_20             so many times through ever fewer passages, in as many steps
    answers                         instructions, answered too

Each makes rows to train on, to choose a learning rate by and to test on, and a recipe.yaml, and calls `taid compare`,
which goes on where it was when it is called again. What comes of it goes beside this file: NAME.md, the table, and
NAME.json and NAME.curves.json.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks
from models import read_rows, split_instructions

from step import _machine
from stories import generate, write_rows

HERE = Path(__file__).parent
Setting = tuple[dict[str, Any], dict[str, Any]]  # of the recipe, of `taid compare`
RECIPE = {
    "per_device_train_batch_size": 4, "per_device_eval_batch_size": 32, "num_train_epochs": 1,
    "lr_scheduler_type": "cosine", "max_length": 256, "taid_alpha": "auto", "bf16": False, "logging_steps": 16,
    "activation_checkpointing": False, "eval_strategy": "steps", "eval_steps": 64, "save_strategy": "no",
    "report_to": "none", "use_cpu": True, "sampling_max_new_tokens": 64,
}  # fmt: skip
EVERY = (
    "sft,forward_kl,reverse_kl,jsd,tvd,skew_forward_kl,skew_reverse_kl,adaptive_kl,dkd,ctkd,abkd,amid,taid,taid_linear"
)
SAMPLED = f"{EVERY},gkd,distillm,taid_sampled"
FEW = "forward_kl,reverse_kl,skew_forward_kl,taid,taid_auto"
SOME = f"sft,{FEW}"
TRAINED, HELD_OUT = 1_024, 128  # rows of stories, and of instructions
MOST_CHARACTERS = 400  # of an instruction and its answer
STEPS, BATCH, VALIDATION = 160, 8, 128  # on books; rows
SCHEDULES = {
    "t_start_0": {"objective": "taid", "taid_t_start": 0.0},
    "t_start_0.2": {"objective": "taid", "taid_t_start": 0.2},
    "t_start_0.8": {"objective": "taid", "taid_t_start": 0.8},
    "linear_0.8": {"objective": "taid", "taid_t_start": 0.8, "taid_adaptive": False},
    "alpha_2": {"objective": "taid", "taid_alpha": 0.02},
    "alpha_10": {"objective": "taid", "taid_alpha": 0.1},
    "beta_0.9": {"objective": "taid", "taid_beta": 0.9},
    "t_0.9": {"objective": "taid", "taid_t_start": 0.9, "taid_t_end": 0.9},
    "t_0.7": {"objective": "taid", "taid_t_start": 0.7, "taid_t_end": 0.7},
    "forward_kl_beta2_0.95": {"objective": "forward_kl", "adam_beta2": 0.95},
    "taid_beta2_0.95": {"objective": "taid", "adam_beta2": 0.95},
    "taid_auto_beta2_0.95": {"objective": "taid", "taid_schedule": "auto", "adam_beta2": 0.95},
}


def taid(*arguments: object) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "taid", *map(str, arguments)], check=True, env=environment)


# --- settings ---------------------------------------------------------------------------------------------------------


def small(out: Path, options: argparse.Namespace) -> Setting:
    from taid import demo

    splits: dict[demo.Split, int] = {"train": 64, "validation": 16, "test": 16}
    for name, number in splits.items():
        texts = "\n".join(demo.read(name))
        starts = random.Random(0).sample(range(0, len(texts) - 700, 700), number)
        write_rows(out / f"{name}.jsonl", [{"text": texts[start : start + 700]} for start in starts])
    assets = Path(str(resources.files("taid") / "assets"))
    recipe = pair(assets / "student", assets / "teacher")
    recipe |= {"per_device_train_batch_size": 8, "eval_steps": 4, "logging_steps": 2}
    return recipe, {
        "objectives": "sft,forward_kl,taid", "seeds": 2, "learning_rates": "3e-4,1e-3",
    }  # fmt: skip


def stories(out: Path, options: argparse.Namespace) -> Setting:
    if not (out / "test.jsonl").exists():
        generate(options.teacher, out, TRAINED, 2 * HELD_OUT)
        rows = read_rows(out / "held_out.jsonl")
        write_rows(out / "validation.jsonl", rows[:HELD_OUT])
        write_rows(out / "test.jsonl", rows[HELD_OUT:])
    return pair(options.student, options.teacher), {"objectives": EVERY, "learning_rates": "3e-4,1e-3,3e-3"}


def instructions(out: Path, options: argparse.Namespace) -> Setting:
    sizes = {"validation": HELD_OUT, "test": HELD_OUT, "train": TRAINED}
    split_instructions(options.rows, {out / f"{name}.jsonl": n for name, n in sizes.items()}, MOST_CHARACTERS)
    teacher = out / "teacher"
    if not (teacher / "model.safetensors").exists():  # it knows stories, and no instructions
        recipe = {"model_name_or_path": str(options.teacher), "num_train_epochs": 6, "per_device_train_batch_size": 16}
        write_recipe(out / "teacher.yaml", recipe | files(out) | {"objective": "sft", "learning_rate": 3e-3})
        taid("train", "--config", out / "teacher.yaml", "--output_dir", teacher, "--overwrite_output_dir")
    recipe = pair(options.student, teacher)
    return recipe, {"objectives": SAMPLED, "learning_rates": "1e-3,3e-3,1e-2,3e-2", "generate": 32}


def books(
    out: Path, options: argparse.Namespace, *, methods: str, teacher: str = "teacher_3M", steps: int = STEPS,
    epochs: int = 1, **more: Any,
) -> Setting:  # fmt: skip
    models = options.models
    write_rows(out / "train.jsonl", read_rows(models / "train.jsonl")[: steps * BATCH // epochs])
    write_rows(out / "validation.jsonl", read_rows(models / "validation.jsonl")[:VALIDATION])
    shutil.copyfile(models / "test.jsonl", out / "test.jsonl")
    recipe = pair(models / "student", models / teacher) | {"max_length": 128, "num_train_epochs": epochs}
    recipe |= {"per_device_train_batch_size": BATCH, "eval_steps": steps // 5, "logging_steps": 4}
    return recipe, {"objectives": methods, "learning_rates": "1e-3,3e-3,1e-2,3e-2"} | more


def schedules(out: Path, options: argparse.Namespace) -> Setting:
    (out / "schedules.yaml").write_text(yaml.safe_dump(SCHEDULES, sort_keys=False))
    methods = ",".join((EVERY, "taid_auto", *SCHEDULES))
    return books(out, options, methods=methods, variants=out / "schedules.yaml")


def answers(out: Path, options: argparse.Namespace) -> Setting:
    models = options.models
    write_rows(out / "train.jsonl", read_rows(models / "instructions_taught.jsonl")[: STEPS * BATCH])
    write_rows(out / "validation.jsonl", read_rows(models / "instructions_validation.jsonl")[:VALIDATION])
    shutil.copyfile(models / "instructions_test.jsonl", out / "test.jsonl")
    recipe = pair(models / "student", models / "instructed")
    recipe |= {"per_device_train_batch_size": BATCH, "eval_steps": STEPS // 5, "logging_steps": 4}
    return recipe, {
        "objectives": "sft,forward_kl,jsd,taid,taid_auto",
        "learning_rates": "3e-3,1e-2,3e-2",
        "generate": 32,
    }


SETTINGS: dict[str, Callable[..., Setting]] = {
    "small": small,
    "stories": stories,
    "instructions": instructions,
    "books": schedules,
    **{f"teacher_{size}": partial(books, methods=FEW, teacher=f"teacher_{size}") for size in ("0.2M", "0.5M", "1M")},
    "short": partial(books, methods=SOME, steps=48),
    "long": partial(books, methods="forward_kl,taid,taid_auto", steps=320, learning_rates="1e-3,3e-3,1e-2"),
    **{f"epochs_{n}": partial(books, methods=SOME, epochs=n) for n in (5, 20)},
    "answers": answers,
}
NEEDS = {"small": (), "stories": ("teacher", "student"), "instructions": ("teacher", "student", "rows")}


def pair(student: Path, teacher: Path) -> dict[str, Any]:
    return {"model_name_or_path": str(student), "teacher_model_name_or_path": str(teacher)}


def files(out: Path) -> dict[str, Any]:
    return {"dataset_name": str(out / "train.jsonl"), "eval_dataset_name": str(out / "validation.jsonl")}


def write_recipe(path: Path, options: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(RECIPE | options, sort_keys=False))


# --- the command ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SETTINGS)
    parser.add_argument("--models", type=Path, help="what models.py made")
    parser.add_argument("--teacher", type=Path, help="the trained story teacher")
    parser.add_argument("--student", type=Path, help="the weak student")
    parser.add_argument("--rows", type=Path, help="a JSONL file with `prompt` and `completion`")
    parser.add_argument("--out", type=Path, help="default: runs/evidence/NAME")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="leave what is beside this file as it is")
    options, more = parser.parse_known_args()
    for name in NEEDS.get(options.name, ("models",)):
        if getattr(options, name) is None:
            parser.error(f"{options.name} needs --{name}")
    out = options.out or Path("runs/evidence") / options.name
    out.mkdir(parents=True, exist_ok=True)
    recipe, of_comparison = SETTINGS[options.name](out, options)
    write_recipe(out / "recipe.yaml", recipe | files(out))
    of_comparison = {"seeds": 5, "test": out / "test.jsonl", "processes": options.processes} | of_comparison
    arguments = [part for name, value in of_comparison.items() for part in (f"--{name}", value)]
    taid("compare", "--config", out / "recipe.yaml", "--output_dir", out / "comparison", *arguments, *more)
    if not options.keep:
        record(options.name, out)


def record(name: str, out: Path) -> None:
    """Keep table, numbers and curves, with places as anybody would name them."""
    places = [(str(out), f"runs/evidence/{name}")]
    places += [(os.path.dirname(part), "DIR") for part in sys.argv[2:] if os.path.isabs(part)]
    command = f"`python benchmarks/evidence/compare.py {' '.join(sys.argv[1:])}`"
    kept = {f"{name}.json": "comparison.json", f"{name}.curves.json": "curves.json", f"{name}.md": "comparison.md"}
    for to, source in kept.items():
        text = (out / "comparison" / source).read_text()
        if to.endswith(".md"):
            text = f"# {name}\n\n{command}; {date.today()}, {_machine()}.\n\n{text}"
        for place, words in places:
            text = text.replace(place, words)
        (HERE / to).write_text(text)


if __name__ == "__main__":
    main()
