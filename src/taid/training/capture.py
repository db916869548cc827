"""``taid cache``: ask the teacher once for every row that a run will see, and keep what it says."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from taid.artifacts.tables import duration
from taid.config.training import TAIDConfig
from taid.data import images
from taid.losses.fused import shifted
from taid.losses.objectives import forward_kl
from taid.losses.sparse_logits import Sparse, TopK
from taid.teachers import cache, cache_manifest
from taid.teachers.cache import Cache, Writer
from taid.teachers.cache_format import Format
from taid.teachers.sequences import Sequence, sequences
from taid.teachers.teacher import ExactTeacher, Teacher
from taid.training.cache_check import ROWS, AskedTeacher, RunRows, check_format

_JUDGED = 256  # tokens whose loss of precision is measured


def capture(
    teacher: Teacher | None, asked: AskedTeacher, rows: RunRows, folder: Path, *,
    first_epoch: Callable[[], Iterable[dict[str, Any]]], prepare: Callable[[dict[str, Any]], dict[str, Any]],
    repair: bool = False,
) -> None:  # fmt: skip
    """Write what the teacher says of every row of a run, continuing what is there.

    Args:
        teacher: the one that is asked.
        asked: the pair and its options, as the manifest will say them.
        rows: of the run.
        folder: of the cache.
        first_epoch: gives the batches of a run's first epoch and of its evaluations, as training sees them.
        prepare: brings a batch to the teacher's device.
        repair: read all that is there first, and drop damaged shards.

    Raises:
        ValueError: the folder holds a cache of another run or a damaged one, or the teacher cannot be captured.
        OSError: the disk is full; what is there is whole.
    """
    if images.has_images(rows.train):
        raise ValueError("rows with images are not cached: a row is found by its tokens, which do not tell its images")
    source, manifest = _source(teacher, asked, rows, folder, prepare)
    accelerator = rows.accelerator
    if accelerator.is_main_process:
        head = source.exact.output_head() if source.format.needs_head else None
        for path in cache.start(folder, manifest, head, repair=repair):
            print(f"{path} is damaged and captured anew", flush=True)
        with cache.disk_errors(folder):
            asked.teacher_tokenizer.save_pretrained(folder / "tokenizer")
    accelerator.wait_for_everyone()
    missing = _announce(source, folder)
    with tqdm(
        total=missing, unit="token", unit_scale=True, disable=not (accelerator.is_main_process and missing),
        mininterval=0.1 if sys.stderr.isatty() else 30.0,
    ) as bar:  # fmt: skip
        for batches in source.passes(first_epoch):
            _write_missing(source, batches, folder, bar)
            accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        done = Cache(folder)
        shards = sorted(path.stem for path in done.shard_paths())
        cache_manifest.write(folder, done.manifest | {"shards": shards})
        _say_what_is_lost(source, done)
    elif source.teacher.is_sharded and source.format.name == "hidden_int8":
        source.exact.example(source.args.device)  # the main process judges by what all of them hold
    accelerator.wait_for_everyone()


@dataclass(frozen=True)
class _Source:
    """Who is asked for which rows, and what is kept of the answer."""

    teacher: Teacher
    rows: RunRows
    format: Format
    args: TAIDConfig
    prepare: Callable[[dict[str, Any]], dict[str, Any]]

    @property
    def exact(self) -> ExactTeacher:
        """The teacher, whose hidden states are asked for."""
        assert isinstance(self.teacher, ExactTeacher)
        return self.teacher

    def passes(self, first_epoch: Callable[[], Iterable[dict[str, Any]]]) -> tuple[Iterable[dict[str, Any]], ...]:
        """Return all rows of a run, in one pass or two."""
        if self.teacher.prefetches:  # takes rows one by one, and many at a time
            return ((batch for _, batch in self.rows.batches(ROWS)),)
        # First the batches of training, then what they leave out: dataloader_drop_last, a row that two processes share.
        return first_epoch(), (batch for _, batch in self.rows.batches(self.args.eval_batch_size))

    def turns(self, batches: Iterable[dict[str, Any]], known: Container[bytes]) -> Iterator[dict[str, Any] | None]:
        """Yield the batches with a row that is not known yet.

        Processes that hold one teacher together ask it together, as often as the one with most to ask. The others get
        None for their turn.
        """
        wanted = (batch for batch in batches if _unknown(batch, known))
        if not self.teacher.is_sharded:
            yield from wanted
            return
        while True:
            batch = next(wanted, None)
            own = torch.tensor(batch is not None, dtype=torch.int64, device=self.args.device)
            if not self.rows.accelerator.reduce(own, "sum"):
                return
            yield batch

    def records(
        self, batch: dict[str, Any] | None, known: Container[bytes]
    ) -> Iterator[tuple[Sequence, dict[str, Tensor]]]:
        """Yield each row of a batch that is not known yet, with what is kept of it; nothing for None."""
        if batch is None:
            self.exact.example(self.args.device)
            return
        wanted = _unknown(batch, known)
        if not wanted:
            return
        labels = shifted(batch["labels"])
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if not self.teacher.prefetches:
            inputs = self.prepare(inputs) | {"use_cache": False}
        for row, answer in self.teacher.answers(inputs, wanted):
            if isinstance(answer, Sparse):
                yield row, self.format.encoded(answer)
                continue
            at_labels = self.teacher.vocabulary.position(labels[row.row, row.start + torch.from_numpy(row.positions)])
            head = self.exact.shared_head()
            yield row, self.format.record(answer, at_labels.to(answer.device), head, row.key)


def _unknown(batch: dict[str, Any], known: Container[bytes]) -> list[Sequence]:
    rows = sequences(batch, shifted(batch["labels"]))
    return list({s.key: s for s in rows if s.trained and s.key not in known}.values())


def _source(
    teacher: Teacher | None, asked: AskedTeacher, rows: RunRows, folder: Path,
    prepare: Callable[[dict[str, Any]], dict[str, Any]],
) -> tuple[_Source, dict[str, Any]]:  # fmt: skip
    """Return who is asked, and the manifest. What the configuration leaves open is as in the cache that is there."""
    args, ids = asked.args, len(asked.vocabulary.ids)
    if teacher is None:
        raise ValueError("a cache needs a teacher: set teacher_model_name_or_path or teacher_server_url")
    is_exact = isinstance(teacher, ExactTeacher)
    if is_exact and not args.fused:
        raise ValueError("a cache is made of what the teacher's output head is given: leave fused: false away")
    there: dict[str, Any] = {}
    with contextlib.suppress(ValueError):  # no cache yet, or none that can be read
        there = cache_manifest.read(folder)
    name = args.teacher_cache_format or there.get("format", "hidden" if is_exact else "top_k")
    if not is_exact and name != "top_k":
        raise ValueError(f"a server gives the likeliest tokens only: leave teacher_cache_format: {name} away")
    manifest = asked.manifest(name) | {
        "k": min(args.teacher_top_k or there.get("k") or 64, ids) if name == "top_k" else None,
        "draws": args.teacher_cache_samples or there.get("draws") or 50 if name == "sampled" else None,
        "teacher": asked.name,
        "vocabulary_size": ids,
        "versions": {"torch": str(torch.__version__)},
        **teacher.properties(args.device),
    }
    check_format(name, args)
    return _Source(teacher, rows, Format.from_manifest(manifest), args, prepare), manifest


def _announce(source: _Source, folder: Path) -> int:
    """Say what will be written and how long it takes; return the number of tokens that this process has to ask for.

    Raises:
        OSError: the disk has too little room.
    """
    accelerator, args, known = source.rows.accelerator, source.args, Cache(folder)
    wanted = {key: tokens for keys in source.rows.keys().values() for key, tokens in keys.items() if key not in known}
    missing = sum(wanted.values())
    total = int(accelerator.reduce(torch.tensor(missing, device=args.device), "sum"))
    each, seconds = source.format.bytes_per_token(), 0.0
    own = (batch for _, batch in source.rows.batches(args.train_batch_size))
    records: list[tuple[Sequence, dict[str, Tensor]]] = []
    for batch in itertools.islice(source.turns(own, known), 1):  # ask for it, without keeping it
        begun = time.perf_counter()
        records = list(source.records(batch, known))
    if records:
        tokens = sum(row.trained for row, _ in records)
        seconds = (time.perf_counter() - begun) / tokens * missing
        if source.format.name == "sampled":
            distinct = sum(len(tensors["ids"]) for _, tensors in records)
            each = source.format.bytes_per_token(distinct / tokens)
    free = shutil.disk_usage(folder).free
    if accelerator.is_main_process:
        size = f"{each:,.0f} bytes each: {total * each / 1e6:,.1f} MB"
        about = f", about {duration(max(seconds, 1))}" if total else ""
        print(f"{folder}: {total:,} trained tokens to capture, {size}{about}", flush=True)
    if total * each > free:
        raise OSError(
            f"the teacher cache needs {total * each / 1e6:,.0f} MB, but {folder} has {free / 1e6:,.0f} MB left"
        )
    return missing


def _write_missing(source: _Source, batches: Iterable[dict[str, Any]], folder: Path, bar: Any) -> None:
    there = Cache(folder)
    known, writer = set(there), Writer(folder, cache_manifest.identity(there.manifest))
    for batch in source.turns(batches, known):
        for row, record in source.records(batch, known):
            writer.add(row.key, record)
            known.add(row.key)
            bar.update(row.trained)
    writer.flush()


def _say_what_is_lost(source: _Source, done: Cache) -> None:
    """Print what the format loses, measured on some tokens."""
    format_ = source.format
    if format_.name == "hidden_int8":
        _, batch = next(source.rows.batches(source.args.eval_batch_size))
        trained = shifted(batch.pop("labels")) != -100
        exact = source.exact.hidden(source.prepare(batch))[trained.to(source.args.device)][:_JUDGED]
        rounded = format_.decoded([format_.encoded(exact)], exact.device)
        assert isinstance(rounded, Tensor)
        head = source.exact.shared_head()
        p, p_rounded = (head.logits(hidden)[:, : format_.vocabulary_size] for hidden in (exact, rounded))
        lost = f"8 bits move the teacher by {forward_kl(p_rounded, p).mean():.1e} nats a token (KL to itself"
        print(f"{lost}, {len(exact)} tokens)", flush=True)
    elif format_.name == "top_k":
        records: list[dict[str, Tensor]] = []
        for key in done:
            if sum(len(record["of_token"]) for record in records) < _JUDGED:
                records.append(done.read(key))
        top_k = format_.decoded(records, torch.device("cpu"))
        assert isinstance(top_k, TopK)
        listed = 100 * (1 - top_k.log_rest.exp().mean())
        print(f"top k: {listed:.1f} % of the teacher's probability is listed (mean of {len(top_k)} tokens)", flush=True)
