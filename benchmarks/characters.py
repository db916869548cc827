"""A vision-language pair that really reads: handwritten characters to their names.

    python benchmarks/characters.py --images omniglot_small.zip --out runs/characters

1. Rows: pictures of Latin and Greek letters by twenty writers, sixteen of them for training (each letter drawn anew a
   few times, turned, moved and stretched a little), four held out. To "Which?" the answer is "γ".
2. `teacher` and `start`: an InternVL of 1.7 M weights trained on the labels, and one of 0.3 M that is stopped early.
3. From that start: SFT, forward KL and TAID, on the same rows in the same order.
4. Held out, each of them with its images, with those of other rows in their place, and without any: cross-entropy of
   the answer in nats a token, KL to the teacher, and how many answers greedy decoding gets right.

One seed: this shows that the pair is trained on what it sees, not which objective is best. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image as Pixels
from PIL import ImageOps

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import torchvision_cpu  # noqa: F401  # before transformers looks for it

# isort: split
from datasets import Dataset
from transformers import AutoModelForImageTextToText, PrinterCallback

from taid import TAIDConfig, TAIDTrainer
from vision_models import make_processor, make_vision_model

NAMES = {"Latin": "abcdefghijklmnopqrstuvwxyz", "Greek": "αβγδεζηθικλμνξοπρστυφχψω"}
SIDE, DRAWN_ANEW, WRITERS_HELD_OUT = 24, 8, 4
QUESTION = [{"role": "user", "content": "Which?"}]
SHAPES = {
    "teacher": {"hidden_size": 96, "layers": 3, "vision_size": 96, "vision_layers": 3},
    "start": {"hidden_size": 48, "layers": 2, "vision_size": 48, "vision_layers": 2},
}
METHODS = {"SFT": {"objective": "sft"}, "forward KL": {"objective": "forward_kl"}, "TAID": {"objective": "taid"}}
RECIPE: dict[str, Any] = {
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 100,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 50,
    "taid_alpha": "auto",
    "max_length": None,
    "bf16": False,
    "activation_checkpointing": False,
    "logging_steps": 20,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


def drawings(archive: Path) -> tuple[Dataset, dict[str, Dataset]]:
    """Rows to train on, and the held-out ones with their own images, with others', and without."""
    chosen = random.Random(0)
    train, held_out = [], []
    with zipfile.ZipFile(archive) as files:
        for path in sorted(name for name in files.namelist() if name.endswith(".png")):
            alphabet, character, drawing = path.split("/")[-3:]
            if alphabet not in NAMES:
                continue
            ink = ImageOps.invert(Pixels.open(io.BytesIO(files.read(path))).convert("L"))
            name = NAMES[alphabet][int(character.removeprefix("character")) - 1]
            if int(drawing.split("_")[1].removesuffix(".png")) > 20 - WRITERS_HELD_OUT:
                held_out.append(row(ink, name))
            else:
                train += [row(redrawn(ink, chosen), name) for _ in range(DRAWN_ANEW)]
    chosen.shuffle(train)
    shifted = [held_out[(i + 37) % len(held_out)]["images"] for i in range(len(held_out))]  # of another letter, always
    sets = {
        "own": held_out,
        "others": [r | {"images": image} for r, image in zip(held_out, shifted, strict=True)],
        "none": [r | {"images": []} for r in held_out],
    }
    return Dataset.from_list(train), {name: Dataset.from_list(rows) for name, rows in sets.items()}


def redrawn(ink: Pixels.Image, chosen: random.Random) -> Pixels.Image:
    """Turned, sheared, stretched and moved a little."""
    a, d = (chosen.uniform(0.85, 1.15) for _ in range(2))
    b, c = (chosen.uniform(-0.2, 0.2) for _ in range(2))
    x, y = (chosen.uniform(-6, 6) for _ in range(2))
    middle = 52.5
    shift = (middle - a * middle - b * middle + x, middle - c * middle - d * middle + y)
    return ink.transform(
        ink.size, Pixels.Transform.AFFINE, (a, b, shift[0], c, d, shift[1]), Pixels.Resampling.BILINEAR
    )


def row(ink: Pixels.Image, name: str) -> dict[str, Any]:
    image = ink.resize((SIDE, SIDE), Pixels.Resampling.BOX).convert("RGB")
    return {"images": [image], "prompt": QUESTION, "completion": [{"role": "assistant", "content": name}]}


def train(folder: Path, model: Any, teacher: Any, processor: Any, rows: Dataset, **options: Any) -> TAIDTrainer:
    """Train and save, or take what an earlier call has saved."""
    done = (folder / "config.json").exists()
    model = AutoModelForImageTextToText.from_pretrained(folder) if done else model
    trainer = TAIDTrainer(
        model, teacher, TAIDConfig(output_dir=str(folder), **(RECIPE | options)), train_dataset=rows,
        processing_class=processor, teacher_processing_class=processor if teacher is not None else None,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    if not done:
        trainer.train()
        trainer.save_model()
    return trainer


@torch.no_grad()
def right(trainer: TAIDTrainer, rows: Dataset) -> float:
    """The share of answers that greedy decoding gets right: those of which every token is the likeliest."""
    trainer.model.eval()
    hits = []
    for start in range(0, len(rows), 100):
        batch = trainer.data_collator([rows[i] for i in range(start, min(start + 100, len(rows)))])
        labels = batch.pop("labels")[:, 1:]
        likeliest = trainer.model(**batch).logits[:, :-1].argmax(-1)
        hits += ((likeliest == labels) | (labels == -100)).all(1).tolist()
    return sum(hits) / len(hits)


def measured(trainer: TAIDTrainer, held_out: dict[str, Dataset]) -> dict[str, float]:
    values: dict[str, float] = {}
    for name, rows in held_out.items():
        metrics = trainer.evaluate(rows, metric_key_prefix=f"eval_{name}")
        values[f"{name}_cross_entropy"] = metrics[f"eval_{name}_cross_entropy"]
        if f"eval_{name}_kl" in metrics:
            values[f"{name}_kl"] = metrics[f"eval_{name}_kl"]
        values[f"{name}_right"] = right(trainer, rows)
    return values


def table(results: dict[str, dict[str, float]]) -> str:
    lines = [
        "| held out | nats a token | with others' images | without | KL to the teacher | right | others' | without |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, of in results.items():
        cells = [f"{of[f'{images}_cross_entropy']:.3f}" for images in ("own", "others", "none")]
        cells += [f"{of['own_kl']:.3f}" if "own_kl" in of else ""]
        cells += [f"{of[f'{images}_right']:.1%}" for images in ("own", "others", "none")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="omniglot_small.zip")
    parser.add_argument("--out", type=Path, default=Path("runs/characters"))
    parser.add_argument("--teacher_epochs", type=float, default=15)
    parser.add_argument("--start_epochs", type=float, default=4)
    parser.add_argument("--epochs", type=float, default=8)
    options = parser.parse_args()

    processor = make_processor("internvl", tokens=300, size=SIDE, tiles=1)
    rows, held_out = drawings(options.images)
    results, models = {}, {}
    for name, epochs in (("teacher", options.teacher_epochs), ("start", options.start_epochs)):
        model = make_vision_model("internvl", processor, size=SIDE, spread=0.06, **SHAPES[name])
        trainer = train(
            options.out / name, model, None, processor, rows, objective="sft", num_train_epochs=epochs,
            **({"lr_scheduler_type": "constant_with_warmup"} if name == "start" else {}),
        )  # fmt: skip
        weights = sum(weight.numel() for weight in trainer.model.parameters())
        models[name] = trainer
        results[f"{name}, {weights / 1e6:.2f} M weights"] = measured(trainer, held_out)
        print(table(results), file=sys.stderr)
    for name, method in METHODS.items():
        start = AutoModelForImageTextToText.from_pretrained(options.out / "start")
        teacher = AutoModelForImageTextToText.from_pretrained(options.out / "teacher")
        folder = options.out / name.lower().replace(" ", "_")
        trainer = train(folder, start, teacher, processor, rows, num_train_epochs=options.epochs, **method)
        results[name] = measured(trainer, held_out)
        print(table(results), file=sys.stderr)
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"{len(rows):,} rows to train on, {len(held_out['own'])} held out\n\n{table(results)}")


if __name__ == "__main__":
    main()
