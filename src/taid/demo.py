"""``taid demo``: a real distillation in minutes, on nothing that has to be downloaded.

A teacher of 2.6 M weights teaches a student of 0.4 M on the source of the running Python's standard library
(:mod:`taid.stdlib_text`), three times from the same start and on the same batches: plain fine-tuning, forward KL, TAID.
Both models come with the package; ``scripts/train_demo_models.py`` made them. Nothing was tuned on the held-out part.
"""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from rich.console import Console
from rich.table import Table

from taid import stdlib_text
from taid.artifacts import report, run_folder
from taid.artifacts.plots import BLUE, GREEN, INK, MUTED, Line, Plot, draw, panels, png_of
from taid.config.training import TAIDConfig
from taid.losses.objective_table import ObjectiveName
from taid.models.loading import load_model, load_tokenizer
from taid.training.callbacks import StepProgress
from taid.training.trainer import TAIDTrainer

METHODS: dict[ObjectiveName, str] = {"sft": "SFT", "forward_kl": "forward KL", "taid": "TAID"}
WINDOW = 256  # tokens a row
BATCH = 8  # rows a step
HELD_OUT_ROWS = 64
STEPS = 150
LEARNING_RATE = 4e-3  # the same for all; chosen on the validation split by scripts/tune_demo.py
COLUMNS = ("nats/token", "bits/byte", "KL to teacher", "gap closed", "seconds")
PROMPT = 'def read(self, size=-1):\n    """'


@dataclass(frozen=True)
class Result:
    """One line of the demo's table; nats a token, and bits a byte of the held-out text."""

    name: str
    cross_entropy: float
    bits_per_byte: float
    kl: float
    gap_closed: float | None
    seconds: float | None
    completion: str


def run(
    output_dir: Path,
    *,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    evaluate_on: stdlib_text.Split = "held_out",
) -> list[Result]:
    """Distil with each method, print the table, and write ``report.html``, PNGs and a run folder a method.

    Raises:
        ValueError: `output_dir` holds something that is no demo, or `steps` is no positive number.
    """
    if steps < 1:
        raise ValueError(f"--steps must be at least 1, got {steps}")
    if output_dir.exists() and any(output_dir.iterdir()) and not (output_dir / "results.json").exists():
        raise ValueError(f"output_dir {output_dir} holds files that are no demo: choose another folder")
    console, start = Console(), time.perf_counter()
    with run_folder.claimed(output_dir):
        (output_dir / "results.json").write_text("[]\n")  # marks the folder as a demo's, whatever happens next
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        logging.getLogger("taid").setLevel(logging.ERROR)
        assets = Path(str(resources.files("taid") / "assets"))
        tokenizer = load_tokenizer(str(assets / "teacher"), role="teacher")
        rows = {
            "train": _windows(tokenizer, "train", steps * BATCH),
            "held_out": _windows(tokenizer, evaluate_on, HELD_OUT_ROWS),
        }
        console.print(
            f"Real text: this Python's standard library, {steps * BATCH * WINDOW:,} tokens to learn from and "
            f"{len(rows['held_out']) * WINDOW:,} held out, of other modules.\n"
        )
        bits = _bits_per_byte(tokenizer, rows["held_out"]["input_ids"])
        teacher = load_model(str(assets / "teacher"), role="teacher", dtype=torch.float32)
        results: list[Result] = []
        for objective, name in METHODS.items():
            console.print(f"[bold]{name}[/bold]")
            student = load_model(str(assets / "student"), role="student", dtype=torch.float32)
            if not results:
                untrained = _complete(student, tokenizer)
            metrics, seconds = _distil(
                student, teacher, tokenizer, rows, _config(output_dir / objective, objective, steps, learning_rate)
            )
            first, last = metrics[0], metrics[-1]
            gap = first["eval_cross_entropy"] - first["eval_teacher_cross_entropy"]
            if not results:
                results.append(_result("student before", first, bits, None, None, untrained))
            closed = (first["eval_cross_entropy"] - last["eval_cross_entropy"]) / gap
            results.append(_result(name, last, bits, closed, seconds, _complete(student, tokenizer)))
        teacher_row = {"eval_cross_entropy": first["eval_teacher_cross_entropy"], "eval_kl": 0.0}
        results.append(_result("teacher", teacher_row, bits, None, None, _complete(teacher, tokenizer)))
        _show(console, results)
        page = _write(output_dir, results)
    console.print(f"\n{verdict(results)}\n\n{time.perf_counter() - start:.0f} s. Report: {page}")
    return results


def verdict(results: list[Result]) -> str:
    """What happened, with the figures, whoever won."""
    trained = sorted((r for r in results if r.gap_closed is not None), key=lambda r: r.cross_entropy)
    shares = ", ".join(f"{result.name} {result.gap_closed:.0%}" for result in trained)
    sentence = f"Of the gap between student and teacher on held-out text, {shares} was closed."
    if trained[0].name != "TAID":
        behind = next(r.cross_entropy for r in trained if r.name == "TAID") - trained[0].cross_entropy
        close = " by less than one seed can tell" if behind < 0.02 else ""
        sentence += f" TAID did not win this one: {trained[0].name} is ahead{close}, {behind:.3f} nats."
    return sentence


def _windows(tokenizer: Any, split: stdlib_text.Split, count: int) -> Dataset:
    """`count` rows of WINDOW tokens, the same on every call."""
    encoded = tokenizer(stdlib_text.read(split))["input_ids"]
    ids = [i for text in encoded for i in [*text, tokenizer.eos_token_id]]
    starts = list(range(0, len(ids) - WINDOW + 1, WINDOW))
    random.Random(0).shuffle(starts)
    chosen = [starts[i % len(starts)] for i in range(count)]
    return Dataset.from_dict({"input_ids": [ids[start : start + WINDOW] for start in chosen]})


def _config(folder: Path, objective: ObjectiveName, steps: int, learning_rate: float) -> TAIDConfig:
    return TAIDConfig(
        output_dir=str(folder), objective=objective, taid_alpha="auto", max_steps=steps, max_length=WINDOW,
        per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH, learning_rate=learning_rate,
        lr_scheduler_type="cosine", warmup_steps=min(10, steps // 10), bf16=False, activation_checkpointing=False,
        logging_steps=max(1, steps // 50), eval_strategy="steps", eval_steps=math.ceil(steps / 3), eval_on_start=True,
        save_strategy="no", report_to="none", use_cpu=True, seed=0, disable_tqdm=not sys.stderr.isatty(),
    )  # fmt: skip


def _distil(
    student: Any, teacher: Any, tokenizer: Any, rows: dict[str, Dataset], args: TAIDConfig
) -> tuple[list[dict[str, Any]], float]:
    """One run; returns its held-out rows of metrics and its seconds of training."""
    folder = Path(str(args.output_dir))
    shutil.rmtree(folder, ignore_errors=True)
    trainer = TAIDTrainer(
        student, teacher, args, train_dataset=rows["train"], eval_dataset=rows["held_out"],
        processing_class=tokenizer, teacher_processing_class=tokenizer,
    )  # fmt: skip
    for callback in (transformers.ProgressCallback, transformers.PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(StepProgress)
    trainer.train()
    trainer.save_model()
    report.write_report(folder)
    metrics = run_folder.read_metrics(folder)
    return [row for row in metrics if "eval_kl" in row], [row for row in metrics if "seconds" in row][-1]["seconds"]


def _bits_per_byte(tokenizer: Any, rows: list[list[int]]) -> float:
    """Bits a byte that one nat a token is worth: in a byte-level vocabulary each character of a token is one byte."""
    trained = [i for row in rows for i in row[1:]]
    length = {i: len(token) for token, i in tokenizer.get_vocab().items()}
    length[tokenizer.eos_token_id] = 0
    return len(trained) / sum(length[i] for i in trained) / math.log(2)


def _result(
    name: str, row: dict[str, Any], bits: float, closed: float | None, seconds: float | None, completion: str
) -> Result:
    cross_entropy = row["eval_cross_entropy"]
    return Result(name, cross_entropy, cross_entropy * bits, row["eval_kl"], closed, seconds, completion)


@torch.no_grad()
def _complete(model: Any, tokenizer: Any) -> str:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.eval().generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def _show(console: Console, results: list[Result]) -> None:
    table = Table(title="Held out: modules that neither model was trained on", title_justify="left")
    table.add_column("")
    for heading in COLUMNS:
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(result.name, *_cells(result))
    console.print(table)
    console.print(f"\nAfter {PROMPT!r}, each goes on (greedily):")
    for result in results:
        console.print(f"  {result.name:15} {result.completion!r}", markup=False, highlight=False, soft_wrap=True)


def _cells(result: Result) -> list[str]:
    return [
        f"{result.cross_entropy:.3f}",
        f"{result.bits_per_byte:.3f}",
        f"{result.kl:.3f}",
        "" if result.gap_closed is None else f"{result.gap_closed:.0%}",
        "" if result.seconds is None else f"{result.seconds:.0f}",
    ]


def _write(output_dir: Path, results: list[Result]) -> Path:
    """Write results.json, held_out.png, t.png and the page that shows them; return the page."""
    pictures = [_plot_held_out(output_dir, results[-1].cross_entropy)]
    t_png = output_dir / "taid" / "t.png"
    if t_png.exists():
        caption = "In the run of TAID. Dashed: the linear floor."
        pictures.append(
            Plot("t: 0 is the student, 1 the teacher", "t over the steps.", caption, t_png.read_bytes(), "t.png")
        )
    for picture in pictures:
        run_folder.write_atomically(output_dir / str(picture.file), picture.png)
    page = report.render(
        "demo.html.j2",
        opening=verdict(results),
        columns=COLUMNS,
        rows=[(result.name, _cells(result)) for result in results],
        plots=pictures,
        prompt=PROMPT,
        completions=[(result.name, result.completion) for result in results],
        links=[(name, f"{objective}/report.html") for objective, name in METHODS.items()],
    )
    run_folder.write_atomically(output_dir / "report.html", page)
    run_folder.write_atomically(
        output_dir / "results.json", json.dumps([asdict(result) for result in results], indent=2) + "\n"
    )
    return output_dir / "report.html"


def _plot_held_out(output_dir: Path, teacher: float) -> Plot:
    curves, colours = {}, (MUTED, GREEN, BLUE)
    for objective, name in METHODS.items():
        rows = [row for row in run_folder.read_metrics(output_dir / objective) if "eval_kl" in row]
        curves[name] = [(row["step"], row["eval_cross_entropy"]) for row in rows]
    last_step = max(step for series in curves.values() for step, _ in series)
    figure, (axes,) = panels(["held-out cross-entropy\nnats per token"], last_step)
    lines = [Line(series, colour, name) for (name, series), colour in zip(curves.items(), colours, strict=True)]
    lines.append(Line([(0, teacher), (last_step, teacher)], INK, "teacher", dashed=True))
    draw(axes, lines, smooth=False)
    alt = "; ".join(f"{name} falls from {series[0][1]:.3f} to {series[-1][1]:.3f}" for name, series in curves.items())
    return Plot("Held-out loss", f"Held-out cross-entropy over the steps: {alt}.", "", png_of(figure), "held_out.png")
