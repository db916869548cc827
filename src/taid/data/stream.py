"""Stream rows from files larger than memory or disk, and continue a killed run where it stopped.

A stream is read in chunks of 1,000 rows a process. TRL prepares a chunk as it prepares a whole data set: it tokenizes,
cuts and packs. So no packed row has parts of two chunks. A place in a stream consists of:

- the position of each source before the chunk,
- the number of the chunk, which seeds its draws from the sources,
- the number of its prepared rows that have been trained on, and a checksum of the last of them.

To continue from a place, only one chunk is prepared again.

`datasets.IterableDataset.state_dict` cannot give the place behind TRL's preparation. By its own documentation, batched
maps in Arrow's format may skip a batch, and packing is one.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import IterableDataset

from taid.data import images, loading
from taid.data.files import local_files
from taid.data.stream_sources import Files, Rows, Source

if TYPE_CHECKING:
    from taid.config.training import TAIDConfig

logger = logging.getLogger(__name__)

_OLD = "resume with the old files, tokenizer and options of the data"
CHUNK = 1_000  # rows of a process; as many as TRL packs at a time


def open_stream(
    names: Sequence[str], args: TAIDConfig, *, weights: Sequence[float] | None = None, config: str | None = None,
    split: str = "train",
) -> Stream:  # fmt: skip
    """Open the rows of `names` as one stream; only the first chunk is read.

    Args:
        names: each a ``.jsonl`` (one object a line; also ``.json``), ``.txt`` or ``.parquet`` file, text also with
            ``.gz`` or ``.zst`` behind it, a glob of files of one type, a folder, or a Hub name.
        args: the options of the run.
        weights: the relative frequency with which each source is drawn; equal by default.
        config: configuration name of a Hub data set.
        split: split of a Hub data set or a folder.

    Raises:
        FileNotFoundError: nothing at that place.
        ValueError: an option does not work with a stream, a file is not a valid archive, there are no rows, or one of
            the first is bad; names the place and the remedy.
    """
    check_options(args)
    text_field = args.dataset_text_field
    sources: list[Source] = []
    for name in names:
        files = local_files(name)
        sources.append(
            Files(name, files, text_field) if files
            else Rows(name, loading.load(name, [], config, split, text_field, streaming=True))
        )  # fmt: skip
    return Stream(sources, weights, seed=_seed(args), text_field=text_field, packing=args.packing)


def as_stream(train_rows: Any, held_out: Any, args: TAIDConfig) -> Stream | None:
    """Return the trainer's training rows as a stream; None if they are an ordinary data set.

    An ``IterableDataset`` of `datasets` is wrapped; its rows are not checked.

    Raises:
        ValueError: an option does not work with a stream, the data set has a shuffle buffer, or the held-out rows are
            a stream.
    """
    for rows in held_out.values() if isinstance(held_out, dict) else [held_out]:
        if isinstance(rows, IterableDataset | Stream):
            raise ValueError(
                "held-out rows are a stream: take the first of them, as Dataset.from_list(list(rows.take(1000)))"
            )
    if not isinstance(train_rows, IterableDataset | Stream):
        return None
    check_options(args)
    if isinstance(train_rows, Stream):
        return train_rows
    if images.has_images(train_rows):
        raise ValueError("rows with images are not streamed: give a Dataset, not an IterableDataset")
    return Stream([Rows("the training data", train_rows)], seed=_seed(args), packing=args.packing)


def check_options(args: TAIDConfig) -> None:
    """Raise a ValueError for an option with which a stream would not end, or could not be continued exactly."""
    if args.max_steps < 0:
        raise ValueError(
            "a stream has no length: set max_steps, or with packing: true train_tokens, from which the schedules of t "
            "and of the learning rate follow"
        )
    buffer = "the rows in its buffer would be lost when a run is resumed"
    refused = {
        "shuffle_dataset": (args.shuffle_dataset, f"{buffer}: shuffle the files beforehand"),
        "dataloader_num_workers": (args.dataloader_num_workers, f"{buffer}: rows are read in the training process"),
        "train_sampling_strategy": (args.train_sampling_strategy == "group_by_length", "lengths are not known ahead"),
        "ignore_data_skip": (args.ignore_data_skip, "a resumed run would begin the stream anew"),
        "split_batches": (args.accelerator_config.split_batches, "each process takes per_device_train_batch_size rows"),
    }
    for name, (is_set, why) in refused.items():
        if is_set:
            raise ValueError(f"{name} does not go together with a stream: {why}; leave it away")


def _seed(args: TAIDConfig) -> int:
    return int(args.seed if args.data_seed is None else args.data_seed)


class Stream:
    """Endless rows of one or several sources: a source starts again when all its rows have been read.

    Rows of one source keep their order. With several sources, each row's source is drawn with its weight. Two processes
    take every second row each: their rows differ, and together they are the rows of a single process.

    Args:
        sources: the sources of rows.
        weights: the relative frequency with which each source is drawn.
        seed: seeds these draws.
        text_field: the column that holds plain text; None leaves rows unchecked.
        packing: whether TRL will pack the rows; if not, a warning says when it leaves rows out.

    Raises:
        ValueError: there are no rows, or one of the first is bad.
    """

    def __init__(
        self, sources: Sequence[Source], weights: Sequence[float] | None = None, *, seed: int = 0,
        text_field: str | None = None, packing: bool = False,
    ) -> None:  # fmt: skip
        self.sources, self.seed = sources, seed
        self._warns = not packing  # of rows that are left out, once
        shares = np.array(weights or [1.0] * len(sources))
        self.shares = shares / shares.sum()
        self.start: dict[str, Any] | None = None
        """The place to go on from; None is the beginning."""
        self._check = None if text_field is None else loading.RowCheck(text_field)
        for source in sources:
            place, record = next(source.records(None), ("", None))
            if not place:
                raise ValueError(loading.no_rows(source.name))
            self._row(source, record, place)
        self._in_hand = in_hand = next(self._chunks(None, 0, 1))[1]

        def rows() -> Iterator[dict[str, Any]]:
            yield from in_hand

        self.dataset = IterableDataset.from_generator(rows)
        """The rows of the chunk in hand: what TRL prepares, chunk after chunk."""

    def _row(self, source: Source, record: Any, place: str) -> dict[str, Any]:
        row = source.row(record, place)
        if self._check is None:
            return dict(row)
        if isinstance(row, dict) and set(images.COLUMNS) & row.keys():
            raise ValueError(f"{place}: rows with images are not streamed: set streaming: false")
        return self._check(row, place)

    def _draws(self, chunk: int, size: int) -> list[int]:
        """Draw the source of each row of a chunk."""
        if len(self.sources) == 1:
            return [0] * size
        draws: list[int] = (
            np.random.default_rng((self.seed, chunk)).choice(len(self.shares), size, p=self.shares).tolist()
        )
        return draws

    def _chunks(
        self, start: dict[str, Any] | None, rank: int, processes: int
    ) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """Yield chunk after chunk: the place before it, and this process's rows in it."""
        number = start["chunk"] if start else 0
        passes = list(start["passes"]) if start else [0] * len(self.sources)
        at = start["sources"] if start else [None] * len(self.sources)
        records = [source.records(place) for source, place in zip(self.sources, at, strict=True)]
        while True:
            before = {"chunk": number, "passes": list(passes), "sources": [source.at() for source in self.sources]}
            rows = []
            for index, drawn in enumerate(self._draws(number, CHUNK * processes)):
                source = self.sources[drawn]
                found = next(records[drawn], None)
                if found is None:
                    passes[drawn] += 1
                    records[drawn] = source.records(None)
                    if len(self.sources) == 1:  # so that no packed row has parts of two passes
                        break
                    found = next(records[drawn])
                if index % processes == rank:
                    rows.append(self._row(source, found[1], found[0]))
            number += 1
            yield before, rows

    def prepared(
        self, dataset: IterableDataset, rank: int = 0, processes: int = 1
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Yield this process's rows as TRL prepares them, from :attr:`start`, each with the place behind it.

        Args:
            dataset: the result of TRL's preparation of :attr:`dataset`.
            rank: the rank among the processes that read different rows.
            processes: the number of these processes.
        """
        chunks = self._chunks(self.start, rank, processes)

        def prepare() -> tuple[dict[str, Any], list[dict[str, Any]]]:
            before, self._in_hand[:] = next(chunks)
            rows = list(dataset) if self._in_hand else []
            if self._warns and len(rows) < len(self._in_hand):
                self._warns = False
                logger.warning(
                    f"{self._names()}: {len(self._in_hand) - len(rows)} of the {len(self._in_hand):,} rows in chunk "
                    f"{before['chunk']} are left out: max_length cuts away all their trained tokens; said once"
                )
            return before, rows

        start = self.start or {}
        seen, passes = start.get("prepared", 0), start.get("passes")
        last: list[int] | None = None  # the passes at the last chunk of which a row was left
        with ThreadPoolExecutor(1) as thread:  # prepares the next chunk while this one is trained on
            try:
                coming = thread.submit(prepare)
                while True:
                    before, rows = coming.result()
                    last = before["passes"] if rows or last is None else last
                    if all(now > then + 1 for now, then in zip(before["passes"], last, strict=True)):
                        break  # a whole pass had none
                    coming = thread.submit(prepare)
                    if rank == 0 and before["passes"] != passes:
                        self._say_passes(passes := before["passes"])
                    if seen and (seen > len(rows) or _checksum(rows[seen - 1]) != start["row"]):
                        raise ValueError(
                            f"{self._names()}: the rows are not those that the checkpoint has seen: {_OLD}"
                        )
                    for number, row in enumerate(rows[seen:], start=seen + 1):
                        yield row, before | {"prepared": number, "row": _checksum(row)}
                    seen = 0
            finally:
                self._in_hand.clear()  # the chunk in preparation ends here
        raise ValueError(
            f"{self._names()}: no row with a trained token is left for process {rank} of {processes}: give more rows, "
            "or a larger max_length"
        )

    def _names(self) -> str:
        return ", ".join(source.name for source in self.sources)

    def _say_passes(self, passes: list[int]) -> None:
        for source, times in zip(self.sources, passes, strict=True):
            if times:
                logger.info(f"{source.name}: its rows have all been seen {times} times, and begin anew")

    def identity(self) -> str:
        """Return what places depend on: the files and their order."""
        names = "\n\n".join(source.identity() for source in self.sources)
        return hashlib.blake2b(names.encode(), digest_size=8).hexdigest()


def _checksum(row: dict[str, Any]) -> int:
    return zlib.crc32(array("q", row["input_ids"]).tobytes())


class Batches:
    """Endless batches of a stream, each with the place behind its last row as ``place``.

    Args:
        stream: the stream of rows.
        dataset: the result of TRL's preparation of ``stream.dataset``.
        collate: makes a batch of rows.
        size: rows a batch.
        rank: the rank among the processes that read different rows.
        processes: the number of these processes.
    """

    def __init__(
        self, stream: Stream, dataset: IterableDataset, collate: Callable[[list[Any]], dict[str, Any]], *, size: int,
        rank: int, processes: int,
    ) -> None:  # fmt: skip
        self.stream, self.dataset, self.collate, self.batch_size = stream, dataset, collate, size
        self.rank, self.processes = rank, processes

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = self.stream.prepared(self.dataset, self.rank, self.processes)
        while True:
            taken = list(itertools.islice(rows, self.batch_size))
            yield self.collate([row for row, _ in taken]) | {"place": taken[-1][1]}
