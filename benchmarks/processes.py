"""Training on several processes: tokens a second, and what the reduction costs that t is moved by.

    python benchmarks/processes.py [--processes 1 2 4] [--engines ddp fsdp2] [--rounds 5] [--out runs/processes]

Each process has a thread and 4 rows of 128 tokens a step, however many processes there are. In each round, in an order
that is drawn, `taid train` runs alone, on 2 and 4 processes of each engine, and "apart": as many runs side by side that
know nothing of each other, which is what the machine can give. Tokens a second are those of metrics.jsonl, without the
first steps; ratios are to the run alone of the same round.

Once an optimizer step the sums of its loss are added up over the processes
(taid.training.sums.MicroBatches.total), and t moves by them. In a run of its own the steps take turns, drawn in
threes, the same on all processes:

- one as it is,
- one in which each process keeps its own sums,
- one in which all wait for each other before, so that what is timed is the reduction and not the slower process.

The tables go to benchmarks/results/processes.md, what was seen into OUT.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import yaml

from soak import write_pair

RESULTS = Path(__file__).parent / "results" / "processes.md"
PAIR = {
    "ids": 8_000, "student": (256, 4), "teacher": (512, 6), "rows": 2_000, "held_out": 0, "characters": (130, 160),
}  # fmt: skip
STEPS, LOGGED, WARM_UP = 24, 4, 2  # the first two of six logged means are not counted
RECIPE = {
    "per_device_train_batch_size": 4, "max_length": 128, "learning_rate": 1e-4, "optim": "adamw_torch", "bf16": False,
    "activation_checkpointing": False, "logging_steps": LOGGED, "save_strategy": "no", "report_to": "none",
    "use_cpu": True,
}  # fmt: skip
PORT = ["--main_process_port", "0"]  # any that is free
KINDS = ("as it is", "apart", "timed")


# --- in each process of a run whose steps take turns ------------------------------------------------------------------


def watched(out: Path, arguments: list[str]) -> int:
    """`taid` with these arguments, its reduction left out in some steps and timed in others."""
    from torch import distributed
    from transformers import TrainerCallback, trainer

    from taid.__main__ import run
    from taid.training import sums

    draw, kinds, total = random.Random(0), list[str](), sums.MicroBatches.total
    steps: list[dict[str, Any]] = []

    class Turns(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            now = time.perf_counter()
            if steps:  # a step ends where the next begins: who did not wait in it waits there
                steps[-1]["step"] = now - steps[-1].pop("start")
            if not kinds:
                kinds.extend(draw.sample(KINDS, len(KINDS)))
            steps.append({"kind": kinds.pop(), "start": now})

        def on_train_end(self, args: Any, *rest: Any, **kwargs: Any) -> None:
            (out / f"{args.process_index}.json").write_text(json.dumps(steps[:-1]))

    def turned(self: Any) -> dict[str, float]:
        kind, accelerator = steps[-1]["kind"], self.accelerator
        if kind == "apart":
            self.accelerator = SimpleNamespace(device=accelerator.device, reduce=lambda tensor, _: tensor)
        if kind == "timed" and distributed.is_initialized():
            distributed.barrier()
        start = time.perf_counter()
        found = total(self)
        steps[-1]["reduction"] = time.perf_counter() - start
        self.accelerator = accelerator
        return found

    sums.MicroBatches.total = turned  # type: ignore[method-assign]
    trainer.DEFAULT_CALLBACKS.append(Turns)
    return run(arguments)


# --- the whole --------------------------------------------------------------------------------------------------------


def finish(commands: list[list[str]], log: Path) -> None:
    """Run commands side by side to their ends."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("a") as output:
        runs = [subprocess.Popen([sys.executable, *c], stdout=output, stderr=output, env=environment) for c in commands]
        statuses = [run.wait() for run in runs]
        if any(statuses):
            sys.exit(f"failed: {commands[0]}\n{log.read_text()[-3000:]}")


def tokens_per_second(recipe: Path, engine: str, processes: int) -> float:
    """Return the sum over all processes."""
    out = recipe.parent
    folders = [out / f"run_{number}" for number in range(processes if engine == "apart" else 1)]
    launched = [] if engine == "apart" else ["--accelerate_config", engine, "--num_processes", str(processes), *PORT]
    train = ["-m", "taid", "train", "--config", str(recipe), "--overwrite_output_dir", *launched, "--output_dir"]
    finish([[*train, str(folder)] for folder in folders], out / "log.txt")
    logged = [[json.loads(line) for line in (folder / "metrics.jsonl").open()] for folder in folders]
    return sum(statistics.median(row["tokens_per_second"] for row in rows[WARM_UP:]) for rows in logged)


def in_turns(recipe: Path, engine: str, processes: int, steps: int) -> list[list[dict[str, Any]]]:
    """Return what each process saw of each step."""
    from taid.cli import launch

    out = recipe.parent / f"{engine}_{processes}"
    out.mkdir()
    config = ["--config_file", str(launch.config_file(engine)), "--num_processes", str(processes), *PORT]
    launcher = ["-m", "accelerate.commands.launch", *config] if processes > 1 else []
    taid = ["train", "--config", str(recipe), "--output_dir", str(out / "run"), "--max_steps", str(steps + 1)]
    finish([[*launcher, __file__, "--watch", str(out), *taid]], recipe.parent / "log.txt")
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(processes)]


def of_turns(name: str, ranks: list[list[dict[str, Any]]]) -> str:
    """A row of the table of the reduction."""
    threes = [ranks[0][at : at + 3] for at in range(3, len(ranks[0]) - 2, 3)]  # the first three warm up
    step = {kind: np.array([row["step"] for three in threes for row in three if row["kind"] == kind]) for kind in KINDS}
    timed = [row["reduction"] for rank in ranks for row in rank[3:] if row["kind"] == "timed"]
    low, middle, high = 1e6 * np.quantile(timed, (0.25, 0.5, 0.75))
    ratio = step["as it is"] / step["apart"]
    drawn = np.median(np.random.default_rng(0).choice(ratio, (10_000, len(ratio))), axis=1)
    least, most = np.quantile(drawn, (0.025, 0.975))
    alone, apart = (1e3 * np.median(step[kind]) for kind in KINDS[:2])
    with_and_without = f"{apart:.1f} | {np.median(ratio):.3f} ({least:.3f} to {most:.3f})" if len(ranks) > 1 else "|"
    return (
        f"| {name} | {middle:.0f} ({low:.0f} to {high:.0f}) | {middle / alone / 10:.3f} % | {alone:.1f} | "
        f"{with_and_without} |"
    )


def main() -> None:
    if sys.argv[1:2] == ["--watch"]:
        sys.exit(watched(Path(sys.argv[2]), sys.argv[3:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--engines", nargs="+", default=["ddp", "fsdp2"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=40, help="steps of each kind")
    parser.add_argument("--out", type=Path, default=Path("runs/processes"), help="a new folder")
    arguments = parser.parse_args()
    out, draw = arguments.out, random.Random(0)
    if out.exists():
        parser.error(f"--out {out} is there already: remove it, or choose another folder")
    recipe = out / "recipe.yaml"
    named = write_pair(out, **PAIR)
    recipe.write_text(yaml.safe_dump(RECIPE | named | {"max_steps": STEPS}))
    several = [number for number in arguments.processes if number > 1]
    runs = [("apart", 1), *((engine, number) for number in several for engine in ("apart", *arguments.engines))]
    speeds: dict[tuple[str, int], list[float]] = {run: [] for run in runs}
    for number in range(arguments.rounds):
        for run in draw.sample(runs, len(runs)):
            speeds[run].append(tokens_per_second(recipe, *run))
            print(f"round {number + 1}: {run}: {speeds[run][-1]:,.0f}", file=sys.stderr)
    (out / "speeds.json").write_text(json.dumps([[*run, *found] for run, found in speeds.items()]))
    turns = []
    for engine, processes in [("ddp", 1), *((engine, number) for number in several for engine in arguments.engines)]:
        name = f"{engine}, {processes} processes" if processes > 1 else "alone"
        turns.append(of_turns(name, in_turns(recipe, engine, processes, 3 * (arguments.turns + 1))))
        print(turns[-1], file=sys.stderr)
    RESULTS.write_text(markdown(arguments, speeds, turns))
    print(RESULTS.read_text())


def markdown(arguments: argparse.Namespace, speeds: dict[tuple[str, int], list[float]], turns: list[str]) -> str:
    import torch

    from step import _machine

    lines = ["| processes | | tokens a second | to one | of what runs apart reach |", "|---|---|---|---|---|"]
    for (engine, processes), found in speeds.items():
        columns = []
        for other in (("apart", 1), ("apart", processes)):
            ratio = np.array(found) / speeds[other]
            columns.append(f"{np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})")
        name = engine if processes > 1 else "alone"
        lines.append(f"| {processes} | {name} | {np.median(found):,.0f} | {columns[0]} | {columns[1]} |")
    table = [
        "| | the reduction, µs | of a step | a step, ms | without it, ms | with, to without |",
        "|---|---|---|---|---|---|", *turns,
    ]  # fmt: skip
    about = (
        f"Llamas with {PAIR['ids']:,} ids, student (width, layers) {PAIR['student']}, teacher {PAIR['teacher']}, 4 "
        f"rows of 128 tokens a process and step, float32, a thread a process. {date.today()}, {os.cpu_count()} cores, "
        f"{_machine()}, torch {torch.__version__}, gloo."
    )
    of_speeds = f"Medians, and least and most, of {arguments.rounds} rounds; ratios within a round."
    of_turns = (
        f"{arguments.turns} steps of each kind. The reduction: medians and quartiles of all processes, after a "
        "barrier, with what the process itself adds up. With to without: median of neighbouring steps, and its 95 % "
        "interval (bootstrap)."
    )
    command = (
        f"`python benchmarks/processes.py --processes {' '.join(map(str, arguments.processes))} --engines "
        f"{' '.join(arguments.engines)} --rounds {arguments.rounds} --turns {arguments.turns}`"
    )
    parts = [about, "\n".join(lines), of_speeds, "## The reduction", "\n".join(table), of_turns, command]
    return "\n\n".join(["# Training on several processes", *parts]) + "\n"


if __name__ == "__main__":
    main()
