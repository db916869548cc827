"""Sources of a stream: local files, which are read without unpacking, or a data set that `datasets` streams.

A source yields its rows in their order. Its position can be saved as JSON at any time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import IterableDataset
from datasets.iterable_dataset import BufferShuffledExamplesIterable

from taid.data import loading
from taid.data.files import file_type

_ROWS, _BLOCK = 1_000, 1 << 20  # of a .parquet file, and bytes of an archive, that are read at a time


class Source(ABC):
    """The rows of one name in their order."""

    name: str

    @abstractmethod
    def records(self, at: Any) -> Iterator[tuple[str, Any]]:
        """Yield place and record of each row from a position that :meth:`at` returned; from the start if it is None."""

    @abstractmethod
    def at(self) -> Any:
        """Return the position behind the last record, as JSON values."""

    @abstractmethod
    def row(self, record: Any, place: str) -> Any:
        """Parse a record into a row; records of other processes are not parsed."""

    @abstractmethod
    def identity(self) -> str:
        """Return what positions depend on: it must be the same when a run continues."""


class Files(Source):
    """Local files, read where they lie and without unpacking.

    Args:
        name: the user's name for them.
        files: files of one type.
        text_field: the column that the paragraphs of ``.txt`` become.

    Raises:
        ValueError: the content of a file does not match its suffix.
    """

    def __init__(self, name: str, files: list[Path], text_field: str) -> None:
        self.name, self.files, self.text_field = name, files, text_field
        self.type = file_type(files[0])
        self._at = [0, 0, 0]  # file, byte (without compression) or row behind the last record, and its line
        for path in files:
            if self.type == ".parquet":
                _parquet(path).close()
            else:
                with loading.opened(path) as file:
                    next(loading.numbered_lines(file, path), None)

    def records(self, at: Any) -> Iterator[tuple[str, Any]]:
        """See :class:`Source`."""
        self._at = list(at or (0, 0, 0))
        if self._at[0] >= len(self.files):
            raise ValueError(
                f"{self.name} has {len(self.files)} files; the checkpoint stands in another: resume with all"
            )
        return self._records(*self._at)

    def _records(self, file: int, offset: int, number: int) -> Iterator[tuple[str, Any]]:
        for index in range(file, len(self.files)):
            path = self.files[index]
            read = self._rows if self.type == ".parquet" else self._text
            for end, place, record in read(path, offset, number):
                self._at = [index, end, place]
                yield f"{path}, {'row' if self.type == '.parquet' else 'line'} {place}", record
            offset = number = 0

    def _text(self, path: Path, offset: int, lines: int) -> Iterator[tuple[int, int, bytes]]:
        """Yield lines or paragraphs, each with the byte and the line at its end."""
        paragraph: list[bytes] = []
        with loading.opened(path) as file:
            _go_to(file, offset, path)
            number = lines
            for number, line in loading.numbered_lines(file, path, lines):
                offset += len(line)
                is_blank = not line.strip()
                if self.type != ".txt" and not is_blank:
                    yield offset, number, line
                elif not is_blank:
                    paragraph.append(line)
                elif paragraph:
                    yield offset, number, b"".join(paragraph)
                    paragraph = []
        if paragraph:
            yield offset, number, b"".join(paragraph)

    def _rows(self, path: Path, row: int, _: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Yield rows, each with the number of the next one and its own."""
        with _parquet(path) as file:
            first = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if first + count <= row:
                    first += count
                    continue
                for batch in _batches(file, group, path):
                    for number, values in enumerate(batch.slice(max(row - first, 0)).to_pylist(), max(row, first)):
                        yield number + 1, number, values
                    first += len(batch)

    def at(self) -> list[int]:
        """See :class:`Source`."""
        return list(self._at)

    def row(self, record: Any, place: str) -> Any:
        """See :class:`Source`."""
        if self.type == ".parquet":
            return loading.without_none(record)
        if self.type == ".txt":
            return {self.text_field: loading.decoded(record, place).strip("\r\n")}
        if place.endswith("line 1") and record.lstrip().startswith(b"["):
            raise ValueError(f"{place}: a JSON array: a stream has one JSON object a line (JSON Lines)")
        return loading.json_row(record, place)

    def identity(self) -> str:
        """See :class:`Source`."""
        return "\n".join(path.name for path in self.files)


class Rows(Source):
    """A data set that `datasets` streams: a folder, a data set on the Hub, or one made in Python.

    Raises:
        ValueError: it has a shuffle buffer.
    """

    def __init__(self, name: str, dataset: IterableDataset) -> None:
        self.name, self.dataset = name, dataset
        self._number, self._state = 0, None  # rows before the next one, and the state to begin with until one is read
        if _is_buffered(dataset._ex_iterable):
            raise ValueError(
                f"{name} is shuffled in a buffer, whose rows its state_dict does not keep, so a resumed run would lose "
                "them: take .shuffle() away, and shuffle the files beforehand"
            )

    def records(self, at: Any) -> Iterator[tuple[str, Any]]:
        """See :class:`Source`."""
        self._number, self._state = at or (0, None)
        self.dataset.load_state_dict(self._state)
        return self._records()

    def _records(self) -> Iterator[tuple[str, Any]]:
        for row in self.dataset:
            self._number, self._state = self._number + 1, None
            yield f"{self.name}, row {self._number - 1}", row

    def at(self) -> Any:
        """See :class:`Source`."""
        if not self._number:
            return None
        return [self._number, self._state or self.dataset.state_dict()]

    def row(self, record: Any, place: str) -> Any:
        """See :class:`Source`."""
        return loading.without_none(record)

    def identity(self) -> str:
        """See :class:`Source`."""
        return str(self.dataset.num_shards)


def _is_buffered(rows: Any) -> bool:
    """Return whether `datasets` reads these rows through a shuffle buffer."""
    before = [vars(rows).get("ex_iterable"), *vars(rows).get("ex_iterables", ())]
    return isinstance(rows, BufferShuffledExamplesIterable) or any(map(_is_buffered, filter(None, before)))


def _batches(file: pq.ParquetFile, group: int, path: Path) -> Iterator[pa.RecordBatch]:
    try:
        yield from file.iter_batches(batch_size=_ROWS, row_groups=[group])
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}, row group {group}: {error}: the file is damaged") from error


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} could not be read: {error}") from error


def _go_to(file: BinaryIO, offset: int, path: Path) -> None:
    """Move to the line that starts at byte `offset`; an archive is decompressed up to there, but not parsed."""
    if not offset:
        return
    if file.seekable():
        file.seek(offset - 1)
    else:
        left = offset - 1
        while left and (block := file.read(min(left, _BLOCK))):
            left -= len(block)
    last = file.read(1)
    if last != b"\n" and (not last or file.read(1)):
        raise ValueError(
            f"{path} has changed since the checkpoint: no line begins at byte {offset:,}: resume with the old file"
        )
