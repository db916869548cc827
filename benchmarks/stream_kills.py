"""Does a killed run on a stream go on at the next unseen row, and how long does it take to go on late in a long one?

    python benchmarks/stream_kills.py --teacher DIR --student DIR [--kills 20] [--seed 0] [--rows 1000000]
                                      [--out runs/stream_kills]

1. Two corpora of numbered rows, and a `taid train` on each that nobody disturbs: `rows`, a .jsonl.gz row by row, and
   `packed`, a .jsonl.zst and a .parquet file mixed 2 to 1, packed, with two batches a step.
2. The same again, killed after up to 60 more batches and a part of a second, both drawn, and resumed, until half of the
   kills have hit each. A hook of this file writes down the rows of each batch by what its token ids say; a row
   counts as seen if its step is one that the student's weights went through.
3. Rows seen twice or never are counted, and weights and metrics compared with those left alone, byte for byte.
4. A stream of so many rows of 1 kB in four formats: `taid train` for two steps from the beginning, and for two steps
   from a checkpoint whose place is moved to the row behind 99 % of them, in seconds of CPU time.

The results go to benchmarks/results/stream_kills.md.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from kills import WORDS, Kill, checkpoints, different_run, finishes, whole_checkpoint
from step import _machine

RESULTS = Path(__file__).parent / "results" / "stream_kills.md"
STEPS, CORPUS = 100, 3_200
RECIPE = {
    "streaming": True, "max_steps": STEPS, "per_device_train_batch_size": CORPUS // STEPS, "learning_rate": 1e-3,
    "optim": "adamw_torch", "objective": "taid", "taid_alpha": "auto", "max_length": 256, "bf16": False,
    "activation_checkpointing": False, "logging_steps": 3, "save_strategy": "steps", "save_steps": 2,
    "save_total_limit": 2, "report_to": "none", "use_cpu": True,
}  # fmt: skip
# The command line, with a line for each batch: the step, and the numbers of its rows.
RECORDING = """
import json, os, re, sys
from taid.cli.main import main
from taid.losses.fused import shifted
from taid.teachers.sequences import sequences
from taid.training.trainer import TAIDTrainer
training_step = TAIDTrainer.training_step
def recording(self, model, inputs, *rest):
    starts = [s.ids[:16] for s in sequences(inputs, shifted(inputs["labels"]))]
    said = self.processing_class.batch_decode(starts, skip_special_tokens=True)
    rows = [re.match(r"\\s*([a-z]\\d+):", text)[1] for text in said]
    with open(f"{self.args.output_dir}.seen", "a") as file:
        file.write(json.dumps([self.state.global_step + 1, rows]) + "\\n")
    return training_step(self, model, inputs, *rest)
TAIDTrainer.training_step = recording
sys.exit(main(sys.argv[1:]))
"""


# --- rows -------------------------------------------------------------------------------------------------------------


def texts(name: str, count: int, size: int, draw: random.Random) -> Iterator[str]:
    some = [" ".join(draw.choices(WORDS, k=size)) for _ in range(1_000)]
    for number in range(count):
        yield f"{name}{number}: {some[number % 1_000]}"


def write(path: Path, rows: Iterator[str]) -> Path:
    """Write one text a row, in the format that the name says."""
    if path.suffix == ".parquet":
        with pq.ParquetWriter(path, pa.schema({"text": pa.string()})) as writer:
            while some := [text for _, text in zip(range(10_000), rows, strict=False)]:
                writer.write_table(pa.table({"text": some}))
        return path
    with written(path) as file:
        for text in rows:
            file.write(json.dumps({"text": text}).encode() + b"\n")
    return path


def written(path: Path) -> BinaryIO:
    if path.suffix == ".zst":
        return pa.output_stream(str(path), compression="zstd", buffer_size=1 << 20)
    return gzip.open(path, "wb", compresslevel=1) if path.suffix == ".gz" else path.open("wb")


def seen(folder: Path, batches: int) -> Counter[str]:
    """How often each row was trained on in a step that the weights went through."""
    steps: dict[int, list[list[str]]] = {}
    for line in folder.with_name(f"{folder.name}.seen").read_text().split("\n")[:-1]:
        step, rows = json.loads(line)
        steps.setdefault(step, []).append(rows)
    # A step that was lost with its process was taken again, from its first batch.
    return Counter(row for taken in steps.values() for rows in taken[-batches:] for row in rows)


# --- killing ----------------------------------------------------------------------------------------------------------


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def finishes_before(command: list[str], log: Path, folder: Path, draw: random.Random) -> bool:
    """Run a command until it has trained on so many more batches; False if a SIGKILL then hit it alive."""
    record = folder.with_name(f"{folder.name}.seen")
    until, moment = lines(record) + draw.randint(1, 60), draw.uniform(0, 0.3)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("a") as output:
        process = subprocess.Popen([sys.executable, *command], stdout=output, stderr=output, env=environment)
        while process.poll() is None and lines(record) < until:
            time.sleep(0.002)
        time.sleep(moment)
        process.kill()
        status = process.wait()
    if status not in (0, -signal.SIGKILL):
        sys.exit(f"status {status} of {' '.join(command)}\n{log.read_text()[-3000:]}")
    return status == 0


def disturbed(
    prefix: Path, command: Callable[[Path], list[str]], hits: int, draw: random.Random
) -> tuple[list[Path], list[Kill]]:
    """Kill a run so often, and let every one that was killed come to its end; returns their folders and the kills."""
    folders: list[Path] = []
    kills: list[Kill] = []
    while len(kills) < hits:
        folder, finished = prefix.with_name(f"{prefix.name}_{len(folders) + 1}"), False
        folders.append(folder)
        while not finished:
            found, start = checkpoints(folder), time.perf_counter()
            log = prefix.with_name("log.txt")
            finished = (
                finishes_before(command(folder), log, folder, draw)
                if len(kills) < hits
                else finishes(command(folder), log)
            )
            if not finished:
                kills.append(Kill(folder, time.perf_counter() - start, found, checkpoints(folder)))
            print(f"{folder.name}: {'finished' if finished else f'{len(kills)} {kills[-1]}'}", file=sys.stderr)
    return folders, kills


def kills_of(
    name: str, names: list[Path], options: dict[str, Any], out: Path, common: dict[str, Any], hits: int,
    draw: random.Random,
) -> tuple[list[Kill], list[str], str]:  # fmt: skip
    """Kill one kind of run so often; returns the kills, what differs, and a line of the table."""
    recipe = out / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | common | options | {"dataset_name": [str(path) for path in names]}))

    def command(folder: Path) -> list[str]:
        how = "--resume_from_checkpoint" if whole_checkpoint(folder) else "--overwrite_output_dir"
        if how == "--overwrite_output_dir":  # nothing of it is in any weights
            folder.with_name(f"{folder.name}.seen").unlink(missing_ok=True)
        return ["-c", RECORDING, "train", "--config", str(recipe), "--output_dir", str(folder), how]

    alone = out / f"{name}_alone"
    finishes(command(alone), out / "log.txt")
    folders, kills = disturbed(out / name, command, hits, draw)
    batches = options.get("gradient_accumulation_steps", 1)
    expected, wrong = seen(alone, batches), []
    twice = never = 0
    for folder in folders:
        found = seen(folder, batches)
        twice += sum(times > 1 for times in found.values())
        never += len(expected.keys() - found.keys())
        wrong += different_run(folder, alone)
    if twice or never or max(expected.values()) > 1 or (name == "rows" and len(expected) != CORPUS):
        wrong.append(f"{name}: rows seen twice {twice}, never {never}")
    line = (
        f"| {name} | {len(kills)} | {len(folders)} | {len(expected):,} | {twice} | {never} | "
        f"{'no' if any(str(out / name) in text for text in wrong) else 'yes'} |"
    )
    return kills, wrong, line


# --- late in a long stream --------------------------------------------------------------------------------------------


def place_behind(path: Path, row: int) -> list[int]:
    """Return where a row of a file ends, as `taid.data.stream_sources.Files` says it."""
    if path.suffix == ".parquet":
        return [0, row, row - 1]
    from taid.data import loading

    with loading.opened(path) as file:
        return [0, sum(len(next(file)) for _ in range(row)), row]


def cpu_seconds() -> float:
    """Return the CPU time of all processes that have ended: on a shared machine the clock would say what others do."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def late(path: Path, rows: int, out: Path, common: dict[str, Any]) -> str:
    """A line of the table: two steps from the beginning, and two from behind 99 % of the rows."""
    run, recipe = out / f"late_{path.name}", out / f"late_{path.name}.yaml"
    options = {"dataset_name": str(path), "max_steps": 4, "save_total_limit": None, "packing": True}
    options["per_device_train_batch_size"] = 1  # so that the steps take next to no time
    recipe.write_text(yaml.safe_dump(RECIPE | common | options | {"output_dir": str(run)}))
    command = ["-m", "taid", "train", "--config", str(recipe)]
    seconds, start = {}, cpu_seconds()
    finishes([*command, "--overwrite_output_dir"], out / "log.txt")
    seconds["fresh"] = cpu_seconds() - start
    shutil.rmtree(run / "checkpoint-4")
    state = run / "checkpoint-2" / "trainer_state.json"
    values = json.loads(state.read_text())
    row = rows * 99 // 100
    place = {"chunk": row // 1_000, "passes": [0], "sources": [place_behind(path, row)], "prepared": 0}
    values["stateful_callbacks"]["TAIDTrainer"]["places"] = [place]
    state.write_text(json.dumps(values))
    start = cpu_seconds()
    finishes([*command, "--resume_from_checkpoint"], out / "log.txt")
    seconds["late"] = cpu_seconds() - start
    print(f"{path.name}: {seconds}", file=sys.stderr)
    return (
        f"| {path.suffix} | {path.stat().st_size / 1e9:.2f} GB | {seconds['fresh']:.1f} | {seconds['late']:.1f} | "
        f"{seconds['late'] / seconds['fresh']:.2f} |"
    )


def markdown(
    arguments: argparse.Namespace, kills: list[Kill], wrong: list[str], counts: list[str], long: list[str]
) -> str:
    verdict = f"**{len(kills)} SIGKILLs hit living processes.** " + (
        "**DIFFERENT**:\n\n" + "\n".join(f"- {line}" for line in wrong)
        if wrong
        else "No row was seen twice, none never, and every student ends with the `model.safetensors` and "
        "`metrics.jsonl` (without the columns of timing) of the one left alone, byte for byte."
    )
    lines = [
        "# Streams killed at random moments", "", verdict, "",
        f"{STEPS} steps, a checkpoint every {RECIPE['save_steps']}. Rows are known by their token ids in the batches, "
        f"and count as seen if the weights went through their step. {_machine()}, 1 thread, torch {torch.__version__}.",
        "", "| run | kills | runs | rows seen | twice | never | ends like the one left alone |",
        "|---|---|---|---|---|---|---|", *counts, "",
        "`rows`: one .jsonl.gz, every row of it once. `packed`: a .jsonl.zst and a .parquet file mixed 2 to 1, packed, "
        "two batches a step.", "",
        "## Late in a long stream", "",
        f"{arguments.rows:,} rows of 1 kB. `taid train` for its first four steps, and for the last two of them from a "
        "checkpoint whose place was moved behind 99 % of the rows. CPU time of whole processes, imports included.", "",
        "| format | size | from the beginning, 4 steps, s | late, 2 steps, s | ratio |", "|---|---|---|---|---|",
        *long, "",
        "## The kills", "", "| kill | in | after, s | the process found | and left |", "|---|---|---|---|---|",
        *(f"| {n} | {k.folder.name.replace('_', ' ')} | {k.seconds:.1f} | {k.found} | {k.left} |"
          for n, k in enumerate(kills, 1)), "",
        f"`python benchmarks/stream_kills.py --teacher {arguments.teacher.name} --student {arguments.student.name} "
        f"--kills {arguments.kills} --seed {arguments.seed} --rows {arguments.rows}`", "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the long stream")
    parser.add_argument("--out", type=Path, default=Path("runs/stream_kills"), help="a new folder")
    arguments = parser.parse_args()
    out, draw = arguments.out, random.Random(arguments.seed)
    if out.exists():
        parser.error(f"--out {out} is there already: remove it, or choose another folder")
    out.mkdir(parents=True)
    common = {"model_name_or_path": str(arguments.student), "teacher_model_name_or_path": str(arguments.teacher)}

    one = write(out / "a.jsonl.gz", texts("a", CORPUS, 8, draw))
    both = [write(out / name, texts(name[0], 100_000, 8, draw)) for name in ("a.jsonl.zst", "b.parquet")]
    mixed = {"dataset_weights": [2.0, 1.0], "packing": True, "per_device_train_batch_size": 2}
    mixed |= {"gradient_accumulation_steps": 2}
    half = arguments.kills // 2
    kills, wrong, first = kills_of("rows", [one], {}, out, common, half, draw)
    more, also, second = kills_of("packed", both, mixed, out, common, arguments.kills - half, draw)

    long = []
    for suffix in (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"):
        path = write(out / f"long{suffix}", texts("a", arguments.rows, 240, draw))
        long.append(late(path, arguments.rows, out, common))
        path.unlink()
    wrong += also
    RESULTS.write_text(markdown(arguments, [*kills, *more], wrong, [first, second], long))
    print(RESULTS.read_text())
    if wrong:
        sys.exit("different from what was left alone:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
