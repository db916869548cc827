"""From a file, glob, folder or Hub name to the rows that TRL takes; a bad row is found and named before training."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
# In the order in which a row with several of them is read; the other columns are dropped.
_KINDS = (
    ("input_ids",),
    ("messages",),
    ("prompt", "completion"),
)
_COMPANIONS = ("labels", "tools", "chat_template_kwargs")


def load_rows(name: str, *, config: str | None = None, split: str = "train", text_field: str = "text") -> Dataset:
    """Load rows and check every one of them.

    Args:
        name: a ``.jsonl``, ``.json``, ``.parquet`` or ``.txt`` file, a glob of such files, a folder, or a Hub name.
        config: configuration name of a Hub data set.
        split: split of a Hub data set or a folder; a single file or glob has one.
        text_field: the column that holds plain text.

    Returns:
        Rows with ``messages``, ``prompt`` and ``completion``, ``input_ids``, or `text_field`.

    Raises:
        FileNotFoundError: nothing at that place.
        ValueError: no rows, or a bad row: names the file and line (or row) and what is wrong with it.
    """
    files = _local_files(name)
    # Text is checked line by line where it lies, because Arrow's own message names no line.
    for path in files:
        if _BUILDERS[path.suffix] == "json":
            for place, row in _json_rows(path):
                _check_row(row, place, text_field)
    with PartialState().local_main_process_first():
        dataset = _load(name, files, config, split)
    if dataset.num_rows and files and files[0].suffix == ".txt":
        dataset = dataset.filter(lambda row: row["text"].strip() != "").rename_column("text", text_field)
    if dataset.num_rows == 0:
        raise ValueError(f"{name} holds no rows")
    kind = _kind(dataset[0], text_field)
    if kind is None:
        raise ValueError(f"{name}: {_no_kind(dataset[0], text_field)}")
    if not files or files[0].suffix == ".parquet":
        for number, row in enumerate(dataset):
            _check_row(row, f"{name}, row {number}", text_field)
    return dataset.select_columns([c for c in dataset.column_names if c in (*kind, *_COMPANIONS)])


def _load(name: str, files: list[Path], config: str | None, split: str) -> Dataset:
    try:
        if not files:
            return load_dataset(name, config, split=split)
        builder = _BUILDERS[files[0].suffix]
        options = {"sample_by": "paragraph"} if builder == "text" else {}
        return load_dataset(builder, data_files=[str(path) for path in files], split="train", **options)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(f"{name} is neither a file, a glob, a folder nor a data set on the Hub") from error
    except (DatasetGenerationError, OSError) as error:
        raise ValueError(f"{name} could not be read: {error.__cause__ or error}") from error


def _local_files(name: str) -> list[Path]:
    """The files that `name` means, or none where it is a folder or a Hub name."""
    path = Path(name).expanduser()
    if path.is_dir():
        return []
    is_glob = glob.has_magic(name)
    if path.suffix not in _BUILDERS and not is_glob:
        if path.is_file():
            raise ValueError(f"{name}: files of type {path.suffix!r} are not read; use {', '.join(_BUILDERS)}")
        return []
    files = sorted(Path(match) for match in glob.glob(str(path), recursive=True)) if is_glob else [path]
    if not files:
        raise FileNotFoundError(f"no file matches {name}")
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"data file {file} does not exist")
        if file.suffix != files[0].suffix or file.suffix not in _BUILDERS:
            raise ValueError(f"{name} must match files of one type among {', '.join(_BUILDERS)}; it matches {file}")
    if all(file.stat().st_size == 0 for file in files):
        raise ValueError(f"{name} is empty")
    return files


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row of a JSON Lines file or a JSON array, with the place where it stands."""
    try:
        with path.open(encoding="utf-8") as lines:
            if path.suffix == ".json" and lines.read(1) == "[":
                lines.seek(0)
                yield from ((f"{path}, row {number}", row) for number, row in enumerate(json.load(lines)))
                return
            lines.seek(0)
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        yield f"{path}, line {number}", json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _kind(row: dict[str, Any], text_field: str) -> tuple[str, ...] | None:
    return next((kind for kind in (*_KINDS, (text_field,)) if all(column in row for column in kind)), None)


def _no_kind(row: dict[str, Any], text_field: str) -> str:
    wanted = f"needs `messages`, `prompt` and `completion`, or `{text_field}` (dataset_text_field)"
    return f"the row {wanted}; it has {', '.join(f'`{c}`' for c in row) or 'nothing'}"


def _check_row(row: Any, place: str, text_field: str) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a row must be a JSON object, not {type(row).__name__}")
    kind = _kind(row, text_field)
    if kind is None:
        raise ValueError(f"{place}: {_no_kind(row, text_field)}")
    if kind == ("input_ids",):
        return
    if kind == ("messages",):
        _check_messages(row["messages"], f"{place}: messages")
        return
    for column in kind:
        if isinstance(row[column], list) and column != text_field:
            _check_messages(row[column], f"{place}: {column}")
        elif not isinstance(row[column], str):
            raise ValueError(f"{place}: {column} must be text, not {type(row[column]).__name__}")
        elif column != "prompt" and not row[column].strip():
            raise ValueError(f"{place}: {column} is empty, so there is nothing to learn from this row: remove it")


def _check_messages(messages: Any, place: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{place} must be a non-empty list of messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{place}: each message needs a `role` and a `content`, got {message!r:.80}")
        if not isinstance(message.get("content"), (str, list)) and not message.get("tool_calls"):
            raise ValueError(f"{place}: the content of a {message['role']} message must be text")
    last = messages[-1]
    if last["role"] == "assistant" and not last.get("tool_calls") and not (last["content"] or "").strip():
        raise ValueError(
            f"{place}: the assistant's last message is empty, so there is nothing to learn: remove the row"
        )
