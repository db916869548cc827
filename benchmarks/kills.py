"""Does a killed run end like one left alone? Twenty SIGKILLs at random moments, half in `taid cache`, half in `taid train`.

    python benchmarks/kills.py --teacher DIR --student DIR [--kills 20] [--seed 0] [--out runs/kills]

1. Undisturbed: `taid cache` of small made-up rows, then `taid train --teacher_cache` from it.
2. The capture again, killed at a moment drawn evenly from the time that the undisturbed one took, and started again with
   the same command, until half of the kills have hit. Work that is kept makes a process shorter: one that ends before
   its moment is no kill, and the next capture begins in a new folder. After each kill every shard is read in full.
3. The training likewise, from the last of these caches, with --resume_from_checkpoint where a whole checkpoint is.
4. Every cache must hold the rows of the undisturbed one, every student its weights and metrics, byte for byte; only the
   columns of timing may differ. What does not is named, and the exit status is 1.

The table of kills goes to benchmarks/results/kills.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from step import _machine
from stories import write_rows
from taid import cache, run_folder

RESULTS = Path(__file__).parent / "results" / "kills.md"
ROWS, HELD_OUT = 1_536, 64
WORDS = "a the big small red old happy dog cat girl boy bird tree ball house ran saw found lost took to with in and mom".split()
TIMING = ("tokens_per_second", "seconds")
RECIPE = {
    "num_train_epochs": 1, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "learning_rate": 1e-3,
    "optim": "adamw_torch", "objective": "taid", "taid_alpha": "auto", "bf16": False, "activation_checkpointing": False,
    "max_length": 256, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 50, "save_strategy": "steps",
    "save_steps": 4, "save_total_limit": 2, "report_to": "none", "use_cpu": True,
}  # fmt: skip
# The command line with shards of about four rows, so that a kill finds some on disk, some half-written, some rows in memory.
SMALL_SHARDS = (
    "import sys, taid.cache; taid.cache.Writer.__init__.__defaults__ = (150_000, 120.0); from taid.cli import main; "
    "sys.exit(main(sys.argv[1:]))"
)


class Work(NamedTuple):
    """What is disturbed: its command in a folder, what it has on disk there in words, and what is wrong with that."""

    name: str
    command: Callable[[Path], list[str]]
    on_disk: Callable[[Path], str]
    damage: Callable[[Path], list[str]]


class Kill(NamedTuple):
    of: str
    seconds: float
    found: str
    left: str


# --- processes --------------------------------------------------------------------------------------------------------


def finishes(command: list[str], log: Path, moment: float | None = None) -> bool:
    """Run a command to its end, or until `moment` seconds; False if a SIGKILL then hit it alive."""
    # One thread: sums over a changing number of threads would be rounded differently.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("a") as output:
        process = subprocess.Popen([sys.executable, *command], stdout=output, stderr=output, env=environment)
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
        status = process.wait()
    if status == -signal.SIGKILL and moment is not None:
        return False
    if status:
        sys.exit(f"status {status} of {' '.join(command)}\n{log.read_text()[-3000:]}")
    return True


def disturbed(work: Work, hits: int, duration: float, draw: random.Random, out: Path) -> Any:
    """Kill `work` so often; returns the folders, each with finished work, the kills, and what they damaged."""
    folders: list[Path] = []
    kills: list[Kill] = []
    damage: list[str] = []
    while len(kills) < hits:
        folder = out / f"{work.name}_{len(folders) + 1}"
        folders.append(folder)
        finished = False
        while not finished:
            moment = draw.uniform(0, duration) if len(kills) < hits else None
            found, start = work.on_disk(folder), time.perf_counter()
            finished = finishes(work.command(folder), out / "log.txt", moment)
            if not finished:
                kills.append(Kill(folder.name, time.perf_counter() - start, found, work.on_disk(folder)))
                damage += work.damage(folder)
            print(f"{folder.name}: {'finished' if finished else kills[-1]}", file=sys.stderr)
    return folders, kills, damage


# --- what is on disk --------------------------------------------------------------------------------------------------


def shards(folder: Path) -> str:
    torn = " and a partial one" if any(folder.glob("shards/*.partial")) else ""
    return f"{len(list(folder.glob('shards/*.safetensors')))} shards{torn}"


def damaged_shards(folder: Path) -> list[str]:
    if not (folder / "manifest.json").exists():
        return [f"{path}: without a manifest" for path in folder.glob("shards/*.safetensors")]
    of_cache = cache.identity(cache.read_manifest(folder))
    found = sorted(folder.glob("shards/*.safetensors"))
    return [f"{path}: not whole after a kill" for path in found if not cache.is_whole(path, of_cache)]


def whole_checkpoint(folder: Path) -> Path | None:
    return run_folder.last_checkpoint(folder) if folder.exists() else None


def checkpoints(folder: Path) -> str:
    names = sorted((path.name for path in folder.glob("checkpoint-*")), key=lambda name: int(name.split("-")[1]))
    whole = whole_checkpoint(folder)
    torn = f" and a torn {names[-1]}" if names and (whole is None or names[-1] != whole.name) else ""
    return f"{whole.name if whole else 'no checkpoint'}{torn}"


def different_rows(folder: Path, alone: Path) -> list[str]:
    one, other = cache.Cache(folder), cache.Cache(alone)
    if one._places.keys() != other._places.keys():
        return [f"{folder}: {len(one)} rows, not the {len(other)} of the undisturbed cache"]
    pairs = ((key, one.read(key), other.read(key)) for key in one._places)
    return [f"{folder}: row {key.hex()}" for key, a, b in pairs if any(not torch.equal(a[n], b[n]) for n in a | b)]


def different_run(folder: Path, alone: Path) -> list[str]:
    weights = "model.safetensors"
    found = [f"{folder / weights}"] if (folder / weights).read_bytes() != (alone / weights).read_bytes() else []
    for number, rows in enumerate(itertools.zip_longest(*map(run_folder.read_metrics, (folder, alone))), 1):
        one, other = ({k: v for k, v in (row or {}).items() if k not in TIMING} for row in rows)
        if json.dumps(one) != json.dumps(other):
            return [*found, f"{folder / run_folder.METRICS}, line {number}: {one} instead of {other}"]
    return found


# --- the whole --------------------------------------------------------------------------------------------------------


def write_recipe(folder: Path, student: Path, teacher: Path, draw: random.Random) -> Path:
    def text() -> str:
        sentences = (" ".join(draw.choices(WORDS, k=draw.randint(5, 10))) for _ in range(draw.randint(6, 12)))
        return " ".join(f"{sentence.capitalize()}." for sentence in sentences)

    data = {"dataset_name": folder / "train.jsonl", "eval_dataset_name": folder / "held_out.jsonl"}
    for path, rows in zip(data.values(), (ROWS, HELD_OUT), strict=True):
        write_rows(path, [{"text": text()} for _ in range(rows)])
    names = data | {"model_name_or_path": student, "teacher_model_name_or_path": teacher, "output_dir": folder / "run"}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {name: str(value) for name, value in names.items()}))
    return path


def markdown(arguments: argparse.Namespace, took: list[float], kills: list[Kill], verdict: str) -> str:
    about = (
        f"{ROWS:,} rows, {HELD_OUT} held out, {ROWS // RECIPE['per_device_train_batch_size']} steps, a checkpoint every "
        f"{RECIPE['save_steps']}; left alone, the capture takes {took[0]:.0f} s and the training {took[1]:.0f} s from the "
        f"start of the process. {_machine()}, 1 thread, torch {torch.__version__}."
    )
    command = (
        f"`python benchmarks/kills.py --teacher {arguments.teacher.name} --student {arguments.student.name} "
        f"--kills {arguments.kills} --seed {arguments.seed}`"
    )
    lines = ["| kill | in | after, s | the process found | the kill left |", "|---|---|---|---|---|"]
    for number, kill in enumerate(kills, 1):
        lines.append(f"| {number} | {kill.of.replace('_', ' ')} | {kill.seconds:.1f} | {kill.found} | {kill.left} |")
    return "\n".join(["# Killed at random moments", "", verdict, "", about, "", *lines, "", command, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kills"), help="a new folder")
    arguments = parser.parse_args()
    if arguments.kills < 2:
        parser.error("--kills: at least 2, one in the capture and one in the training")
    out, draw = arguments.out, random.Random(arguments.seed)
    if out.exists():
        parser.error(f"--out {out} is there already: remove it, or choose another folder")
    out.mkdir(parents=True)
    recipe = write_recipe(out, arguments.student, arguments.teacher, draw)

    def capture(folder: Path) -> list[str]:
        return ["-c", SMALL_SHARDS, "cache", "--config", str(recipe), "--teacher_cache", str(folder)]

    def train(folder: Path, from_cache: Path) -> list[str]:
        # Overwriting is refused to a kill before the first checkpoint unless it is asked for.
        how = "--resume_from_checkpoint" if whole_checkpoint(folder) else "--overwrite_output_dir"
        common = ["-m", "taid", "train", "--config", str(recipe), "--teacher_cache", str(from_cache)]
        return [*common, "--output_dir", str(folder), how]

    alone, took = (out / "capture_alone", out / "training_alone"), []
    for command in (capture(alone[0]), train(alone[1], alone[0])):
        start = time.perf_counter()
        finishes(command, out / "log.txt")
        took.append(time.perf_counter() - start)
        print(f"undisturbed: {took[-1]:.1f} s", file=sys.stderr)

    work = Work("capture", capture, shards, damaged_shards)
    caches, kills, wrong = disturbed(work, arguments.kills // 2, took[0], draw, out)
    work = Work("training", lambda folder: train(folder, caches[-1]), checkpoints, lambda folder: [])
    runs, more, _ = disturbed(work, arguments.kills - len(kills), took[1], draw, out)

    wrong += [line for folder in caches for line in different_rows(folder, alone[0])]
    wrong += [line for folder in runs for line in different_run(folder, alone[1])]
    kills += more
    verdict = (
        f"**{'DIFFERENT' if wrong else 'Equal'}.** {len(kills)} SIGKILLs hit living processes; {len(caches)} captures and "
        f"{len(runs)} trainings were finished after them. "
    )
    if wrong:
        verdict += "What differs from the undisturbed run:\n\n" + "\n".join(f"- {line}" for line in wrong)
    else:
        verdict += (
            "After each kill in a capture all shards were whole. Every cache holds the undisturbed one's rows, and every "
            "student its `model.safetensors` and `metrics.jsonl` (without the columns of timing), byte for byte."
        )
    RESULTS.write_text(markdown(arguments, took, kills, verdict))
    print(RESULTS.read_text())
    if wrong:
        sys.exit("a killed run ended differently:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
