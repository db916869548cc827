"""Pairs of models from real books and instructions: teachers of four sizes, and a student that has read a little.

    python benchmarks/evidence/models.py --books DIR --instructions FILE.jsonl --out runs/evidence/models

One byte-level BPE for all; passages of the books, of which one in 50 is kept to choose by and one to test on. Teachers
read TAUGHT of them once, the student the first READ; nothing that they have read is distilled on. The largest teacher
then learns to answer (`instructed`). What is there already is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks
from stories import write_rows

VOCABULARY, PASSAGE = 1_024, 500  # entries; characters
TAUGHT, READ, DISTILLED, HELD_OUT = 32_000, 4_096, 8_192, 256  # passages
ANSWERED, MOST_CHARACTERS = 3_072, 500  # instructions for the teacher, and how long both sides of one may be
# Width, layers, width of the MLP, heads.
SIZES = {
    "student": (64, 3, 176, 4),
    "teacher_0.2M": (64, 3, 176, 4),
    "teacher_0.5M": (96, 4, 256, 6),
    "teacher_1M": (128, 5, 352, 8),
    "teacher_3M": (224, 5, 608, 8),
}
RATES = {"teacher_1M": 1.5e-3, "teacher_3M": 1e-3}  # with that of TRAINING they end behind a teacher of 0.5 M
TRAINING = {
    "objective": "sft", "num_train_epochs": 1, "per_device_train_batch_size": 32, "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine", "warmup_steps": 50, "max_length": 128, "bf16": False, "logging_steps": 50,
    "activation_checkpointing": False, "save_strategy": "no", "report_to": "none", "use_cpu": True,
    "per_device_eval_batch_size": 32,
}  # fmt: skip


def passages(book: Path) -> list[str]:
    """A book in pieces of about PASSAGE characters, cut where a paragraph or at least a word ends."""
    text, found, start = book.read_text(encoding="utf-8"), [], 0
    while start + PASSAGE < len(text):
        ends = [text.rfind(mark, start + PASSAGE // 2, start + PASSAGE) for mark in ("\n\n", "\n", " ")]
        end = next((end for end in ends if end > 0), start + PASSAGE)
        found.append(text[start:end].strip())
        start = end
    return [passage for passage in found if len(passage) > PASSAGE // 3]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_books(books: Path, out: Path) -> None:
    kept: dict[int, list[str]] = {7: [], 32: []}
    rest: list[str] = []
    for book in sorted(books.glob("*.txt")):
        for number, passage in enumerate(passages(book)):
            kept.get(number % 50, rest).append(passage)
    parts = {"validation": kept[7], "test": kept[32], "taught": rest}
    for rows in parts.values():
        random.Random(0).shuffle(rows)
    parts = {name: rows[:HELD_OUT] for name, rows in parts.items()} | {
        "taught": rest[:TAUGHT], "read": rest[:READ], "train": rest[TAUGHT : TAUGHT + DISTILLED],
    }  # fmt: skip
    for name, rows in parts.items():
        write_rows(out / f"{name}.jsonl", [{"text": passage} for passage in rows])


def split_instructions(file: Path, parts: dict[Path, int], most: int) -> None:
    """Instructions of which both sides have at the most so many characters, shuffled, so many to each file."""
    rows = [row for row in read_rows(file) if len(row["prompt"]) + len(row["completion"]) <= most]
    random.Random(0).shuffle(rows)
    start = 0
    for path, number in parts.items():
        write_rows(path, rows[start : start + number])
        start += number


def new(folder: Path, shape: tuple[int, int, int, int], texts: Path) -> None:
    """A model that has read nothing, with the tokenizer of all."""
    old = AutoTokenizer.from_pretrained(str(resources.files("taid") / "assets" / "teacher"))
    tokenizer = old.train_new_from_iterator((row["text"] for row in read_rows(texts)), VOCABULARY)
    width, layers, inner, heads = shape
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, intermediate_size=inner,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    print(f"{folder.name}: {model.num_parameters():,} weights", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(model: Path, rows: Path, validation: Path, folder: Path, **options: Any) -> None:
    recipe = TRAINING | options | {
        "model_name_or_path": str(model), "dataset_name": str(rows), "eval_dataset_name": str(validation),
    }  # fmt: skip
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    command = [sys.executable, "-m", "taid", "train", "--config", str(path), "--output_dir", str(folder)]
    subprocess.run([*command, "--overwrite_output_dir"], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True, help="a folder of .txt files")
    parser.add_argument("--instructions", type=Path, help="a JSONL file with `prompt` and `completion`")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence/models"))
    parser.add_argument("--only", default=",".join(SIZES), help="which of %(default)s (default: all)")
    options = parser.parse_args()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "train.jsonl").exists():
        read_books(options.books, out)
    for name in options.only.split(","):
        if (out / name / "model.safetensors").exists():
            continue
        if not (out / "new" / name / "model.safetensors").exists():
            new(out / "new" / name, SIZES[name], out / "read.jsonl")
        more = {"per_device_train_batch_size": 16} if name == "student" else {}
        more |= {"learning_rate": RATES[name]} if name in RATES else {}
        rows = out / ("read.jsonl" if name == "student" else "taught.jsonl")
        train(out / "new" / name, rows, out / "validation.jsonl", out / name, **more)
    if options.instructions and not (out / "instructed" / "model.safetensors").exists():
        if not (out / "instructions_test.jsonl").exists():
            sizes = {"validation": HELD_OUT, "test": HELD_OUT, "taught": ANSWERED}
            parts = {out / f"instructions_{name}.jsonl": number for name, number in sizes.items()}
            split_instructions(options.instructions, parts, MOST_CHARACTERS)
        rows, held_out = out / "instructions_taught.jsonl", out / "instructions_validation.jsonl"
        largest = [name for name in SIZES if (out / name / "model.safetensors").exists()][-1]
        train(out / largest, rows, held_out, out / "instructed", learning_rate=1e-3, max_length=256)


if __name__ == "__main__":
    main()
