"""Does a killed run end like one left alone? SIGKILLs at random moments, half in `taid cache`, half in `taid train`.

    python benchmarks/kills.py --teacher DIR --student DIR [--kills 20] [--seed 0] [--out runs/kills]

1. Undisturbed: `taid cache` of small made-up rows, then `taid train --teacher_cache` from it.
2. The capture again, killed at a moment drawn evenly from the time that the undisturbed one took, and started again
   with the same command, until half of the kills have hit. Work that is kept makes a process shorter: one that ends
   before its moment is no kill, and the next begins in a new folder. After each kill every shard is read in full.
3. The training likewise, from the cache that was hit most, with --resume_from_checkpoint where a whole checkpoint is.
4. Every cache must hold the rows of the undisturbed one, every student its weights and metrics, byte for byte; only
   the columns of timing may differ. What does not is named, and the exit status is 1.

The table of kills goes to benchmarks/results/kills.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from step import _machine
from stories import write_rows
from taid import cache, manifest, run_folder

RESULTS = Path(__file__).parent / "results" / "kills.md"
ROWS, HELD_OUT, BATCH = 1_536, 64, 4
WORDS = "a the big small red old happy dog cat girl boy bird tree ball house ran saw found lost to with in mom".split()
TIMING = ("tokens_per_second", "seconds")
RECIPE = {
    "num_train_epochs": 1, "per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH,
    "learning_rate": 1e-3, "optim": "adamw_torch", "objective": "taid", "taid_alpha": "auto", "max_length": 256,
    "bf16": False, "activation_checkpointing": False, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 50,
    "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "report_to": "none", "use_cpu": True,
}  # fmt: skip
# The command line with shards of about four rows, so that a kill finds shards on disk and rows that are not yet there.
SMALL_SHARDS = (
    "import sys, taid.cache; taid.cache.Writer.__init__.__defaults__ = (150_000, 120.0); from taid.cli import main; "
    "sys.exit(main(sys.argv[1:]))"
)


class Kill(NamedTuple):
    folder: Path
    seconds: float  # since the start of the process
    found: str  # what it went on from, and
    left: str  # what was on disk when it was dead


# --- killing ----------------------------------------------------------------------------------------------------------


def finishes(command: list[str], log: Path, moment: float | None = None) -> bool:
    """Run a command to its end, or until `moment` seconds; False if a SIGKILL then hit it alive."""
    # One thread: sums that are split over another number of threads are rounded differently.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("a") as output:
        process = subprocess.Popen([sys.executable, *command], stdout=output, stderr=output, env=environment)
        try:
            status = process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
            if status == -signal.SIGKILL:
                return False
    if status:
        sys.exit(f"status {status} of {' '.join(command)}\n{log.read_text()[-3000:]}")
    return True


def disturbed(
    prefix: Path, command: Callable[[Path], list[str]], on_disk: Callable[[Path], str], hits: int, duration: float,
    draw: random.Random,
) -> tuple[list[Path], list[Kill], list[str]]:  # fmt: skip
    """Kill a command so often; returns the folders of its finished work, the kills, and the shards they damaged."""
    folders: list[Path] = []
    kills: list[Kill] = []
    damage: list[str] = []
    while len(kills) < hits:
        folder, finished = prefix.with_name(f"{prefix.name}_{len(folders) + 1}"), False
        folders.append(folder)
        while not finished:
            moment = draw.uniform(0, duration) if len(kills) < hits else None
            found, start = on_disk(folder), time.perf_counter()
            finished = finishes(command(folder), prefix.with_name("log.txt"), moment)
            if not finished:
                kills.append(Kill(folder, time.perf_counter() - start, found, on_disk(folder)))
                damage += damaged_shards(folder)
            print(f"{folder.name}: {'finished' if finished else f'{len(kills)} {kills[-1]}'}", file=sys.stderr)
    return folders, kills, damage


# --- what is on disk --------------------------------------------------------------------------------------------------


def shards(folder: Path) -> str:
    torn = " and a partial one" if any(folder.glob("shards/*.partial")) else ""
    return f"{len(list(folder.glob('shards/*.safetensors')))} shards{torn}"


def damaged_shards(folder: Path) -> list[str]:
    paths = sorted(folder.glob("shards/*.safetensors"))
    of_cache = manifest.identity(manifest.read(folder)) if paths else ""
    return [f"{path}: not whole after a kill" for path in paths if not cache.is_whole(path, of_cache)]


def whole_checkpoint(folder: Path) -> Path | None:
    return run_folder.last_checkpoint(folder) if folder.exists() else None


def checkpoints(folder: Path) -> str:
    steps = {int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")}
    whole = whole_checkpoint(folder)
    step = int(whole.name.split("-")[1]) if whole else 0
    torn = f" and a torn one at {max(steps)}" if steps and max(steps) > step else ""
    return f"{f'checkpoint {step}' if whole else 'no checkpoint'}{torn}"


def different_rows(folder: Path, alone: Path) -> list[str]:
    try:
        one, other = cache.Cache(folder), cache.Cache(alone)
        if set(one) != set(other):
            return [f"{folder}: the keys of its {len(one)} rows; {len(other)} rows left alone"]
        rows = {key.hex(): (one.read(key), other.read(key)) for key in one}
    except ValueError as error:  # names the shard
        return [str(error)]
    return [f"{folder}: row {key}" for key, (a, b) in rows.items() if any(not torch.equal(a[n], b[n]) for n in a | b)]


def different_run(folder: Path, alone: Path) -> list[str]:
    weights = "model.safetensors"
    found = [] if (folder / weights).read_bytes() == (alone / weights).read_bytes() else [f"{folder / weights}"]
    for number, rows in enumerate(zip_longest(*map(run_folder.read_metrics, (folder, alone))), start=1):
        one, other = (json.dumps({k: v for k, v in (row or {}).items() if k not in TIMING}) for row in rows)
        if one != other:
            return [*found, f"{folder / run_folder.METRICS}, line {number}: {one}; left alone: {other}"]
    return found


# --- the whole --------------------------------------------------------------------------------------------------------


def write_recipe(folder: Path, student: Path, teacher: Path, draw: random.Random) -> Path:
    def text() -> str:
        sentences = (" ".join(draw.choices(WORDS, k=draw.randint(5, 10))) for _ in range(draw.randint(6, 12)))
        return " ".join(f"{sentence.capitalize()}." for sentence in sentences)

    files = {"dataset_name": folder / "train.jsonl", "eval_dataset_name": folder / "held_out.jsonl"}
    for path, count in zip(files.values(), (ROWS, HELD_OUT), strict=True):
        write_rows(path, [{"text": text()} for _ in range(count)])
    places = files | {"model_name_or_path": student, "teacher_model_name_or_path": teacher}
    recipe = RECIPE | {name: str(path) for name, path in places.items()}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def markdown(arguments: argparse.Namespace, took: list[float], kills: list[Kill], wrong: list[str]) -> str:
    works = len({kill.folder for kill in kills})
    verdict = f"**{len(kills)} SIGKILLs hit living processes, in {works} captures and trainings.** "
    if wrong:
        verdict += "**DIFFERENT** from those left alone:\n\n" + "\n".join(f"- {line}" for line in wrong)
    else:
        verdict += (
            "After each kill all shards were whole. In the end every cache has the rows of the one left alone, every "
            "student its `model.safetensors` and `metrics.jsonl` (without the columns of timing), byte for byte."
        )
    about = (
        f"{ROWS:,} rows, {HELD_OUT} held out, {ROWS // BATCH} steps, a checkpoint every {RECIPE['save_steps']}. From "
        f"the start of the process, the capture left alone takes {took[0]:.0f} s, the training {took[1]:.0f} s. "
        f"{_machine()}, 1 thread, torch {torch.__version__}."
    )
    command = (
        f"`python benchmarks/kills.py --teacher {arguments.teacher.name} --student {arguments.student.name} "
        f"--kills {arguments.kills} --seed {arguments.seed}`"
    )
    lines = ["| kill | in | after, s | the process found | and left |", "|---|---|---|---|---|"]
    for number, (folder, seconds, found, left) in enumerate(kills, start=1):
        lines.append(f"| {number} | {folder.name.replace('_', ' ')} | {seconds:.1f} | {found} | {left} |")
    return "\n".join(["# Killed at random moments", "", verdict, "", about, "", *lines, "", command, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kills"), help="a new folder")
    arguments = parser.parse_args()
    out, draw = arguments.out, random.Random(arguments.seed)
    if out.exists():
        parser.error(f"--out {out} is there already: remove it, or choose another folder")
    out.mkdir(parents=True)
    recipe = str(write_recipe(out, arguments.student, arguments.teacher, draw))

    def capture(folder: Path) -> list[str]:
        return ["-c", SMALL_SHARDS, "cache", "--config", recipe, "--teacher_cache", str(folder)]

    def train(folder: Path, from_cache: Path) -> list[str]:
        # What was killed before its first checkpoint cannot be continued, and is not overwritten without being told to.
        how = "--resume_from_checkpoint" if whole_checkpoint(folder) else "--overwrite_output_dir"
        command = ["-m", "taid", "train", "--config", recipe, "--teacher_cache", str(from_cache)]
        return [*command, "--output_dir", str(folder), how]

    cache_alone, run_alone, took = out / "capture_alone", out / "training_alone", []
    for command in (capture(cache_alone), train(run_alone, cache_alone)):
        start = time.perf_counter()
        finishes(command, out / "log.txt")
        took.append(time.perf_counter() - start)
        print(f"left alone: {took[-1]:.1f} s", file=sys.stderr)

    half = arguments.kills // 2
    caches, kills, damage = disturbed(out / "capture", capture, shards, half, took[0], draw)
    hit_most = max(caches, key=[kill.folder for kill in kills].count, default=cache_alone)
    runs, more, _ = disturbed(
        out / "training", lambda folder: train(folder, hit_most), checkpoints, arguments.kills - half, took[1], draw
    )
    wrong = [*damage, *(line for folder in caches for line in different_rows(folder, cache_alone))]
    wrong += [line for folder in runs for line in different_run(folder, run_alone)]
    RESULTS.write_text(markdown(arguments, took, [*kills, *more], wrong))
    print(RESULTS.read_text())
    if wrong:
        sys.exit("different from what was left alone:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
