"""Measure what a cached teacher costs and loses, against the teacher itself.

    python benchmarks/teacher.py quality [--teacher DIR --student DIR] [--out runs/teacher]
    python benchmarks/teacher.py time [--rounds 3]
    python benchmarks/teacher.py epochs [--rounds 1]

quality: the demo's pair on Python's standard library, or a story teacher and its student (benchmarks/stories.py writes
the stories, here fewer). For every format: bytes
a trained token, the difference of TAID's loss and gradient from the full teacher's on one batch of the untrained
student, and the student's held-out loss and KL, both against the full teacher, after one epoch. One seed.

time: seconds of a training step, the models and rows of benchmarks/step.py, every method in turn in a fresh process:
TRL's SFT step of the student, TAIDTrainer with the local teacher, and from caches. Also how long the capture took, and
one product of the teacher's head, which is what hidden states cost beside a top k.

epochs: two epochs with the teacher asked in each, against a capture and two epochs from it, for teachers of about 4, 16
and 40 times the student; each in a fresh process, wall time of everything but loading.

Each adds its table to benchmarks/results/teacher.md.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer

from step import SIZES, STEPS, WARM_UP, _machine, _model, _tokenizer, _trained, sft
from stories import RECIPE, generate
from taid import TAIDConfig, TAIDTrainer, demo
from taid.data import loading

RESULTS = Path(__file__).parent / "results" / "teacher.md"
FORMATS: dict[str, dict[str, Any]] = {
    "local teacher": {},
    "hidden": {"teacher_cache_format": "hidden"},
    "hidden_int8": {"teacher_cache_format": "hidden_int8"},
    "top_k, k = 8": {"teacher_cache_format": "top_k", "teacher_top_k": 8},
    "top_k, k = 32": {"teacher_cache_format": "top_k", "teacher_top_k": 32},
    "top_k, k = 128": {"teacher_cache_format": "top_k", "teacher_top_k": 128},
}
# Samples fit forward KL alone, so they are compared with it.
SAMPLED: dict[str, dict[str, Any]] = {
    "forward_kl, local teacher": {"objective": "forward_kl"},
    "forward_kl, top_k, k = 32": {"objective": "forward_kl", **FORMATS["top_k, k = 32"]},
    "forward_kl, sampled, 50 draws": {
        "objective": "forward_kl",
        "teacher_cache_format": "sampled",
        "teacher_cache_samples": 50,
    },
}


# --- quality ----------------------------------------------------------------------------------------------------------


def windows(tokenizer: Any, texts: list[str], count: int, width: int = 256) -> Dataset:
    """Rows of so many tokens, the same on every call."""
    ids = [i for text in tokenizer(texts)["input_ids"] for i in [*text, tokenizer.eos_token_id]]
    starts = list(range(0, len(ids) - width + 1, width))
    random.Random(0).shuffle(starts)
    chosen = [starts[i % len(starts)] for i in range(count)]
    return Dataset.from_dict({"input_ids": [ids[start : start + width] for start in chosen]})


def quality(student: Path | None, teacher: Path | None, out: Path) -> str:
    recipe = RECIPE | {"eval_strategy": "no", "taid_alpha": "auto", "disable_tqdm": True}
    if student is None or teacher is None:
        name, command = "the demo's pair", "`python benchmarks/teacher.py quality`"
        student, teacher = (demo.ASSETS / role for role in ("student", "teacher"))
        tokenizer = AutoTokenizer.from_pretrained(teacher)
        train_rows = windows(tokenizer, demo.read("models"), 1_600)
        held_out = windows(tokenizer, demo.read("validation", "test"), 64)
        recipe |= {"per_device_train_batch_size": 8, "learning_rate": 4e-3}
    else:
        name = "the story pair"
        command = f"`python benchmarks/teacher.py quality --teacher {teacher.name} --student {student.name}`"
        rows = out / "text"
        if not (rows / "held_out.jsonl").exists():
            generate(teacher, rows)
        train_rows, held_out = (
            loading.load_rows(str(rows / f"{split}.jsonl"), config=None, split="train", text_field="text")
            for split in ("train", "held_out")
        )
    of_teacher = AutoConfig.from_pretrained(teacher)
    section = (
        f"{len(train_rows):,} rows, {len(held_out)} held out, V {of_teacher.vocab_size:,}, hidden states of "
        f"{of_teacher.hidden_size} numbers, one epoch, one seed. {_where()}"
    )

    def trainer_of(name: str, start: Path, **options: Any) -> TAIDTrainer:
        args = TAIDConfig(output_dir=str(out / name.replace(" ", "_")), **recipe | options)
        given = None if args.teacher_cache else str(teacher)
        return TAIDTrainer(str(start), given, args, train_dataset=train_rows, eval_dataset=held_out)

    lines = [
        "| teacher | bytes a token | loss, difference | gradient, difference | held-out cross-entropy | held-out KL |",
        "|---|---|---|---|---|---|",
    ]
    reference: tuple[float, torch.Tensor] | None = None
    for form, options in (FORMATS | SAMPLED).items():
        given, each = {key: value for key, value in options.items() if key == "objective"}, None
        if "local" in form:
            reference = None
        else:
            folder = out / f"cache_{form.replace(' ', '_').replace(',', '')}"
            trainer_of(form, student, **options).capture(folder)
            tokens = sum(sum(rows.values()) for rows in trainer_of(form, student, **options).rows.keys().values())
            each = sum(path.stat().st_size for path in (folder / "shards").iterdir()) / tokens
            given["teacher_cache"] = str(folder)
        trainer = trainer_of(form, student, **given)
        loss, gradient = _one_batch(trainer)
        reference = reference or (loss, gradient)
        trainer.train()
        trainer.save_model()
        full = trainer_of(f"{form} judged", out / form.replace(" ", "_")).evaluate()
        lines.append(
            f"| {form} | {'' if each is None else f'{each:,.0f}'} | {abs(loss - reference[0]) / reference[0]:.1e} | "
            f"{((gradient - reference[1]).norm() / reference[1].norm()).item():.1e} | "
            f"{full['eval_cross_entropy']:.4f} | {full['eval_kl']:.4f} |"
        )
        print(lines[-1], file=sys.stderr)
    return "\n".join([f"## What a cache loses: {name}", "", section, "", *lines, "", command, ""])


def _one_batch(trainer: TAIDTrainer) -> tuple[float, torch.Tensor]:
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    count = (batch["labels"][:, 1:] != -100).sum()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
    gradients = torch.autograd.grad(loss, list(trainer.model.parameters()))
    trainer._totals.clear()
    return loss.item(), torch.cat([g.flatten() for g in gradients])


# --- time -------------------------------------------------------------------------------------------------------------

METHODS = ("sft", "local teacher", "hidden", "top_k, k = 32")
# Times the student's parameters, input embeddings apart, which cost nothing: (width, layers) of the teacher.
TEACHERS = {"4": (512, 4), "16": (1024, 5), "42": (1344, 8)}
SMALL = {"rows": 8, "length": 256, "V": 8_000, "student": (256, 3)}
STEPS_PER_EPOCH = 4


def timed(method: str, folder: str, ratio: str | None = None) -> dict[str, Any]:
    """Seconds of a step and of its capture; with a ratio, of two epochs and the capture in all."""
    size: dict[str, Any] = SMALL | {"teacher": TEACHERS[ratio]} if ratio else SIZES["cpu"]
    steps = STEPS_PER_EPOCH if ratio else STEPS + WARM_UP
    torch.manual_seed(0)
    student, tokenizer = _model(size["V"], *size["student"], "float32"), _tokenizer(size["V"])
    teacher = _model(size["V"], *size["teacher"], "float32").eval()
    ids = torch.randint(1, size["V"], (size["rows"] * steps, size["length"])).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    options = {
        "output_dir": f"{folder}/run", "max_steps": 2 * steps if ratio else steps,
        "per_device_train_batch_size": size["rows"],
        "bf16": False, "learning_rate": 1e-5, "logging_steps": STEPS, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "max_length": None, "optim": "adamw_torch",
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }  # fmt: skip
    if method == "sft":
        seconds = sft(student, None, rows, tokenizer, options | {"gradient_checkpointing": False})
        return _summed(seconds, 0.0, steps, ratio)

    def trainer(**more: Any) -> TAIDTrainer:
        args = TAIDConfig(**options | {"activation_checkpointing": False} | more)
        given = None if args.teacher_cache else teacher
        return TAIDTrainer(student, given, args, train_dataset=rows, processing_class=tokenizer,
                           teacher_processing_class=tokenizer)  # fmt: skip

    if method == "local teacher":
        return _summed(_trained(trainer()), 0.0, steps, ratio) | {"head": _head_product(size, teacher)}
    start = time.perf_counter()
    trainer(**FORMATS[method]).capture(Path(folder) / "cache")
    captured = time.perf_counter() - start
    student = _model(size["V"], *size["student"], "float32")  # the other's head is watched by the capture's trainer
    del teacher
    teacher = None
    seconds = _trained(trainer(teacher_cache=f"{folder}/cache"))
    return _summed(seconds, captured, steps, ratio)


def _summed(seconds: list[float], captured: float, steps: int, ratio: str | None) -> dict[str, Any]:
    if ratio:
        return {"seconds": sum(seconds) + captured, "capture": captured}
    return {"seconds": statistics.median(seconds[WARM_UP:])} | ({"capture": captured / steps} if captured else {})


@torch.no_grad()
def _head_product(size: dict[str, Any], teacher: Any) -> float:
    hidden = torch.randn(size["rows"] * size["length"], size["teacher"][0])
    weight, seconds = teacher.get_output_embeddings().weight, []
    out = torch.empty(len(hidden), len(weight))
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(hidden, weight.t(), out=out)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _in_a_process(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        sys.exit(f"{arguments} failed:\n{done.stderr[-3000:]}")
    print(*arguments, found[0], file=sys.stderr)
    return dict(json.loads(found[0].removeprefix("RESULT ")))


def epochs_table(rounds: int) -> str:
    lines = [
        "| teacher | asked in each epoch, s | captured once, `hidden`, s | `top_k`, k = 32, s | captures, s |",
        "|---|---|---|---|---|",
    ]
    raw = {}
    for ratio in TEACHERS:
        runs = {method: [_in_a_process("epochs", "--method", method, "--ratio", ratio) for _ in range(rounds)]
                for method in METHODS[1:]}  # fmt: skip
        raw[ratio] = runs
        online, hidden, top_k = (statistics.median(run["seconds"] for run in runs[method]) for method in METHODS[1:])
        captured = [statistics.median(run["capture"] for run in runs[method]) for method in METHODS[2:]]
        lines.append(
            f"| {ratio} x the student | {online:.1f} | {hidden:.1f} ({hidden / online:.2f} x) | "
            f"{top_k:.1f} ({top_k / online:.2f} x) | {captured[0]:.1f}, {captured[1]:.1f} |"
        )
    about = (
        f"{STEPS_PER_EPOCH} steps an epoch of {SMALL['rows']} rows of {SMALL['length']} tokens, V {SMALL['V']:,}, "
        f"student (width, layers) {SMALL['student']}, teachers {', '.join(map(str, TEACHERS.values()))}, float32; "
        f"medians of {rounds} rounds. {_where()}"
    )
    command = f"`python benchmarks/teacher.py epochs --rounds {rounds}`"
    return "\n".join(["## Two epochs", "", about, "", *lines, "", command, "", f"<!-- {json.dumps(raw)} -->", ""])


def time_table(rounds: int) -> str:
    results: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for _ in range(rounds):
        for method in METHODS:
            results[method].append(_in_a_process("time", "--method", method))
    lines = ["| a training step | s | x SFT | capture, s a step |", "|---|---|---|---|"]
    for method, runs in results.items():
        ratio = statistics.median(
            run["seconds"] / base["seconds"] for run, base in zip(runs, results["sft"], strict=True)
        )
        captured = f"{statistics.median(run['capture'] for run in runs):.2f}" if "capture" in runs[0] else ""
        words = "TRL's SFTTrainer" if method == "sft" else f"TAIDTrainer, {method}"
        lines.append(f"| {words} | {statistics.median(r['seconds'] for r in runs):.2f} | {ratio:.3f} | {captured} |")
    pairs = list(zip(results["hidden"], results["top_k, k = 32"], results["local teacher"], strict=True))
    more = statistics.median((hidden["seconds"] - top["seconds"]) / local["head"] for hidden, top, local in pairs)
    head = statistics.median(run["head"] for run in results["local teacher"])
    lines += [
        "",
        f"The teacher's head product takes {head:.2f} s; hidden states take {more:.2f} of it more than top k.",
    ]
    size = SIZES["cpu"]
    about = (
        f"{size['rows']} rows of {size['length']} tokens, V {size['V']:,}, student (width, layers) {size['student']}, "
        f"teacher {size['teacher']}, float32; medians of {rounds} rounds in turn, {STEPS} steps each. {_where()}"
    )
    command = f"`python benchmarks/teacher.py time --rounds {rounds}`"
    raw = f"<!-- {json.dumps(results)} -->"
    return "\n".join(["## What a step takes", "", about, "", *lines, "", command, "", raw, ""])


def _where() -> str:
    return f"{_machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}."


def _write(section: str) -> None:
    """Put a section in the place of the old one of its title."""
    title = section.splitlines()[0]
    text = RESULTS.read_text() if RESULTS.exists() else "# A cached teacher\n\n"
    parts = text.split("\n## ")
    kept = [part for part in parts[1:] if not part.startswith(title.removeprefix("## "))]
    RESULTS.write_text("\n## ".join([parts[0].rstrip() + "\n", *kept, section.removeprefix("## ")]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_quality = commands.add_parser("quality")
    of_quality.add_argument("--teacher", type=Path)
    of_quality.add_argument("--student", type=Path)
    of_quality.add_argument("--out", type=Path, default=Path("runs/teacher"))
    of_time = commands.add_parser("time")
    of_time.add_argument("--rounds", type=int, default=3)
    of_epochs = commands.add_parser("epochs")
    of_epochs.add_argument("--rounds", type=int, default=1)
    of_epochs.add_argument("--ratio", choices=TEACHERS, help=argparse.SUPPRESS)
    for command in (of_time, of_epochs):
        command.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.command != "quality" and arguments.method:
        with tempfile.TemporaryDirectory() as folder:
            print("RESULT " + json.dumps(timed(arguments.method, folder, getattr(arguments, "ratio", None))))
        return
    if arguments.command == "time":
        section = time_table(arguments.rounds)
    elif arguments.command == "epochs":
        section = epochs_table(arguments.rounds)
    else:
        section = quality(arguments.student, arguments.teacher, arguments.out)
    _write(section)
    print(section)


if __name__ == "__main__":
    main()
