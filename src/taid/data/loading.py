"""Load the rows that TRL takes from a file, glob, folder or Hub name; a bad row is found before training."""

from __future__ import annotations

import glob
import importlib.util
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
from accelerate import PartialState
from datasets import Dataset, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from taid.data import images
from taid.data.files import BUILDERS, COMPRESSIONS, file_type, local_files

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# In the order in which a row with several of them is read; the other columns are dropped.
_KINDS = (
    ("input_ids", "labels"),
    ("input_ids",),
    ("messages",),
    ("prompt", "completion"),
)
_COMPANIONS = ("tools", "chat_template_kwargs", *images.COLUMNS)


def load_rows(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    text_field: str = "text",
    skip_bad_images: bool = False,
) -> Dataset:
    """Load rows and check every one of them.

    Args:
        name: a ``.jsonl``, ``.json``, ``.parquet`` or ``.txt`` file, also with ``.gz`` or ``.zst`` behind it, a glob of
            such files, a folder, or a Hub name.
        config: configuration name of a Hub data set.
        split: split of a Hub data set or a folder; a single file or glob has one.
        text_field: the column that holds plain text.
        skip_bad_images: leave out rows whose image files cannot be read.

    Returns:
        Rows with ``messages``, ``prompt`` and ``completion``, ``input_ids``, or `text_field`, and their ``images``.

    Raises:
        FileNotFoundError: nothing at that place.
        ValueError: no rows, or a bad row: names the file and line (or row) and what is wrong with it.
        ImportError: a ``.zst`` file, which `datasets` unpacks with the package zstandard.
    """
    files = local_files(name)
    if any(file.suffix == ".zst" for file in files) and importlib.util.find_spec("zstandard") is None:
        raise ImportError(
            f"{name}: to unpack .zst files needs: pip install zstandard; streaming: true needs no package"
        )
    builder = BUILDERS[file_type(files[0])] if files else None
    check = RowCheck(text_field)
    # Text is checked line by line where it lies, because Arrow's own message names no line.
    if builder == "json":
        check.all(images.with_paths(itertools.chain.from_iterable(map(_json_rows, files))), name)
    elif builder == "text":
        for _ in itertools.chain.from_iterable(map(_lines, files)):
            pass
    with PartialState().local_main_process_first():
        dataset = load(name, files, config, split, text_field)
    if builder != "json":
        check.all(_arrow_rows(name, dataset), name)
    dataset = dataset.select_columns([c for c in dataset.column_names if c in check.columns])
    if not images.has_images(dataset):
        return dataset
    # Read once more, because only rows with images need their places later.
    places = [place for file in files for place, _ in _json_rows(file)] if builder == "json" else None
    folder = files[0].parent if files else None
    return images.prepared(dataset, name, places=places, folder=folder, skip=skip_bad_images)


def load(
    name: str, files: list[Path], config: str | None, split: str, text_field: str, *, streaming: bool = False
) -> Any:
    """Load a name with `datasets`; return an ``IterableDataset`` if `streaming` is true."""
    folder = Path(name).expanduser()
    source = str(folder) if folder.is_dir() else name
    try:
        builder = BUILDERS[file_type(files[0])] if files else load_dataset_builder(source, config).name
        options = {"sample_by": "paragraph"} if builder == "text" else {}
        if files:
            paths = [glob.escape(str(path)) for path in files]
            dataset = load_dataset(builder, data_files=paths, split="train", **options)
        else:
            dataset = load_dataset(source, config, split=split, streaming=streaming, **options)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(f"{name} is neither a file, a glob, a folder nor a data set on the Hub") from error
    except (DatasetGenerationError, OSError, ValueError) as error:  # Arrow's own errors are ValueErrors
        reason = str(error.__cause__ or error)
        if "corresponds to no data" in reason:
            raise ValueError(no_rows(name if files else f"{name}, split {split},")) from error
        remedy = " Set dataset_train_split or dataset_test_split." if reason.startswith("Unknown split") else ""
        raise ValueError(f"{name} could not be read: {reason}{remedy}") from error
    if builder == "text":
        dataset = dataset.filter(lambda row: row["text"].strip() != "")
        if text_field != "text":
            dataset = dataset.rename_column("text", text_field)
    return dataset


def opened(path: Path) -> BinaryIO:
    """Open a file for reading without its compression; nothing is unpacked to disk."""
    compression = COMPRESSIONS.get(path.suffix)
    return (
        io.BufferedReader(pa.input_stream(str(path), compression=compression), 1 << 20)
        if compression
        else (path.open("rb"))
    )


def numbered_lines(file: BinaryIO, path: Path, number: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield the remaining lines of a file with their numbers; `number` lines have been read already."""
    try:
        for line in file:
            number += 1
            yield number, line
    except OSError as error:  # what Arrow raises for an archive
        raise ValueError(f"{path}, after line {number}: {error}: the file is damaged or cut off") from error


def decoded(line: bytes, place: str) -> str:
    """Return a line as text."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 text: {error}: save the file as UTF-8") from error


def json_row(line: bytes, place: str) -> Any:
    """Parse a line of JSON Lines."""
    text = decoded(line, place)
    try:
        row = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair, which is no text for a tokenizer
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON: {error}") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: half of a surrogate pair, {error.object[error.start]!a}: remove it") from error
    return row


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield each line of a text file with its number, starting at 1."""
    with opened(path) as file:
        for number, line in numbered_lines(file, path):
            yield number, decoded(line, f"{path}, line {number}")


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each row of a JSON Lines file or a JSON array with its place."""
    beginning = next((line.lstrip() for _, line in _lines(path) if line.strip()), "")
    if file_type(path) == ".json" and beginning.startswith("["):
        content = "".join(line for _, line in _lines(path))
        try:
            rows = json.loads(content)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON: {error}") from error
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows))
        return
    with opened(path) as file:
        for number, line in numbered_lines(file, path):
            if line.strip():
                yield (place := f"{path}, line {number}"), json_row(line, place)


def _arrow_rows(name: str, dataset: Dataset) -> Iterator[tuple[str, Any]]:
    """Yield each row with its place. Arrow represents a missing column as None."""
    for number, row in enumerate(dataset):
        yield f"{name}, row {number}", without_none(row)


def without_none(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of Arrow's without the columns that are missing in it."""
    return {column: value for column, value in row.items() if value is not None}


class RowCheck:
    """Check rows one by one, and that all have the same form: the trainer assumes the form of the first row.

    Args:
        text_field: the column that holds plain text.
    """

    def __init__(self, text_field: str) -> None:
        self.text_field = text_field
        self.columns: tuple[str, ...] = ()
        """What is read of a row, once there was one."""
        self._first_place = self._first_form = ""

    def __call__(self, row: Any, place: str) -> dict[str, Any]:
        """Return the row without the columns that are not read.

        Raises:
            ValueError: the row is bad, or has another form than the first; names the place and what is wrong.
        """
        kind = _check_row(row, place, self.text_field)
        form = " and ".join(f"`{c}` as {'a list' if isinstance(row[c], list) else 'text'}" for c in kind)
        if not self.columns:
            self.columns, self._first_place, self._first_form = (*kind, *_COMPANIONS), place, form
        elif form != self._first_form:
            raise ValueError(
                f"{place}: the row has {form}, but {self._first_place} has {self._first_form}: bring all rows into one "
                "form"
            )
        return {column: value for column, value in row.items() if column in self.columns}

    def all(self, rows: Iterable[tuple[str, Any]], name: str) -> None:
        """Check all rows of `name`; there must be at least one."""
        for place, row in rows:
            self(row, place)
        if not self.columns:
            raise ValueError(no_rows(name))


def no_rows(name: str) -> str:
    """Return the message for data without rows."""
    return f"{name} holds no rows: give data with at least one"


def _kind(row: dict[str, Any], text_field: str) -> tuple[str, ...] | None:
    return next((kind for kind in (*_KINDS, (text_field,)) if all(column in row for column in kind)), None)


def _no_kind(row: dict[str, Any], text_field: str) -> str:
    wanted = f"needs `messages`, `prompt` and `completion`, or `{text_field}` (dataset_text_field)"
    return f"the row {wanted}; it has {', '.join(f'`{c}`' for c in row) or 'nothing'}"


def _check_row(row: Any, place: str, text_field: str) -> tuple[str, ...]:
    """Check one row and return the columns that it is read from."""
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a row must be a JSON object, not {type(row).__name__}")
    kind = _kind(row, text_field)
    if kind is None:
        raise ValueError(f"{place}: {_no_kind(row, text_field)}")
    if kind[0] == "input_ids":
        _check_ids(row, kind, place)
        return kind
    if kind == ("messages",):
        _check_messages(row["messages"], f"{place}: messages")
        return kind
    for column in kind:
        if isinstance(row[column], list) and column != text_field:
            _check_messages(row[column], f"{place}: {column}")
        elif not isinstance(row[column], str):
            raise ValueError(f"{place}: {column} must be text, not {type(row[column]).__name__}")
        elif column != "prompt" and not row[column].strip():
            raise ValueError(f"{place}: {column} is empty, so there is nothing to learn from this row: remove it")
    if len({type(row[column]) for column in kind}) > 1:
        raise ValueError(f"{place}: prompt and completion must both be text or both be lists of messages")
    return kind


def _check_ids(row: dict[str, Any], kind: tuple[str, ...], place: str) -> None:
    for column in kind:
        if not isinstance(row[column], list) or set(map(type, row[column])) != {int}:
            raise ValueError(f"{place}: {column} must be a non-empty list of integers, got {row[column]!r:.80}")
        if len(row[column]) != len(row["input_ids"]):
            raise ValueError(
                f"{place}: labels must be as many as input_ids, {len(row['input_ids'])}, not {len(row[column])}"
            )


def _check_messages(messages: Any, place: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{place} must be a non-empty list of messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{place}: each message needs a `role` and a `content`, got {message!r:.80}")
        if text_of(message.get("content")) is None and not message.get("tool_calls"):
            raise ValueError(
                f"{place}: the content of a {message['role']} message must be text or a list of parts like "
                '{"type": "text", "text": "..."}'
            )
    last = messages[-1]
    if last["role"] == "assistant" and not last.get("tool_calls") and not (text_of(last["content"]) or "").strip():
        raise ValueError(
            f"{place}: the assistant's last message is empty, so there is nothing to learn: remove the row"
        )


def text_of(content: Any) -> str | None:
    """Return the text of a message's content, which is text or a list of parts; None if it is neither."""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return "".join(str(part.get("text") or "") for part in content)
    return content if isinstance(content, str) else None
