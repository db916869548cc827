"""``taid demo``: a small ``taid compare`` in minutes, on nothing that has to be downloaded.

A teacher of 2.6 M weights and a student of half of them, its first and its third layer, come with the package;
``scripts/train_demo_models.py`` makes both. The text is the source of the running Python's standard library. Neither
model was trained on the modules that the demo trains and measures on. Nothing was chosen on the test rows.

    DIR/train.jsonl, validation.jsonl, test.jsonl    the rows
    DIR/recipe.yaml, variants.yaml                   what all runs share, and what fine-tuning has of its own
    DIR/comparison/                                  as `taid compare` leaves it, comparison.html among it
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shlex
import sys
import sysconfig
import time
from importlib import resources
from pathlib import Path
from typing import Literal

import transformers
from rich.console import Console
from rich.table import Table
from rich.text import Text

from taid.artifacts.run_folder import write_atomically
from taid.comparison import results, runner
from taid.comparison.options import options_of
from taid.comparison.plan import ComparisonPlan
from taid.config.parsing import configured
from taid.models.generation import decoding, generate
from taid.models.loading import load_model, load_tokenizer

Split = Literal["models", "train", "validation", "test"]
METHODS = {"fine_tuning": "fine-tuning", "forward_kl": "forward KL", "taid": "TAID"}
CHARACTERS, APART = 600, 450  # length of a row, more than max_length needs, and from one row's start to the next's
HELD_OUT_ROWS = 64
PROMPTS, NEW_TOKENS = 3, 40
ASSETS = Path(str(resources.files("taid") / "assets"))
RECIPE = """\
# The recipe of `taid demo`, all of whose options are those of `taid train`.
model_name_or_path: {student}
teacher_model_name_or_path: {teacher}
dataset_name: {train}
eval_dataset_name: {validation}
max_length: 128
max_steps: {steps}
per_device_train_batch_size: 8
per_device_eval_batch_size: 16
learning_rate: 2.0e-3  # the best of forward KL on validation rows (docs/log.md)
lr_scheduler_type: cosine
warmup_steps: {warmup}
taid_alpha: auto
eval_strategy: steps
eval_steps: {eval_steps}
logging_steps: {logging_steps}
save_strategy: "no"
bf16: false
activation_checkpointing: false
use_cpu: true
report_to: none
"""
VARIANTS = """\
# Plain fine-tuning on the rows, without the teacher, at its own best learning rate on validation rows (docs/log.md).
fine_tuning: {objective: sft, learning_rate: 5.0e-4}
"""

# Not prose-like source: test data, code tables, vendored or machine-written files.
_EXCLUDED = {"test", "tests", "idlelib", "lib2to3", "encodings", "ensurepip", "turtledemo"}
_EXCLUDED |= {"site-packages", "dist-packages", "__pycache__"}
_EXCLUDED_PREFIXES = ("config-", "_sysconfigdata")


def run(output_dir: Path, *, steps: int, seeds: int, processes: int) -> results.ComparisonResults:
    """Write rows and a recipe, compare the methods, and print the table and what the students write.

    Raises:
        ValueError: `output_dir` holds something else.
        FileNotFoundError: this Python has no standard library in source.
    """
    start, console = time.perf_counter(), Console(width=None if sys.stdout.isatty() else 160)
    write_files(output_dir, steps)
    arguments = [
        "--config", str(output_dir / "recipe.yaml"), "--variants", str(output_dir / "variants.yaml"),
        "--objectives", ",".join(METHODS), "--seeds", str(seeds),
        "--test", str(output_dir / "test.jsonl"), "--processes", str(processes),
        "--output_dir", str(output_dir / "comparison"),
    ]  # fmt: skip
    print(f"taid compare {shlex.join(arguments)}", flush=True)
    options, shared = options_of(arguments)
    recipe = configured(shared, "compare")
    found = runner.compare(ComparisonPlan.from_options(options, shared, *recipe), *recipe[1:])
    console.print(results.table(found))
    students = {title: output_dir / "comparison" / "runs" / f"{method}-seed0" for method, title in METHODS.items()}
    models = {"student before": ASSETS / "student", **students, "teacher": ASSETS / "teacher"}
    for prompt, answers in continuations(models, prompts(read("test"))):
        console.print(_shown(prompt, answers))
    print(f"{time.perf_counter() - start:.0f} s. Page: {output_dir / 'comparison' / 'comparison.html'}")
    return found


# --- rows and recipe --------------------------------------------------------------------------------------------------


def write_files(folder: Path, steps: int) -> None:
    """Write the rows and the recipe of the demo; a folder that has them already stays as it is.

    Raises:
        ValueError: the folder holds something else, or a recipe of another content.
    """
    files = {f"{split}.jsonl": _as_jsonl(rows(split)) for split in ("train", "validation", "test")}
    files["variants.yaml"] = VARIANTS
    values = {"student": ASSETS / "student", "teacher": ASSETS / "teacher"}
    values |= {split: (folder / f"{split}.jsonl").absolute() for split in ("train", "validation")}
    files["recipe.yaml"] = RECIPE.format(
        **{name: json.dumps(str(path)) for name, path in values.items()}, steps=steps, warmup=min(10, steps // 10),
        eval_steps=max(1, steps // 4), logging_steps=max(1, steps // 40),
    )  # fmt: skip
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file: choose another folder")
    there = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if strange := sorted(there - files.keys() - {"comparison"}):
        raise ValueError(f"--output_dir {folder} holds {strange[0]}, which is not of the demo: choose another folder")
    for name in there & files.keys():
        if (folder / name).read_text(encoding="utf-8") != files[name]:
            raise ValueError(
                f"{folder / name} is of another demo (--steps, another Python) or was edited: "
                "delete the folder, or choose another as --output_dir"
            )
    folder.mkdir(parents=True, exist_ok=True)
    for name in files.keys() - there:
        write_atomically(folder / name, files[name])


def rows(split: Literal["train", "validation", "test"]) -> list[dict[str, str]]:
    """Return pieces of the split's modules, each from the start of a line: all to train on, else HELD_OUT_ROWS."""
    pieces = []
    for text in read(split):
        start = 0
        while start + CHARACTERS <= len(text):
            pieces.append({"text": text[start : start + CHARACTERS]})
            start = text.find("\n", start + APART) + 1 or len(text)
    if split != "train":
        pieces = random.Random(0).sample(pieces, min(HELD_OUT_ROWS, len(pieces)))
    return pieces


def _as_jsonl(found: list[dict[str, str]]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in found)


def split_of(module: str) -> Split:
    """Return the split of a top-level module, from a hash of its name.

    14/16 are for the models of the package, 1/16 is trained on, 1/32 is for validation and 1/32 for the test. No part
    of a package is thus trained on while another part is held out, and a model made under one Python version has not
    seen the held-out modules of another.
    """
    first, second = hashlib.sha256(module.encode()).digest()[:2]
    if first % 16 == 13:
        return "test" if second % 2 else "validation"
    return "train" if first % 16 == 9 else "models"


def read(*splits: Split) -> list[str]:
    """Return the text of every module of the splits, one string a file, in the order of their paths.

    Raises:
        FileNotFoundError: this Python carries no standard library source (a frozen or stripped build).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for module in root.iterdir():
        if module.name in _EXCLUDED or module.name.startswith(_EXCLUDED_PREFIXES):
            continue  # above all site-packages, which may hold a hundred thousand files
        if split_of(module.name.removesuffix(".py")) in splits:
            found = [module] if module.suffix == ".py" else module.rglob("*.py")
            paths += [path for path in found if not _EXCLUDED.intersection(path.relative_to(root).parts[:-1])]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(paths)]
    if not texts:
        raise FileNotFoundError(
            f"no standard library source under {root}: this Python was built without it. "
            "Use a full CPython, or `taid train` with your own data."
        )
    return texts


# --- what the models write --------------------------------------------------------------------------------------------


def prompts(texts: list[str]) -> list[str]:
    """Return the first lines of some functions, up to where their docstrings begin; drawn, and not selected."""
    found = [match.group() for text in texts for match in re.finditer(r'^ *def \w+\(.*\):\n +"""', text, re.MULTILINE)]
    return random.Random(0).sample(found, PROMPTS)


def continuations(models: dict[str, Path], beginnings: list[str]) -> list[tuple[str, dict[str, str]]]:
    """Return each beginning with what each model writes after it, by greedy decoding."""
    transformers.utils.logging.disable_progress_bar()
    tokenizer = load_tokenizer(str(ASSETS / "teacher"), role="teacher")
    end, ids = tokenizer.eos_token_id, [tokenizer(text)["input_ids"] for text in beginnings]
    answers = {}
    for name, folder in models.items():
        written = generate(
            load_model(str(folder), role="student", dtype="float32"), ids, decoding([end], end),
            max_new_tokens=NEW_TOKENS,
        )  # fmt: skip
        answers[name] = tokenizer.batch_decode(written, skip_special_tokens=True)
    return [(text, {name: of[i] for name, of in answers.items()}) for i, text in enumerate(beginnings)]


def _shown(prompt: str, answers: dict[str, str]) -> Table:
    table = Table(title=Text(f"\nGo on, greedily:\n{prompt}"), title_justify="left", show_header=False, show_lines=True)
    for name, answer in answers.items():
        table.add_row(name, Text(answer.strip("\n")))
    return table
