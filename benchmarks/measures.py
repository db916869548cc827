"""Measure students of forward KL, reverse KL and TAID by all columns of `taid evaluate`, on the demo's pair.

    python benchmarks/measures.py --out runs/measures

1. Rows from Python's standard library: four lines of a file are the prompt, the eight after them the completion.
2. `taid train` once for each objective, from the same start on the same rows in the same order.
3. `taid evaluate --generate` of each student, of the student before and of the teacher, as Markdown on standard output.

One seed, and a student that writes no sense: this shows where its probability lies, not which objective is best.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib import resources
from pathlib import Path

import torch

from taid import demo
from taid.artifacts import tables

SPLITS: dict[str, tuple[demo.Split, ...]] = {"train": ("models",), "held_out": ("validation", "test")}
ROWS = {"train": 2_400, "held_out": 120}
LINES, PROMPT, CHARACTERS = 12, 4, 900
OBJECTIVES = {"forward_kl": [], "reverse_kl": [], "taid": ["--taid_alpha", "auto"]}
TRAIN = """--use_cpu --max_steps 300 --learning_rate 2e-3 --per_device_train_batch_size 8 --max_length 384 --bf16 false
    --save_strategy no --report_to none --overwrite_output_dir""".split()
EVALUATE = "--use_cpu --generate 60 --max_new_tokens 64 --batch_size 16".split()


def rows_of(split: str) -> list[dict[str, str]]:
    """Pieces of files, the first of each, then the second of each, and so on."""
    texts, found = [text.splitlines(keepends=True) for text in demo.read(*SPLITS[split])], []
    for start in range(0, max(map(len, texts)), LINES):
        for lines in texts:
            piece = lines[start : start + LINES]
            row = {"prompt": "".join(piece[:PROMPT]), "completion": "".join(piece[PROMPT:])}
            if len(piece) == LINES and all(map(str.strip, row.values())) and sum(map(len, piece)) < CHARACTERS:
                found.append(row)
    return found[: ROWS[split]]


def taid(*arguments: str) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "taid", *arguments], check=True, env=environment, stdout=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/measures"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for split in ROWS:
        (out / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(split)))
    student, teacher = (str(resources.files("taid") / "assets" / name) for name in ("student", "teacher"))
    models = {"student before": student}
    for objective, more in OBJECTIVES.items():
        models[objective] = str(out / objective)
        pair = ["--model_name_or_path", student, "--teacher_model_name_or_path", teacher, "--objective", objective]
        data = ["--dataset_name", str(out / "train.jsonl"), "--output_dir", models[objective]]
        taid("train", *pair, *data, *TRAIN, *more)
    held_out, generations = {}, {}
    for name, model in (models | {"teacher": teacher}).items():
        output = out / f"{name.replace(' ', '_')}.json"
        data = ["--data", str(out / "held_out.jsonl"), "--output", str(output)]
        taid("evaluate", model, "--teacher", teacher, *data, *EVALUATE)
        found = json.loads(output.read_text())
        held_out[name] = found["held_out"]["teacher" if name == "teacher" else "student"]
        generations[name] = found["generations"]["student"]
    print(f"{platform.platform()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for columns, found in (
        (tables.HELD_OUT, held_out), (tables.DISTRIBUTIONS, held_out), (tables.ANSWERS, generations),
        (tables.SAMPLES, generations),
    ):  # fmt: skip
        print("\n" + tables.measures(columns, found).markdown(), end="")


if __name__ == "__main__":
    main()
