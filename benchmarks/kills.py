"""Does a killed run end like one left alone? SIGKILLs and SIGTERMs at random moments, saves included.

    python benchmarks/kills.py engines --teacher DIR --student DIR [--kills 20] [--sigterms 12]
                                       [--engines none ddp fsdp2 zero3] [--seed 0] [--out runs/kills]
    python benchmarks/kills.py cache   --teacher DIR --student DIR [--kills 20] [--seed 0] [--out runs/kills]

engines: `taid train` in one process (none) and in two of each engine, a checkpoint every five of sixty steps.

1. Undisturbed, once for each engine.
2. Again, and each time struck: by SIGKILL, all of its processes at once or one rank, or by SIGTERM, the launcher or one
   rank. Half of the blows are aimed: a checkpoint is being written. The others come after a drawn number of steps,
   none included. What is struck goes on with --resume_from_checkpoint, until its blows have hit; then to its end.
3. After each blow every checkpoint under its name must be whole, and no more lost than the steps since the last save;
   after a SIGTERM nothing, with status 143 and a message. In the end weights and metrics must be those of the
   undisturbed run, byte for byte.

cache: SIGKILLs, half in `taid cache`, half in `taid train` from what it wrote.

1. Undisturbed: `taid cache` of small made-up rows, then `taid train --teacher_cache` from it.
2. The capture again, killed at a moment drawn evenly from the time that the undisturbed one took, and started again
   with the same command, until half of the kills have hit. Work that is kept makes a process shorter: one that ends
   before its moment is no kill, and the next begins in a new folder. After each kill every shard is read in full.
3. The training likewise, from the cache that was hit most, with --resume_from_checkpoint where a whole checkpoint is.
4. Every cache must hold the rows of the undisturbed one, every student its weights and metrics, byte for byte; only
   the columns of timing may differ.

What differs is named, and the exit status is 1. The tables go to benchmarks/results/kills.md, a section each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from datetime import date
from itertools import zip_longest
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import torch
import yaml
from safetensors.torch import load_file

from step import _machine
from stories import write_rows
from taid.artifacts import run_folder
from taid.teachers import cache, cache_manifest

RESULTS = Path(__file__).parent / "results" / "kills.md"
SECTIONS = {"engines": "Training, in one process and in two", "cache": "Captures, and training from a cache"}
DEEPSPEED = Path(__file__).parents[1] / ".venv" / "deepspeed"  # by `make dev`
ROWS, HELD_OUT, BATCH = 1_536, 64, 4
WORDS = "a the big small red old happy dog cat girl boy bird tree ball house ran saw found lost to with in mom".split()
TIMING = ("tokens_per_second", "seconds")
RECIPE = {
    "num_train_epochs": 1, "per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH,
    "learning_rate": 1e-3, "optim": "adamw_torch", "objective": "taid", "taid_alpha": "auto", "max_length": 256,
    "bf16": False, "activation_checkpointing": False, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 50,
    "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "report_to": "none", "use_cpu": True,
}  # fmt: skip
STEPS, SAVE_STEPS = 60, 5
SHORT = {
    "max_steps": STEPS, "save_steps": SAVE_STEPS, "logging_steps": 1, "eval_steps": 25, "max_length": 48,
}  # fmt: skip
# The command line with shards of about four rows, so that a kill finds shards on disk and rows that are not yet there.
SMALL_SHARDS = (
    "import sys, taid.teachers.cache; taid.teachers.cache.Writer.__init__.__defaults__ = (150_000, 120.0); "
    "from taid.cli.main import main; sys.exit(main(sys.argv[1:]))"
)


class Kill(NamedTuple):
    folder: Path
    seconds: float  # since the start of the process
    found: str  # what it went on from, and
    left: str  # what was on disk when it was dead


class Blow(NamedTuple):
    signal: signal.Signals
    to: str  # the process, all processes, one rank, or the launcher
    steps: int  # to be trained before it
    is_aimed: bool  # at a checkpoint that is being written


class Hit(NamedTuple):
    folder: Path
    blow: Blow
    in_save: bool  # a checkpoint was being written
    found: int  # the step that the processes went on from
    reached: int  # the last one that they had logged
    left: int  # that of the last checkpoint
    wrong: list[str]

    @property
    def lost(self) -> int:
        return self.reached - self.left


class Pace(NamedTuple):
    seconds: float  # of a run left alone,
    start: float  # of it until its first step is logged,
    save: float  # and a checkpoint's

    @property
    def step(self) -> float:
        return (self.seconds - self.start) / STEPS


Struck = TypeVar("Struck", Kill, Hit)
# Works in a folder until it is struck for the so-manieth time, or, given None, to the end; returns None at the end.
Attempt = Callable[[Path, int | None], Struck | None]


# --- killing ----------------------------------------------------------------------------------------------------------


def started(command: list[str], output: IO[str], engine: str = "none") -> subprocess.Popen[bytes]:
    # One thread: sums that are split over another number of threads are rounded differently.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if engine.startswith("zero"):  # ninja builds a part of DeepSpeed
        path = os.pathsep.join([str(DEEPSPEED / "bin"), os.environ["PATH"]])
        environment |= {"PYTHONPATH": str(DEEPSPEED), "PATH": path, "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen([sys.executable, *command], stdout=output, stderr=output, env=environment)


def finishes(command: list[str], log: Path, moment: float | None = None, engine: str = "none") -> bool:
    """Run a command to its end, or until `moment` seconds; False if a SIGKILL then hit it alive."""
    with log.open("a") as output:
        process = started(command, output, engine)
        try:
            status = process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
            if status == -signal.SIGKILL:
                return False
    require_success(status, command, log)
    return True


def require_success(status: int | None, command: list[str], log: Path) -> None:
    if status:
        sys.exit(f"status {status} of {' '.join(command)}\n{log.read_text()[-3000:]}")


def disturbed(prefix: Path, hits: int, attempt: Attempt[Struck]) -> tuple[list[Path], list[Struck]]:
    """Disturb work so often, and let all of it come to its end; returns its folders and what hit it."""
    folders: list[Path] = []
    struck: list[Struck] = []
    while len(struck) < hits:
        folder, finished = prefix.with_name(f"{prefix.name}_{len(folders) + 1}"), False
        folders.append(folder)
        while not finished:
            hit = attempt(folder, len(struck) if len(struck) < hits else None)
            finished = hit is None
            struck += [hit] if hit else []
            print(f"{folder.name}: {'finished' if finished else f'{len(struck)} {hit}'}", file=sys.stderr)
    return folders, struck


def strike(command: list[str], folder: Path, engine: str, blow: Blow, pace: Pace, draw: random.Random) -> Hit | None:
    """Train until the blow hits the living processes; None if they came to their end before."""
    log, begun, found = folder.with_name("log.txt"), time.time(), last_step(folder)
    wait = pace.save if blow.is_aimed else pace.step if blow.steps else pace.start

    def has_come() -> bool:
        if not blow.steps:
            return True
        step = last_logged(folder) if is_newer(folder / run_folder.METRICS, begun) else 0
        # Later a SIGTERM may find the training over.
        is_due = step >= found + blow.steps and (blow.signal == signal.SIGKILL or step < STEPS - SAVE_STEPS)
        return is_due and (is_newer(folder / run_folder.UNFINISHED, begun) or not blow.is_aimed)

    with log.open("w") as output:
        process = started(command, output, engine)
        while process.poll() is None and not has_come():
            time.sleep(0.002)
        time.sleep(draw.uniform(0, wait))
        is_struck = process.poll() is None
        if is_struck:
            ranks = [process.pid] if engine == "none" else children(process.pid)
            to = {"all processes": [process.pid, *ranks], "one rank": ranks and [draw.choice(ranks)]}
            in_save = is_newer(folder / run_folder.UNFINISHED, begun)
            for pid in to.get(blow.to, [process.pid]):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, blow.signal)
            process.wait(timeout=300)
            while any(is_alive(pid) for pid in ranks):
                time.sleep(0.02)
    said, status = log.read_text(), process.returncode
    if not is_struck:
        require_success(status, command, log)
    if status == 0:
        return None
    hit = Hit(folder, blow, in_save, found, last_logged(folder), last_step(folder), [])
    if blow.signal == signal.SIGKILL:
        is_right = status == (128 + signal.SIGKILL if blow.to == "one rank" else -signal.SIGKILL)
        is_right = is_right and hit.lost <= SAVE_STEPS
    else:
        is_right = status == 128 + signal.SIGTERM and hit.lost == 0 and f"saved checkpoint-{hit.left} in" in said
    if not is_right:
        hit.wrong.append(f"{folder}: status {status} after {hit}:\n{said[-3000:]}")
    return hit


def is_newer(path: Path, begun: float) -> bool:
    """Whether a path was written since; what an earlier process left may be there too."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime > begun
    return False


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


# --- what is on disk --------------------------------------------------------------------------------------------------


def shards(folder: Path) -> str:
    torn = " and a partial one" if any(folder.glob("shards/*.partial")) else ""
    return f"{len(list(folder.glob('shards/*.safetensors')))} shards{torn}"


def damaged_shards(folder: Path) -> list[str]:
    paths = sorted(folder.glob("shards/*.safetensors"))
    of_cache = cache_manifest.identity(cache_manifest.read(folder)) if paths else ""
    return [f"{path}: not whole after a kill" for path in paths if not cache.is_whole(path, of_cache)]


def whole_checkpoint(folder: Path) -> Path | None:
    return run_folder.last_checkpoint(folder) if folder.exists() else None


def checkpoints(folder: Path) -> str:
    steps = {int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")}
    whole = whole_checkpoint(folder)
    step = int(whole.name.split("-")[1]) if whole else 0
    torn = f" and a torn one at {max(steps)}" if steps and max(steps) > step else ""
    return f"{f'checkpoint {step}' if whole else 'no checkpoint'}{torn}"


def last_step(folder: Path) -> int:
    whole = whole_checkpoint(folder)
    return int(whole.name.split("-")[1]) if whole else 0


def last_logged(folder: Path) -> int:
    rows = run_folder.read_metrics(folder) if (folder / run_folder.METRICS).exists() else []
    return rows[-1]["step"] if rows else 0


def torn(folder: Path, alone: Path) -> list[str]:
    """Return what is not whole in checkpoints; an engine's own files are read when it goes on from them."""

    def files(checkpoint: Path) -> set[str]:
        names = (str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*"))
        return {re.sub(r"global_step\d+", "global_step", name) for name in names}

    found, expected = [], files(alone / f"checkpoint-{STEPS}")
    for checkpoint in folder.glob("checkpoint-[0-9]*"):
        path = checkpoint / "trainer_state.json"
        try:
            if missing := sorted(expected - files(checkpoint)):
                raise ValueError(f"lacks {', '.join(missing)}")
            if json.loads(path.read_text())["global_step"] != int(checkpoint.name.split("-")[1]):
                raise ValueError(f"{path}: of another step")
            for path in checkpoint.rglob("*.safetensors"):
                load_file(path)
            for path in (*checkpoint.rglob("*.pt"), *checkpoint.rglob("*.pth")):  # zip archives, with checksums
                if (member := zipfile.ZipFile(path).testzip()) is not None:
                    raise ValueError(f"{path}: {member} is damaged")
        except Exception as error:
            found.append(f"{checkpoint}, of which a part is gone or damaged: {error}")
    return found


def different_rows(folder: Path, alone: Path) -> list[str]:
    try:
        one, other = cache.Cache(folder), cache.Cache(alone)
        if set(one) != set(other):
            return [f"{folder}: the keys of its {len(one)} rows; {len(other)} rows left alone"]
        rows = {key.hex(): (one.read(key), other.read(key)) for key in one}
    except ValueError as error:  # names the shard
        return [str(error)]
    return [f"{folder}: row {key}" for key, (a, b) in rows.items() if any(not torch.equal(a[n], b[n]) for n in a | b)]


def difference(folder: Path, alone: Path) -> float:
    """The largest difference of a matrix of the final weights, relative to its norm."""
    one, other = (load_file(path / "model.safetensors") for path in (folder, alone))
    return max(float((one[name] - weight).norm() / weight.norm()) for name, weight in other.items())


def different_run(folder: Path, alone: Path) -> list[str]:
    weights = "model.safetensors"
    found = [] if (folder / weights).read_bytes() == (alone / weights).read_bytes() else [f"{folder / weights}"]
    for number, rows in enumerate(zip_longest(*map(run_folder.read_metrics, (folder, alone))), start=1):
        one, other = (json.dumps({k: v for k, v in (row or {}).items() if k not in TIMING}) for row in rows)
        if one != other:
            return [*found, f"{folder / run_folder.METRICS}, line {number}: {one}; left alone: {other}"]
    return found


# --- captures, and training from a cache -----------------------------------------------------------------------------


def of_cache(arguments: argparse.Namespace, recipe: str, draw: random.Random) -> list[str]:
    """Write the section of captures and of training from a cache; returns what differs."""
    out, half, damage = arguments.out, arguments.kills // 2, []

    def capture(folder: Path) -> list[str]:
        return ["-c", SMALL_SHARDS, "cache", "--config", recipe, "--teacher_cache", str(folder)]

    def train(folder: Path, from_cache: Path) -> list[str]:
        return [*training(recipe, folder), "--teacher_cache", str(from_cache)]

    cache_alone, run_alone, took = out / "capture_alone", out / "training_alone", []
    for command in (capture(cache_alone), train(run_alone, cache_alone)):
        start = time.perf_counter()
        finishes(command, out / "log.txt")
        took.append(time.perf_counter() - start)
        print(f"left alone: {took[-1]:.1f} s", file=sys.stderr)

    def killed(command: Callable[[Path], list[str]], on_disk: Callable[[Path], str], duration: float) -> Attempt[Kill]:
        def attempt(folder: Path, number: int | None) -> Kill | None:
            moment = None if number is None else draw.uniform(0, duration)
            found, start = on_disk(folder), time.perf_counter()
            if finishes(command(folder), out / "log.txt", moment):
                return None
            damage.extend(damaged_shards(folder))
            return Kill(folder, time.perf_counter() - start, found, on_disk(folder))

        return attempt

    caches, kills = disturbed(out / "capture", half, killed(capture, shards, took[0]))
    hit_most = max(caches, key=[kill.folder for kill in kills].count, default=cache_alone)
    training_killed = killed(lambda folder: train(folder, hit_most), checkpoints, took[1])
    runs, more = disturbed(out / "training", arguments.kills - half, training_killed)
    wrong = [*damage, *(line for folder in caches for line in different_rows(folder, cache_alone))]
    wrong += [line for folder in runs for line in different_run(folder, run_alone)]
    write_section("cache", cache_section(arguments, took, [*kills, *more], wrong))
    return wrong


def cache_section(arguments: argparse.Namespace, took: list[float], kills: list[Kill], wrong: list[str]) -> str:
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
        f"{date.today()}, {_machine()}, 1 thread, torch {torch.__version__}."
    )
    command = (
        f"`python benchmarks/kills.py cache --teacher {arguments.teacher.name} --student {arguments.student.name} "
        f"--kills {arguments.kills} --seed {arguments.seed}`"
    )
    lines = ["| kill | in | after, s | the process found | and left |", "|---|---|---|---|---|"]
    for number, (folder, seconds, found, left) in enumerate(kills, start=1):
        lines.append(f"| {number} | {folder.name.replace('_', ' ')} | {seconds:.1f} | {found} | {left} |")
    return "\n".join([verdict, "", about, "", *lines, "", command])


# --- training under the engines ---------------------------------------------------------------------------------------


def blows(engine: str, kills: int, terms: int, draw: random.Random) -> list[Blow]:
    made = []
    for number, count, to in (
        (signal.SIGKILL, kills, ("all processes", "one rank")), (signal.SIGTERM, terms, ("the launcher", "one rank")),
    ):  # fmt: skip
        for i in range(count):
            is_aimed, steps = i % 4 < 2, draw.randint(1, 10)
            if number == signal.SIGKILL and not is_aimed and i % 2 == 0:
                steps = draw.choice((0, steps))  # before the first one, imports and all
            made.append(Blow(number, to[i % 2] if engine != "none" else "the process", steps, is_aimed))
    draw.shuffle(made)
    return made


def left_alone(command: list[str], folder: Path, engine: str) -> Pace:
    start, saving, log = 0.0, 0.0, folder.with_name("log.txt")
    with log.open("w") as output:
        process, begun = started(command, output, engine), time.perf_counter()
        before = begun
        while (status := process.poll()) is None:
            time.sleep(0.002)
            now = time.perf_counter()
            start = start or (now - begun if last_logged(folder) else 0.0)
            saving += (now - before) * (folder / run_folder.UNFINISHED).exists()
            before = now
    require_success(status, command, log)
    return Pace(before - begun, start, saving * SAVE_STEPS / STEPS)


def of_engine(
    engine: str, recipe: str, out: Path, kills: int, terms: int, draw: random.Random
) -> tuple[list[Hit], list[str], str]:
    """Returns what hit, what is wrong, and a line of the table."""
    alone, due = out / f"{engine}_alone", blows(engine, kills, terms, draw)

    def command(folder: Path) -> list[str]:
        rows = BATCH if engine == "none" else BATCH // 2
        words = [*training(recipe, folder), "--use_cpu", f"--per_device_train_batch_size={rows}"]
        # Another run may hold the usual port.
        launched = ["--accelerate_config", engine, "--num_processes", "2", "--main_process_port", "0"]
        return [*words, *(f"--{name}={value}" for name, value in SHORT.items()), *(launched if rows < BATCH else [])]

    pace = left_alone(command(alone), alone, engine)
    print(f"{engine} left alone: {pace}", file=sys.stderr)

    def attempt(folder: Path, number: int | None) -> Hit | None:
        if number is None:
            finishes(command(folder), out / "log.txt", engine=engine)
            return None
        hit = strike(command(folder), folder, engine, due[number], pace, draw)
        if hit:
            hit.wrong.extend(torn(folder, alone))
        return hit

    folders, hits = disturbed(out / engine, len(due), attempt)
    wrong = list(dict.fromkeys(line for hit in hits for line in hit.wrong))  # what is torn stays so for some kills
    differ = [line for folder in folders for line in different_run(folder, alone)]
    apart = max(difference(folder, alone) for folder in folders)
    by = [[hit for hit in hits if hit.blow.signal == number] for number in (signal.SIGKILL, signal.SIGTERM)]
    counts = " | ".join(f"{len(some)} | {sum(hit.in_save for hit in some)}" for some in by)
    end = "the same bytes" if not differ else f"different, weights by {apart:.1e}"
    line = (
        f"| {engine} | {pace.seconds:.0f} | {pace.start:.0f} | {pace.step:.2f} | {pace.save:.2f} | {counts} | "
        f"{max(hit.lost for hit in hits)} | {len(folders)} | {end} |"
    )
    return hits, wrong + differ, line


def of_engines(arguments: argparse.Namespace, recipe: str, draw: random.Random) -> list[str]:
    """Write the section of training under the engines; returns what is wrong."""
    hits: list[Hit] = []
    wrong: list[str] = []
    lines: list[str] = []
    count, start = len(arguments.engines), time.perf_counter()
    for i, engine in enumerate(arguments.engines):
        kills, terms = ((i + 1) * all_ // count - i * all_ // count for all_ in (arguments.kills, arguments.sigterms))
        some, also, line = of_engine(engine, recipe, arguments.out, kills, terms, draw)
        hits += some
        wrong += also
        lines.append(line)
    minutes = (time.perf_counter() - start) / 60
    write_section("engines", engines_section(arguments, hits, wrong, lines, minutes))
    return wrong


def engines_section(
    arguments: argparse.Namespace, hits: list[Hit], wrong: list[str], lines: list[str], minutes: float
) -> str:
    kills, terms = ([h for h in hits if h.blow.signal == n] for n in (signal.SIGKILL, signal.SIGTERM))
    verdict = (
        f"**{len(kills)} SIGKILLs and {len(terms)} SIGTERMs hit living processes, {sum(h.in_save for h in hits)} of "
        "them while a checkpoint was written.** "
    )
    if wrong:
        lines_of_wrong = (line.splitlines()[0].replace(f"{arguments.out}/", "") for line in wrong)
        verdict += "**WRONG**:\n\n" + "\n".join(f"- {line}" for line in lines_of_wrong)
    else:
        verdict += (
            "After each, all checkpoints were whole. A SIGKILL lost at most "
            f"{max((hit.lost for hit in kills), default=0)} steps; a SIGTERM none, with status 143. Every run ends "
            "with the `model.safetensors` and `metrics.jsonl` (without the columns of timing) of the one left alone, "
            "byte for byte."
        )
    about = (
        f"{STEPS} steps of {BATCH} rows, each logged, a checkpoint every {SAVE_STEPS}, two of them kept; `none` is one "
        f"process, the others are two over gloo. {minutes:.0f} minutes in all. {date.today()}, {_machine()}, "
        f"{os.cpu_count()} cores, 1 thread a process, torch {torch.__version__}."
    )
    table = [
        "| engine | left alone, s | to the first step, s | a step, s | a save, s | SIGKILLs | in a save | SIGTERMs | "
        "in a save | most steps lost | runs | ends with |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|", *lines,
    ]  # fmt: skip
    each = [
        "| hit | in | signal | to | in a save | went on from | reached | kept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    each += [
        f"| {n} | {hit.folder.name.replace('_', ' ')} | {hit.blow.signal.name} | {hit.blow.to} | "
        f"{'yes' if hit.in_save else 'no'} | {hit.found} | {hit.reached} | {hit.left} |"
        for n, hit in enumerate(hits, start=1)
    ]
    command = (
        f"`python benchmarks/kills.py engines --teacher {arguments.teacher.name} --student {arguments.student.name} "
        f"--kills {arguments.kills} --sigterms {arguments.sigterms} --seed {arguments.seed} "
        f"--engines {' '.join(arguments.engines)}`"
    )
    return "\n".join([verdict, "", about, "", *table, "", *each, "", command])


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


def training(recipe: str, folder: Path) -> list[str]:
    # What was killed before its first checkpoint cannot be continued, and is not overwritten without being told to.
    how = "--resume_from_checkpoint" if whole_checkpoint(folder) else "--overwrite_output_dir"
    return ["-m", "taid", "train", "--config", recipe, "--output_dir", str(folder), how]


def write_section(name: str, text: str) -> None:
    """Replace one section of the results."""
    parts = RESULTS.read_text().split("\n## ")[1:] if RESULTS.exists() else []
    sections = {title: rest.strip() for title, _, rest in (part.partition("\n") for part in parts)}
    sections[SECTIONS[name]] = text
    written = [f"## {title}\n\n{sections[title]}\n" for title in SECTIONS.values() if title in sections]
    RESULTS.write_text("\n".join(["# Killed at random moments\n", *written]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", choices=SECTIONS)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--sigterms", type=int, default=12, help="engines only")
    parser.add_argument("--engines", nargs="+", default=["none", "ddp", "fsdp2", "zero3"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kills"), help="a new folder")
    arguments = parser.parse_args()
    out, draw = arguments.out, random.Random(arguments.seed)
    if out.exists():
        parser.error(f"--out {out} is there already: remove it, or choose another folder")
    out.mkdir(parents=True)
    recipe = str(write_recipe(out, arguments.student, arguments.teacher, draw))
    wrong = {"cache": of_cache, "engines": of_engines}[arguments.runs](arguments, recipe, draw)
    print(RESULTS.read_text())
    if wrong:
        sys.exit("different from what was left alone:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
