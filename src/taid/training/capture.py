"""``taid cache``: ask the teacher once for every row that a run will see, and keep what it says."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import sys
import time
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from taid.config.training import TAIDConfig
from taid.data import images
from taid.losses.fused import shifted
from taid.losses.objectives import forward_kl
from taid.losses.sparse_logits import Sampled, TopK
from taid.teachers import cache, fingerprint
from taid.teachers import cache_manifest as manifests
from taid.teachers.cache import Cache, Writer
from taid.teachers.cache_format import Format
from taid.teachers.placement import teacher_init_kwargs
from taid.teachers.sequences import Sequence, sequences
from taid.teachers.teacher import LocalTeacher, ServedTeacher, Teacher

if TYPE_CHECKING:
    from taid.training.trainer import TAIDTrainer

_COLUMNS = ("input_ids", "labels", "seq_lengths")
_ROWS = 64  # of a data set that are collated at a time, to know their keys
_JUDGED = 256  # tokens whose loss of precision is measured


def rows_of(trainer: TAIDTrainer) -> dict[str, dict[bytes, int]]:
    """The key of every row that a run sees and how many of its tokens are trained, for each of its data sets.

    On several processes, each has a share of them.
    """
    # Every data set has a name on every process, whether it has a share of it or not.
    found: dict[str, dict[bytes, int]] = {name: {} for name in ("train", *_held_out(trainer))}
    for name, batch in _own_rows(trainer, _ROWS):
        found[name].update((s.key, s.trained) for s in sequences(batch, shifted(batch["labels"])) if s.trained)
    return found


def _own_rows(trainer: TAIDTrainer, size: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """This process's share of each data set, in its order, so many rows at a time, collated as for training."""
    ranks, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    for name, dataset in {"train": trainer.train_dataset, **_held_out(trainer)}.items():
        if not hasattr(dataset, "__len__"):
            raise ValueError(
                f"the {name} data set is a stream, whose rows are not known beforehand: use a teacher model"
            )
        columns = [name for name in _COLUMNS if name in dataset.column_names]
        own = dataset.select_columns(columns).select(range(rank, len(dataset), ranks))
        for start in range(0, len(own), size):
            yield name, trainer.data_collator([own[i] for i in range(start, min(start + size, len(own)))])


def _held_out(trainer: TAIDTrainer) -> dict[str, Any]:
    named = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
    return {name: dataset for name, dataset in named.items() if dataset is not None}


def first_row(trainer: TAIDTrainer) -> Sequence:
    """The longest of the first rows of the training data, which may be a stream."""
    rows = itertools.islice(iter(trainer.train_dataset), 16)
    batch = trainer.data_collator([{name: row[name] for name in _COLUMNS if name in row} for row in rows])
    return max(sequences(batch, shifted(batch["labels"])), key=lambda row: len(row.ids))


def check_sparse(kind: type[TopK | Sampled], args: TAIDConfig) -> None:
    """Raise a ValueError where a part of the teacher's distribution does not determine what a run asks for."""
    if args.distillation_share > 0:
        kind.check_objective(args.objective)
        if args.taid_signal == "cross_entropy" and args.objective == "taid":
            raise ValueError("taid_signal: cross_entropy needs the teacher's whole distribution, not its top k: use kl")


_SPARSE: dict[str, type[TopK | Sampled]] = {"top_k": TopK, "sampled": Sampled}


def manifest_of(trainer: TAIDTrainer, *, format_: str | None) -> dict[str, Any]:
    """What a cache for this run has to be; None where it is not known here."""
    args, names, tokenizer = trainer.args, trainer.configuration, trainer.processing_class
    teacher = names.get("teacher_model_name_or_path")
    ids = len(trainer.vocabulary.ids)
    return {
        "format": format_,
        "k": args.teacher_top_k and min(args.teacher_top_k, ids) if format_ == "top_k" else None,
        "draws": args.teacher_cache_samples if format_ == "sampled" else None,
        "server_model": args.teacher_server_model,
        "teacher_revision": None if teacher and Path(teacher).expanduser().is_dir() else args.teacher_model_revision,
        "teacher_options": _options(args),
        "teacher_tokenizer": fingerprint.of_tokenizer(trainer.teacher_tokenizer),
        **fingerprint.of_model(teacher, args.teacher_model_revision),
        "tokenizer": fingerprint.of_tokenizer(tokenizer),
        "chat_template": fingerprint.of_text(tokenizer.chat_template),
        "vocabulary": fingerprint.of_ids(trainer.vocabulary.ids),
    }


def _options(args: TAIDConfig) -> dict[str, str]:
    """How the teacher is loaded and run, as far as it changes its numbers."""
    autocast = "bfloat16" if args.bf16 else "float16" if args.fp16 else "none"
    options = {name: str(value) for name, value in teacher_init_kwargs(args).items() if name != "distributed_config"}
    quantized = {"quantization": args.teacher_quantization} if args.teacher_quantization else {}
    return {"autocast": autocast, **options, **quantized}


def _of_a_server(manifest: dict[str, Any], model: str | None) -> dict[str, Any]:
    """A manifest of what a server said, of whose weights and options nothing is known."""
    unknown = dict.fromkeys(("teacher_options", "teacher_config", "teacher_weights", "teacher_revision"))
    return manifest | unknown | {"server_model": model}


def require(trainer: TAIDTrainer, found: Cache) -> None:
    """Raise a ValueError where a cache does not fit a run, or lacks rows of it."""
    args = trainer.args
    if kind := _SPARSE.get(found.format.name):
        check_sparse(kind, args)
    expected = manifest_of(trainer, format_=args.teacher_cache_format or found.format.name)
    if found.format.needs_head:
        del expected["vocabulary"]  # hidden states and a head know nothing of ids
    given = trainer.configuration.get("teacher_model_name_or_path")
    if found.manifest["server_model"] is not None:
        expected = _of_a_server(expected, args.teacher_server_model)
    if given is not None and expected["teacher_weights"] is None:
        expected["teacher"] = given  # not on this machine: its name is all there is
    manifests.check(found.manifest, expected, found.folder)
    for name, keys in rows_of(trainer).items():
        counts = torch.tensor([sum(key not in found for key in keys), len(keys)], device=args.device)
        missing, rows = trainer.accelerator.reduce(counts, "sum").tolist()
        if missing:
            raise ValueError(
                f"teacher cache {found.folder} lacks {missing} of the {rows} different rows of the {name} data set. "
                "`taid cache` with this recipe adds them. (A row is its token ids and which of them are trained: "
                "another max_length, template or loss mask makes another row.)"
            )


def capture(trainer: TAIDTrainer, folder: Path, *, repair: bool = False) -> None:
    """Write what the teacher says of every row of a run, continuing what is there.

    Args:
        trainer: of the run, with its teacher loaded or on a server.
        folder: of the cache.
        repair: read all that is there first, and drop damaged shards.

    Raises:
        ValueError: the folder holds a cache of another run or a damaged one, or the teacher cannot be asked.
        OSError: the disk is full; what is there is whole.
    """
    if images.has_images(trainer.train_dataset):
        raise ValueError("rows with images are not cached: a row is found by its tokens, which do not tell its images")
    source, manifest = _source(trainer, folder)
    accelerator = trainer.accelerator
    if accelerator.is_main_process:
        head = None
        if source.format.needs_head:
            assert isinstance(source.teacher, LocalTeacher)
            assert source.teacher.head is not None
            head = source.teacher.head.head()
        for path in cache.start(folder, manifest, head, repair=repair):
            print(f"{path} is damaged and captured anew", flush=True)
        with cache.disk_errors(folder):
            trainer.teacher_tokenizer.save_pretrained(folder / "tokenizer")
    accelerator.wait_for_everyone()
    missing = _announce(source, folder)
    with tqdm(
        total=missing, unit="token", unit_scale=True, disable=not (accelerator.is_main_process and missing),
        mininterval=0.1 if sys.stderr.isatty() else 30.0,
    ) as bar:  # fmt: skip
        for batches in source.batches():
            _write_missing(source, batches, folder, bar)
            accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        done = Cache(folder)
        manifests.write(folder, done.manifest | {"shards": sorted(path.stem for path in done.shard_paths())})
        _judge(source, done)
    elif source.teacher.is_cut and source.format.name == "hidden_int8":
        _example(trainer, source.teacher)  # the main process judges by what all of them hold
    accelerator.wait_for_everyone()


@dataclass(frozen=True)
class _Source:
    """Who is asked, and what is kept of the answer."""

    trainer: TAIDTrainer
    teacher: LocalTeacher | ServedTeacher
    format: Format

    def batches(self) -> tuple[Iterable[dict[str, Any]], ...]:
        """All rows of a run, in one pass or two."""
        if isinstance(self.teacher, ServedTeacher):  # which takes them one by one, and many at a time
            return ((batch for _, batch in _own_rows(self.trainer, _ROWS)),)
        # First the batches of training, then what they leave out: dataloader_drop_last, a row that two processes share.
        left = (batch for _, batch in _own_rows(self.trainer, self.trainer.args.eval_batch_size))
        return _seen_batches(self.trainer), left

    def turns(self, batches: Iterable[dict[str, Any]], known: Container[bytes]) -> Iterator[dict[str, Any] | None]:
        """Batches with a row that is not known yet.

        Processes that hold one teacher together ask it together, as often as the one with most to ask: None is for the
        others.
        """
        wanted = (batch for batch in batches if self._unknown(batch, known))
        if not self.teacher.is_cut:
            yield from wanted
            return
        while True:
            batch = next(wanted, None)
            own = torch.tensor(batch is not None, dtype=torch.int64, device=self.trainer.args.device)
            if not self.trainer.accelerator.reduce(own, "sum"):
                return
            yield batch

    def _unknown(self, batch: dict[str, Any], known: Container[bytes]) -> list[Sequence]:
        rows = sequences(batch, shifted(batch["labels"]))
        return list({s.key: s for s in rows if s.trained and s.key not in known}.values())

    def records(
        self, batch: dict[str, Any] | None, known: Container[bytes]
    ) -> Iterator[tuple[Sequence, dict[str, Tensor]]]:
        """Each row of a batch that is not known yet, with what is kept of it; none of None."""
        if batch is None:
            _example(self.trainer, self.teacher)
            return
        rows, labels = self._unknown(batch, known), shifted(batch["labels"])
        if isinstance(self.teacher, ServedTeacher):
            yield from ((row, self.format.encoded(top_k)) for row, top_k in self.teacher.ask(rows))
        elif rows:
            assert self.teacher.head is not None
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            hidden = self.teacher.hidden(self.trainer._prepare_inputs(inputs) | {"use_cache": False})
            vocabulary, labels = self.teacher.vocabulary, labels.to(hidden.device)
            head = self.teacher.head.head(vocabulary.holes)
            for row in rows:
                places = row.start + torch.from_numpy(row.positions).to(hidden.device)
                of_row, of_tokens = vocabulary.position(labels[row.row, places]), hidden[row.row, places]
                if not of_tokens.isfinite().all():
                    raise ValueError(
                        f"the teacher's hidden states are not finite on the row that begins with tokens "
                        f"{row.ids[:8].tolist()}, in {str(of_tokens.dtype).removeprefix('torch.')}: float16 overflows "
                        "in many models, bfloat16 does not (teacher_model_init_kwargs' dtype, or bf16)"
                    )
                yield row, self.format.record(of_tokens, of_row, head, row.key)


def _source(trainer: TAIDTrainer, folder: Path) -> tuple[_Source, dict[str, Any]]:
    """Who is asked for a run, and what is kept; what the configuration leaves open is as in the cache that is there."""
    args, teacher, ids = trainer.args, trainer.teacher, len(trainer.vocabulary.ids)
    if not isinstance(teacher, LocalTeacher | ServedTeacher):
        raise ValueError("a cache needs a teacher: set teacher_model_name_or_path or teacher_server_url")
    there: dict[str, Any] = {}
    with contextlib.suppress(ValueError):  # no cache yet, or none that can be read
        there = manifests.read(folder)
    default = "top_k" if isinstance(teacher, ServedTeacher) else "hidden"
    name = args.teacher_cache_format or there.get("format", default)
    manifest = manifest_of(trainer, format_=name) | {
        "k": min(args.teacher_top_k or there.get("k") or 64, ids) if name == "top_k" else None,
        "draws": args.teacher_cache_samples or there.get("draws") or 50 if name == "sampled" else None,
        "teacher": trainer.configuration.get("teacher_model_name_or_path"),
        "vocabulary_size": ids,
        "versions": {"torch": str(torch.__version__)},
    }
    if isinstance(teacher, ServedTeacher):
        if name != "top_k":
            raise ValueError(f"a server gives the likeliest tokens only: leave teacher_cache_format: {name} away")
        manifest = _of_a_server(manifest, teacher.server.model)
        manifest |= {"teacher_rows": teacher.rows, "hidden_size": 0, "dtype": str(torch.float32)}
    elif teacher.head is not None:
        example = _example(trainer, teacher)
        of_hidden = {"hidden_size": example.shape[-1], "dtype": str(example.dtype), "server_model": None}
        manifest |= {"teacher_rows": teacher.head.head().weight.shape[0], **of_hidden}
    else:
        raise ValueError("a cache is made of what the teacher's output head is given: leave fused: false away")
    if kind := _SPARSE.get(name):
        check_sparse(kind, args)
    return _Source(trainer, teacher, Format.of(manifest)), manifest


def _example(trainer: TAIDTrainer, teacher: Teacher) -> Tensor:
    """What a loaded teacher says of nothing in particular."""
    assert isinstance(teacher, LocalTeacher)
    return teacher.hidden({"input_ids": torch.zeros(1, 2, dtype=torch.long, device=trainer.args.device)})


def _announce(source: _Source, folder: Path) -> int:
    """Say what will be written and how long it takes; the number of tokens that this process has to ask for.

    Raises:
        OSError: the disk has too little room.
    """
    trainer, accelerator, known = source.trainer, source.trainer.accelerator, Cache(folder)
    wanted = {key: tokens for keys in rows_of(trainer).values() for key, tokens in keys.items() if key not in known}
    missing = sum(wanted.values())
    total = int(accelerator.reduce(torch.tensor(missing, device=trainer.args.device), "sum"))
    each, seconds = source.format.bytes_per_token(), 0.0
    own = (batch for _, batch in _own_rows(trainer, trainer.args.train_batch_size))
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
        about = f", about {_duration(seconds)}" if total else ""
        print(f"{folder}: {total:,} trained tokens to capture, {size}{about}", flush=True)
    if total * each > free:
        raise OSError(
            f"the teacher cache needs {total * each / 1e6:,.0f} MB, but {folder} has {free / 1e6:,.0f} MB left"
        )
    return missing


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else (
        f"{seconds / 3600:.1f} h")  # fmt: skip


def _write_missing(source: _Source, batches: Iterable[dict[str, Any]], folder: Path, bar: Any) -> None:
    there = Cache(folder)
    known, writer = set(there), Writer(folder, manifests.identity(there.manifest))
    for batch in source.turns(batches, known):
        for row, record in source.records(batch, known):
            writer.add(row.key, record)
            known.add(row.key)
            bar.update(row.trained)
    writer.flush()


def _judge(source: _Source, done: Cache) -> None:
    """Print what the format loses, measured on some tokens."""
    format_, teacher = source.format, source.teacher
    if format_.name == "hidden_int8":
        assert isinstance(teacher, LocalTeacher)
        assert teacher.head is not None
        _, batch = next(_own_rows(source.trainer, source.trainer.args.eval_batch_size))
        trained = shifted(batch.pop("labels")) != -100
        exact = teacher.hidden(source.trainer._prepare_inputs(batch))[trained.to(source.trainer.args.device)][:_JUDGED]
        rounded = format_.decoded([format_.encoded(exact)], exact.device)
        assert isinstance(rounded, Tensor)
        head = teacher.head.head(teacher.vocabulary.holes)
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


def _seen_batches(trainer: TAIDTrainer) -> Iterator[dict[str, Any]]:
    """The batches of a run's first epoch, as training sees them, and of its evaluations."""
    yield from trainer.get_train_dataloader()
    for dataset in _held_out(trainer).values():
        yield from trainer.get_eval_dataloader(dataset)
