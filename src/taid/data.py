"""From a file, glob, folder or Hub name to the rows that TRL takes; a bad row is found and named before training."""

from __future__ import annotations

import glob
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
# In the order in which a row with several of them is read; the other columns are dropped.
_KINDS = (
    ("input_ids", "labels"),
    ("input_ids",),
    ("messages",),
    ("prompt", "completion"),
)
_COMPANIONS = ("tools", "chat_template_kwargs")


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
    builder = _BUILDERS[files[0].suffix] if files else None
    # Text is checked line by line where it lies, because Arrow's own message names no line.
    if builder == "json":
        kind = _check_rows(itertools.chain.from_iterable(map(_json_rows, files)), name, text_field)
    elif builder == "text":
        for _ in itertools.chain.from_iterable(map(_lines, files)):
            pass
    with PartialState().local_main_process_first():
        dataset = _load(name, files, config, split, text_field)
    if builder != "json":
        kind = _check_rows(_arrow_rows(name, dataset), name, text_field)
    return dataset.select_columns([c for c in dataset.column_names if c in (*kind, *_COMPANIONS)])


def _load(name: str, files: list[Path], config: str | None, split: str, text_field: str) -> Dataset:
    folder = Path(name).expanduser()
    source = str(folder) if folder.is_dir() else name
    try:
        builder = _BUILDERS[files[0].suffix] if files else load_dataset_builder(source, config).name
        options = {"sample_by": "paragraph"} if builder == "text" else {}
        if files:
            paths = [glob.escape(str(path)) for path in files]
            dataset = load_dataset(builder, data_files=paths, split="train", **options)
        else:
            dataset = load_dataset(source, config, split=split, **options)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(f"{name} is neither a file, a glob, a folder nor a data set on the Hub") from error
    except (DatasetGenerationError, OSError, ValueError) as error:  # Arrow's own errors are ValueErrors
        reason = str(error.__cause__ or error)
        if "corresponds to no data" in reason:
            raise ValueError(_no_rows(name if files else f"{name}, split {split},")) from error
        remedy = " Set dataset_train_split or dataset_test_split." if reason.startswith("Unknown split") else ""
        raise ValueError(f"{name} could not be read: {reason}{remedy}") from error
    if builder == "text":
        dataset = dataset.filter(lambda row: row["text"].strip() != "")
        if text_field != "text":
            dataset = dataset.rename_column("text", text_field)
    return dataset


def _local_files(name: str) -> list[Path]:
    """The files that `name` means, or none where it is a folder or a Hub name."""
    path = Path(name).expanduser()
    if path.is_dir():
        return []
    is_glob = glob.has_magic(name) and not path.is_file()
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


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Each line of a text file with its number, from 1."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield number, line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 text: {error}: save the file as UTF-8") from error


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row of a JSON Lines file or a JSON array, with the place where it stands."""
    beginning = next((line.lstrip() for _, line in _lines(path) if line.strip()), "")
    if path.suffix == ".json" and beginning.startswith("["):
        content = "".join(line for _, line in _lines(path))
        try:
            rows = json.loads(content)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON: {error}") from error
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows))
        return
    for number, line in _lines(path):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
            yield f"{path}, line {number}", row


def _arrow_rows(name: str, dataset: Dataset) -> Iterator[tuple[str, Any]]:
    """Each row with its place. Arrow gives a column that a row lacks as None."""
    for number, row in enumerate(dataset):
        yield f"{name}, row {number}", {column: value for column, value in row.items() if value is not None}


def _check_rows(rows: Iterable[tuple[str, Any]], name: str, text_field: str) -> tuple[str, ...]:
    """The columns that every row has; the trainer takes the first row's for those of all."""
    first_kind: tuple[str, ...] = ()
    first_place = first_form = ""
    for place, row in rows:
        kind = _check_row(row, place, text_field)
        form = " and ".join(f"`{c}` as {'a list' if isinstance(row[c], list) else 'text'}" for c in kind)
        if not first_kind:
            first_kind, first_place, first_form = kind, place, form
        elif form != first_form:
            raise ValueError(
                f"{place}: the row has {form}, but {first_place} has {first_form}: bring all rows into one form"
            )
    if not first_kind:
        raise ValueError(_no_rows(name))
    return first_kind


def _no_rows(name: str) -> str:
    return f"{name} holds no rows: give data with at least one"


def _kind(row: dict[str, Any], text_field: str) -> tuple[str, ...] | None:
    return next((kind for kind in (*_KINDS, (text_field,)) if all(column in row for column in kind)), None)


def _no_kind(row: dict[str, Any], text_field: str) -> str:
    wanted = f"needs `messages`, `prompt` and `completion`, or `{text_field}` (dataset_text_field)"
    return f"the row {wanted}; it has {', '.join(f'`{c}`' for c in row) or 'nothing'}"


def _check_row(row: Any, place: str, text_field: str) -> tuple[str, ...]:
    """Check one row; returns the columns that it is read from."""
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
        if _text(message.get("content")) is None and not message.get("tool_calls"):
            raise ValueError(
                f"{place}: the content of a {message['role']} message must be text or a list of parts like "
                '{"type": "text", "text": "..."}'
            )
    last = messages[-1]
    if last["role"] == "assistant" and not last.get("tool_calls") and not (_text(last["content"]) or "").strip():
        raise ValueError(
            f"{place}: the assistant's last message is empty, so there is nothing to learn: remove the row"
        )


def _text(content: Any) -> str | None:
    """What a message says, as text or as a list of parts; None where it is neither."""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return "".join(str(part.get("text") or "") for part in content)
    return content if isinstance(content, str) else None
