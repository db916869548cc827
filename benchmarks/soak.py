"""Does anything grow in a long run? Memory, file handles, threads, Python objects and the time of a step.

    python benchmarks/soak.py [--steps 10000] [--runs rows cache stream] [--logging_steps 10] [--out runs/soak]

A tiny pair is trained by `taid train` for so many steps of 4 rows, with a log every 10 steps, an evaluation and a
checkpoint every 500, of which two are kept: from a file of rows, from a cache of the teacher, and from a stream. Each
run is a process of its own, into which nothing is put but a callback that looks every 100 steps. A line is fitted to
what it saw from a tenth of the run on: the table has the growth in 1,000 steps, with the standard error of the fit,
and the last tenth of the run against the second.

A step is measured in seconds of the processor, as others use the machine; seconds of the clock stand beside them.

The table goes to benchmarks/results/soak.md, what was seen to OUT/RUN.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from stories import write_rows

RESULTS = Path(__file__).parent / "results" / "soak.md"
EVERY = 100
PAIR = {
    "ids": 320, "student": (32, 2), "teacher": (48, 2), "rows": 2_000, "held_out": 64, "characters": (20, 60),
}  # fmt: skip
RECIPE = {
    "per_device_train_batch_size": 4, "per_device_eval_batch_size": 16, "learning_rate": 1e-3, "optim": "adamw_torch",
    "max_length": 48, "bf16": False, "activation_checkpointing": False, "logging_steps": 10, "eval_strategy": "steps",
    "eval_steps": 500, "save_strategy": "steps", "save_steps": 500, "save_total_limit": 2, "report_to": "none",
    "use_cpu": True,
}  # fmt: skip
RUNS = {
    "rows": [], "cache": ["--teacher_cache", "{out}/teacher_cache"], "stream": ["--streaming"],
}  # fmt: skip
SEEN = {
    "own": "own memory, MB", "handles": "file handles", "threads": "threads",
    "objects": "objects that Python's collector tracks", "blocks": "blocks of Python's memory",
    "cpu": "a step, ms of the processor", "all_cpu": "and its share of logs, evaluations, checkpoints",
    "clock": "a step, ms of the clock",
}  # fmt: skip


# --- in the process of a run ------------------------------------------------------------------------------------------


def watched(out: Path, arguments: list[str]) -> int:
    """`taid` with these arguments, and a callback that writes what it sees to `out`."""
    from transformers import TrainerCallback, trainer

    from taid.cli import main as cli

    class Watch(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.steps: list[tuple[float, float]] = []
            self.seen: list[dict[str, float]] = []

        def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            if state.global_step % EVERY == 0:  # and what the step before asked for is done
                if self.steps:
                    self.seen.append(self.look() | {"step": state.global_step})
                self.steps, self.window = [], time.process_time()
            self.cpu, self.clock = time.process_time(), time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.steps.append((time.process_time() - self.cpu, time.perf_counter() - self.clock))

        def look(self) -> dict[str, float]:
            everything = time.process_time() - self.window
            cpu, clock = (1e3 * statistics.median(column) for column in zip(*self.steps, strict=True))
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            return {
                "own": int(status["RssAnon"].split()[0]) / 1e3 * 1.024, "handles": len(os.listdir("/proc/self/fd")),
                "threads": int(status["Threads"]), "objects": len(gc.get_objects()), "blocks": sys.getallocatedblocks(),
                "cpu": cpu, "all_cpu": 1e3 * everything / len(self.steps), "clock": clock,
            }  # fmt: skip

        def on_train_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            history = state.log_history
            held = sum(sys.getsizeof(row) + sum(map(sys.getsizeof, row.values())) for row in history)
            written = len(json.dumps(history))
            out.write_text(json.dumps({"seen": self.seen, "rows": len(history), "held": held, "written": written}))

    trainer.DEFAULT_CALLBACKS.append(Watch)
    return cli.main(arguments)


# --- the whole --------------------------------------------------------------------------------------------------------


def write_pair(
    folder: Path, *, ids: int, student: tuple[int, int], teacher: tuple[int, int], rows: int, held_out: int,
    characters: tuple[int, int],
) -> dict[str, str]:  # fmt: skip
    """Random models of (width, layers), a token a character, and rows; the options that name them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from taid.planning.recipe import make_tokenizer

    draw, end = random.Random(0), ids - 1
    tokenizer = make_tokenizer(ordinary=end, special=["<eos>"], eos_token="<eos>", pad_token="<eos>")
    for name, (width, layers) in (("student", student), ("teacher", teacher)):
        torch.manual_seed(width)
        config = LlamaConfig(
            vocab_size=ids, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=4, initializer_range=0.2, bos_token_id=None, eos_token_id=end, pad_token_id=end,
        )  # fmt: skip
        for part in (LlamaForCausalLM(config), tokenizer):
            part.save_pretrained(folder / name)
    options = {"model_name_or_path": str(folder / "student"), "teacher_model_name_or_path": str(folder / "teacher")}
    for option, number in (("dataset_name", rows), ("eval_dataset_name", held_out)):
        if number:
            texts = ("".join(draw.choices("etaoin shrdlu", k=draw.randint(*characters))) for _ in range(number))
            options[option] = str(folder / f"{option}.jsonl")
            write_rows(Path(options[option]), [{"text": text} for text in texts])
    return options


def taid(*arguments: object, watch: Path | None = None) -> None:
    start = ["-m", "taid"] if watch is None else [__file__, "--watch", str(watch)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, *start, *map(str, arguments)], check=True, env=environment, stdout=sys.stderr)


def rows_of_table(run: str, found: dict[str, Any]) -> list[str]:
    seen, lines = found["seen"], []
    step = np.array([row["step"] for row in seen])
    late = step > step[-1] / 10
    tenths = [(step > of * step[-1] / 10) & (step <= (of + 1) * step[-1] / 10) for of in (1, 9)]
    for name, words in SEEN.items():
        value = np.array([row[name] for row in seen])
        (slope, _), covariance = np.polyfit(step[late] / 1e3, value[late], 1, cov=True)
        first, last = (np.median(value[tenth]) for tenth in tenths)
        digits = 2 if value.max() < 1e4 else 0
        lines.append(
            f"| {run} | {words} | {first:,.{digits}f} | {last:,.{digits}f} | {last / first:.3f} | "
            f"{slope:+,.{digits + 1}f} ± {covariance[0, 0] ** 0.5:,.{digits + 1}f} |"
        )
    return lines


def main() -> None:
    if sys.argv[1:2] == ["--watch"]:
        sys.exit(watched(Path(sys.argv[2]), sys.argv[3:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--logging_steps", type=int, default=10, help="another number leaves the results as they are")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="a new folder")
    arguments = parser.parse_args()
    out = arguments.out
    if out.exists():
        parser.error(f"--out {out} is there already: remove it, or choose another folder")
    out.mkdir(parents=True)
    # One step more, at the beginning of which the last window ends.
    recipe = RECIPE | write_pair(out, **PAIR) | {"max_steps": arguments.steps + 1}
    recipe["logging_steps"] = arguments.logging_steps
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    table, notes = [], []
    for run in arguments.runs:
        own = [word.format(out=out) for word in RUNS[run]]
        if run == "cache":
            taid("cache", "--config", out / "recipe.yaml", *own)
        start = time.perf_counter()
        taid("train", "--config", out / "recipe.yaml", "--output_dir", out / run, *own, watch=out / f"{run}.json")
        minutes = (time.perf_counter() - start) / 60
        found = json.loads((out / f"{run}.json").read_text())
        table += rows_of_table(run, found)
        notes.append(
            f"{run}: {minutes:.0f} minutes; transformers' log_history, which every checkpoint has in "
            f"trainer_state.json, has {found['rows']:,} rows in the end, {found['held'] / 1e6:.2f} MB in memory and "
            f"{found['written'] / 1e6:.2f} MB as JSON."
        )
    text = markdown(arguments, table, notes)
    if arguments.logging_steps == RECIPE["logging_steps"]:
        RESULTS.write_text(text)
    print(text)


def markdown(arguments: argparse.Namespace, table: list[str], notes: list[str]) -> str:
    import torch

    from step import _machine

    header = ["| run | | second tenth | last tenth | ratio | growth in 1,000 steps |", "|---|---|---|---|---|---|"]
    about = (
        f"{arguments.steps:,} steps a run; medians of windows of {EVERY} steps; growth by least squares from a tenth "
        f"of the run on, with its standard error. {date.today()}, {_machine()}, 1 thread, torch {torch.__version__}."
    )
    command = f"`python benchmarks/soak.py --steps {arguments.steps} --runs {' '.join(arguments.runs)}`"
    notes = [f"- {note}" for note in notes]
    return "\n".join(["# A long run", "", about, "", *header, *table, "", *notes, "", command, ""])


if __name__ == "__main__":
    main()
