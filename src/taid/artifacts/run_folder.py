"""The files of a run in its `output_dir`: written whole, found and read again.

config.yaml      the resolved configuration           metrics.jsonl   one object a logged step
versions.json    versions, machine, N                  checkpoint-N/   written by transformers
evaluation.json  what taid evaluate --output RUN/evaluation.json measured
report.html, t.png, loss.png, and the student as an ordinary save_pretrained folder
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

CONFIG, VERSIONS, METRICS, EVALUATION = "config.yaml", "versions.json", "metrics.jsonl", "evaluation.json"
UNFINISHED = "checkpoint.partial"  # where a checkpoint is written before it is whole
# What taid, transformers and peft write beside the checkpoints; a file of the user's own is never deleted.
_OWN_FILES = (
    "config.yaml versions.json metrics.jsonl evaluation.json evaluation.speed.md "
    "evaluation.generations.jsonl evaluation.before.generations.jsonl report.html t.png loss.png README.md "
    "*.safetensors *.safetensors.index.json config.json generation_config.json adapter_config.json tokenizer* "
    "special_tokens_map.json added_tokens.json vocab.json merges.txt chat_template.jinja *processor_config.json "
    "*.partial"
).split()
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds another run, unless told to overwrite; nothing is deleted here.

    Raises:
        ValueError: the folder holds a run and `overwrite` is false, or other files, which taid never deletes.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file")
    if not any(folder.iterdir()):
        return
    is_run = (folder / CONFIG).exists() or (folder / METRICS).exists() or last_checkpoint(folder) is not None
    is_run = is_run or any(folder.glob("*.partial"))  # a kill in the very first write
    if not is_run:
        raise ValueError(f"output_dir {folder} holds files that are no taid run: choose another folder")
    if not overwrite:
        raise ValueError(
            f"output_dir {folder} holds another run: choose another folder, continue it with "
            "--resume_from_checkpoint, or delete it with --overwrite_output_dir"
        )


def clear(folder: Path) -> None:
    """Delete what a run wrote, so that a new one starts from nothing."""
    # config.yaml goes last: a kill in between leaves a folder that is still known as a run's.
    for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG) if folder.exists() else ():
        is_checkpoint = _CHECKPOINT.fullmatch(path.name) is not None
        if is_checkpoint and path.is_symlink():
            path.unlink()
        elif (is_checkpoint or path.name == UNFINISHED) and path.is_dir():
            shutil.rmtree(path)
        elif path.is_file() and any(path.match(pattern) for pattern in _OWN_FILES):
            path.unlink()


@contextlib.contextmanager
def written(name: str) -> Iterator[None]:
    """Raise an OSError where torch or safetensors cannot write; what they raise themselves names no cause."""
    from safetensors import SafetensorError

    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # not torch's writer of files
            raise
        raise OSError(
            f"{name} could not be written ({str(error).strip()}): is the disk full? Make room, and go on from the last "
            "whole checkpoint with --resume_from_checkpoint"
        ) from error


@contextlib.contextmanager
def unfinished(folder: Path, name: str, *, is_writer: bool, wait: Callable[[], None]) -> Iterator[Path]:
    """Give a folder for a checkpoint; at the end of this context it gets its name, whole and on disk.

    A kill, or a machine that is lost, leaves the whole checkpoint or none of that name.

    Args:
        folder: of the run.
        name: of the checkpoint.
        is_writer: whether this process, of all that write, makes the folders.
        wait: returns when all processes have called it.
    """
    made, final = folder / UNFINISHED / name, folder / name
    if is_writer:
        shutil.rmtree(made.parent, ignore_errors=True)  # of a save that was killed
    wait()
    with written(name):
        yield made
    wait()
    if is_writer:
        for path in made.rglob("*"):
            _to_disk(path)
        if final.exists():  # of the same step, saved again
            os.replace(final, made.parent / "old")
        os.replace(made, final)
        _to_disk(folder)
        shutil.rmtree(made.parent)
    wait()


def thin_out(folder: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints but for `limit` of them, the last one and the best, as transformers does.

    Each loses its name first: a kill while its files go leaves no checkpoint that lacks some of them.
    """
    found = [path for _, path in _checkpoints(folder)]
    kept = {*found[-1:], *([Path(best)] if best else [])}
    number = len(found) - max(limit or len(found), len(kept))
    for path in [path for path in found if path not in kept][: max(number, 0)]:
        nameless = folder / UNFINISHED / path.name
        nameless.parent.mkdir(exist_ok=True)
        os.replace(path, nameless)
        shutil.rmtree(nameless.parent)


def _to_disk(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # which cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def claimed(folder: Path, name: str = "output_dir") -> Iterator[None]:
    """Hold the folder against a second process; the operating system lets go when this one ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock; two runs in one folder are then not noticed
        yield
        return
    paths = (folder, *folder.parents)
    made = list(itertools.takewhile(lambda path: not os.path.lexists(path), paths))
    if len(made) < len(paths) and not (there := paths[len(made)]).is_dir():
        raise ValueError(f"{name} {folder}: {there} is a file: choose another folder")
    descriptor = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            made.clear()  # now the other's
            raise ValueError(
                f"{name} {folder} is in use by another taid process: wait for it, or choose another folder"
            ) from None
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
        for path in made:
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that is whole. A kill while saving leaves one without a readable trainer_state.json."""
    for _, path in reversed(_checkpoints(folder)):
        with contextlib.suppress(OSError, ValueError):
            if isinstance(json.loads((path / "trainer_state.json").read_text(encoding="utf-8")), dict):
                return path
    return None


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints with their steps, the first one first."""
    return sorted((int(m[1]), path) for path in folder.iterdir() if (m := _CHECKPOINT.fullmatch(path.name)))


def checkpoint_to_resume(output_dir: Path, asked: str | bool | None) -> Path | None:
    """Return the checkpoint that ``--resume_from_checkpoint [PATH]`` means; None for a new run.

    Raises:
        ValueError: there is no whole checkpoint, or it belongs to another folder.
    """
    if asked is None or str(asked).lower() == "false":
        return None
    folder = output_dir if str(asked).lower() == "true" else Path(str(asked)).expanduser()
    if not folder.is_dir():
        raise ValueError(f"cannot resume: folder {folder} does not exist")
    checkpoint = folder if (folder / "trainer_state.json").exists() else last_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(
            f"cannot resume: {folder} holds no complete checkpoint; start without --resume_from_checkpoint, and "
            "with --overwrite_output_dir where a run has begun there"
        )
    if checkpoint.resolve().parent != output_dir.resolve():
        raise ValueError(
            f"cannot resume: {checkpoint} belongs to the run in {checkpoint.parent}, not to output_dir {output_dir}: "
            "name that folder as output_dir, or copy it"
        )
    check_resumable(checkpoint)
    return checkpoint


def check_resumable(checkpoint: Path) -> None:
    """Refuse a checkpoint that lacks the optimizer's state, is damaged, or is older than others of the same run.

    Raises:
        ValueError: names what is missing or damaged, or the later checkpoint.
    """
    has_optimizer = any(checkpoint.glob("optimizer*")) or any(checkpoint.glob("global_step*"))
    if not has_optimizer or not any(checkpoint.glob("scheduler*")):
        raise ValueError(
            f"cannot resume: {checkpoint} lacks the state of the optimizer or of the learning rate (save_only_model?), "
            "so the run would not go on but start anew from its weights"
        )
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    archives = [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]  # torch writes zip archives
    damaged = [path for path in archives if not zipfile.is_zipfile(path)]
    damaged += [path for path in checkpoint.glob("*.safetensors") if not _is_safetensors(path)]
    damaged += [path for path in checkpoint.glob("sampling.json") if not _is_json(path)]
    damaged += [checkpoint / "trainer_state.json"] if not {"global_step", "max_steps"} <= state.keys() else []
    if damaged:
        raise ValueError(
            f"cannot resume: {damaged[0]} is truncated or damaged; delete {checkpoint.name} to resume an earlier one"
        )
    last = last_checkpoint(checkpoint.parent)
    if last is not None and last.resolve() != checkpoint.resolve():
        raise ValueError(
            f"cannot resume at {checkpoint.name}: {last.name} of the same run is later; delete it to go back, or copy "
            "the folder"
        )


def _is_safetensors(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            return True
    except SafetensorError:
        return False


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
        return True
    except ValueError:
        return False


def start(
    folder: Path, configuration: dict[str, Any], *, total_steps: int, processes: int, device: str, engine: str
) -> None:
    """Write config.yaml and versions.json."""
    packages = ("taid", "torch", "transformers", "trl", "accelerate", "datasets", "peft")
    versions = {name: metadata.version(name) for name in packages} | {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "processes": processes,
        "engine": engine,
        "total_steps": total_steps,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CONFIG, yaml.safe_dump(configuration, sort_keys=True, allow_unicode=True))
    write_atomically(folder / VERSIONS, json.dumps(versions, indent=2) + "\n")


def append_metrics(folder: Path, row: dict[str, Any]) -> None:
    """Append one logged step to metrics.jsonl."""
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def truncate_metrics(folder: Path, step: int) -> None:
    """Forget what was logged after `step`: a resumed run logs it again."""
    rows = read_metrics(folder) if (folder / METRICS).exists() else []
    write_atomically(folder / METRICS, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; a last line without its end (a killed or still writing run) is left out.

    Raises:
        ValueError: another line is broken; names it.
    """
    path = folder / METRICS
    lines = path.read_bytes().split(b"\n")[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}: remove the line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is no JSON object: remove the line")
        rows.append(row)
    return rows


def read_mapping(path: Path, parse: Callable[[str], Any] = json.loads) -> dict[str, Any]:
    """Read a file of JSON, or of what `parse` reads; return an empty mapping where there is no such file.

    Raises:
        ValueError: the file is broken, or holds something other than a mapping; names it.
    """
    if not path.is_file():
        return {}
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}: write it again or remove it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a mapping of names to values, got {type(content).__name__}")
    return content


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that is either the old one or the whole new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(partial, path)
