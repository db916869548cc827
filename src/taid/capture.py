"""``taid cache``: ask the teacher once for every row that a run will see, and keep what it says."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from taid import cache, fingerprint
from taid.cache import Cache, Writer, encoded, sequences, shifted
from taid.fused import Head
from taid.models import teacher_init_kwargs
from taid.teacher import LocalTeacher
from taid.top_k import TopK, check_objective

if TYPE_CHECKING:
    from taid.trainer import TAIDTrainer

_ROWS = 64  # of a data set that are collated at a time, to know their keys
_TOKENS = 1024  # that are projected at a time


def rows_of(trainer: TAIDTrainer) -> dict[str, dict[bytes, int]]:
    """The key of every row that a run sees and how many of its tokens are trained, for each of its data sets.

    On several processes, each has a share of them.
    """
    found: dict[str, dict[bytes, int]] = {}
    for name, batch in _own_rows(trainer, _ROWS):
        keys = found.setdefault(name, {})
        keys.update((s.key, s.trained) for s in sequences(batch, shifted(batch["labels"])) if s.trained)
    return found


def _own_rows(trainer: TAIDTrainer, size: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """This process's share of each data set, in its order, so many rows at a time, collated as for training."""
    ranks, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    for name, dataset in {"train": trainer.train_dataset, **_held_out(trainer)}.items():
        if not hasattr(dataset, "__len__"):
            raise ValueError(
                f"the {name} data set is a stream, whose rows are not known beforehand: use a teacher model"
            )
        columns = [c for c in ("input_ids", "labels", "seq_lengths") if c in dataset.column_names]
        own = dataset.select_columns(columns).select(range(rank, len(dataset), ranks))
        for start in range(0, len(own), size):
            yield name, trainer.data_collator([own[i] for i in range(start, min(start + size, len(own)))])


def _held_out(trainer: TAIDTrainer) -> dict[str, Any]:
    named = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
    return {name: dataset for name, dataset in named.items() if dataset is not None}


def manifest_of(trainer: TAIDTrainer, *, format_: str | None, k: int | None) -> dict[str, Any]:
    """What a cache for this run has to be; None where it is not known here."""
    args, names, tokenizer = trainer.args, trainer.configuration, trainer.processing_class
    teacher = names.get("teacher_model_name_or_path")
    return {
        "format": format_,
        "k": k,
        "teacher_revision": None if teacher and Path(teacher).expanduser().is_dir() else args.teacher_model_revision,
        "teacher_options": _options(args),
        "teacher_tokenizer": fingerprint.of_tokenizer(trainer.teacher_tokenizer),
        **fingerprint.of_model(teacher, args.teacher_model_revision),
        "tokenizer": fingerprint.of_tokenizer(tokenizer),
        "chat_template": fingerprint.of_text(tokenizer.chat_template),
        "vocabulary": fingerprint.of_ids(trainer.vocabulary.ids),
    }


def _options(args: Any) -> dict[str, str]:
    """How the teacher is loaded and run, as far as it changes its numbers."""
    autocast = "bfloat16" if args.bf16 else "float16" if args.fp16 else "none"
    return {"autocast": autocast, **{name: str(value) for name, value in teacher_init_kwargs(args).items()}}


def require(trainer: TAIDTrainer, found: Cache) -> None:
    """Raise a ValueError where a cache does not fit a run, or lacks rows of it."""
    args = trainer.args
    if found.format == "top_k" and args.distillation_share > 0:
        check_objective(args.objective)
        if args.taid_signal == "cross_entropy" and args.objective == "taid":
            raise ValueError("taid_signal: cross_entropy needs the teacher's whole distribution, not its top k: use kl")
    k = args.teacher_cache_top_k if found.format == "top_k" else None
    expected = manifest_of(trainer, format_=args.teacher_cache_format, k=k and min(k, len(trainer.vocabulary.ids)))
    if found.format != "top_k":
        del expected["vocabulary"]  # hidden states and a head know nothing of ids
    given = trainer.configuration.get("teacher_model_name_or_path")
    if given is not None and expected["teacher_weights"] is None:
        expected["teacher"] = given  # not on this machine: its name is all there is
    cache.check_manifest(found.manifest, expected, found.folder)
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
        trainer: of the run, with its teacher loaded.
        folder: of the cache.
        repair: read all that is there first, and drop damaged shards.

    Raises:
        ValueError: the folder holds a cache of another run or a damaged one.
        OSError: the disk is full; what is there is whole.
    """
    args, accelerator, teacher = trainer.args, trainer.accelerator, trainer.teacher
    if not isinstance(teacher, LocalTeacher) or teacher.head is None:
        raise ValueError("a cache needs the teacher itself and fused: true: set teacher_model_name_or_path")
    there: dict[str, Any] = {}
    with contextlib.suppress(ValueError):  # no cache yet, or none that can be read
        there = cache.read_manifest(folder)
    format_ = args.teacher_cache_format or there.get("format", "hidden")
    k = args.teacher_cache_top_k or there.get("k") or 64
    k = min(k, len(trainer.vocabulary.ids)) if format_ == "top_k" else None
    head = teacher.head.head()
    with torch.no_grad():
        example = teacher.hidden({"input_ids": torch.zeros(1, 2, dtype=torch.long, device=args.device)})
    manifest = manifest_of(trainer, format_=format_, k=k) | {
        "teacher": trainer.configuration.get("teacher_model_name_or_path"),
        "teacher_rows": head.weight.shape[0],
        "hidden_size": example.shape[-1],
        "dtype": str(example.dtype),
        "versions": {"torch": str(torch.__version__)},
    }
    if accelerator.is_main_process:
        for path in cache.start(folder, manifest, None if format_ == "top_k" else head, repair=repair):
            print(f"{path} is damaged and captured anew", flush=True)
        trainer.teacher_tokenizer.save_pretrained(folder / "tokenizer")
    accelerator.wait_for_everyone()
    known = Cache(folder)
    wanted = {key: tokens for keys in rows_of(trainer).values() for key, tokens in keys.items()}
    missing = sum(tokens for key, tokens in wanted.items() if key not in known)
    total = int(accelerator.reduce(torch.tensor(missing, device=args.device), "sum"))
    each = cache.bytes_per_token(
        format_,
        hidden_size=example.shape[-1],
        dtype=example.dtype,
        k=k or 0,
        vocabulary_size=len(trainer.vocabulary.ids),
    )
    free = shutil.disk_usage(folder).free
    if accelerator.is_main_process:
        print(
            f"{folder}: {total:,} trained tokens to capture, {each:,} bytes each: {total * each / 1e6:,.1f} MB",
            flush=True,
        )
    if total * each > free:
        raise OSError(
            f"the teacher cache needs {total * each / 1e6:,.0f} MB, but {folder} has {free / 1e6:,.0f} MB left"
        )
    with tqdm(
        total=missing, unit="token", unit_scale=True, disable=not (accelerator.is_main_process and missing)
    ) as bar:
        # First the batches of training, then what they leave out: dataloader_drop_last, a row that two processes share.
        for batches in (_seen_batches(trainer), (batch for _, batch in _own_rows(trainer, args.eval_batch_size))):
            _write_missing(
                trainer,
                teacher,
                batches,
                Cache(folder),
                Writer(folder, cache.identity(known.manifest)),
                format_,
                k,
                bar,
            )
            accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        manifest = cache.read_manifest(folder)
        names = sorted(path.stem for path in Cache(folder).shard_paths())
        cache.write_manifest(folder, manifest | {"shards": names})
    accelerator.wait_for_everyone()


def _write_missing(
    trainer: TAIDTrainer, teacher: LocalTeacher, batches: Iterable[dict[str, Any]], known: Cache, writer: Writer,
    format_: str, k: int | None, bar: Any,
) -> None:  # fmt: skip
    assert teacher.head is not None
    head, size, written = teacher.head.head(teacher.vocabulary.holes), len(teacher.vocabulary.ids), set[bytes]()
    for batch in batches:
        labels = shifted(batch["labels"])
        new = [s for s in sequences(batch, labels) if s.trained and s.key not in known and s.key not in written]
        if not new:
            continue
        inputs = trainer._prepare_inputs({name: value for name, value in batch.items() if name != "labels"})
        hidden, labels = teacher.hidden(inputs | {"use_cache": False}), labels.to(trainer.args.device)
        for s in new:
            of_row = labels[s.row, s.start : s.stop]
            of_tokens = hidden[s.row, s.start : s.stop][of_row != -100]
            signal: Tensor | TopK = of_tokens
            if k is not None:
                signal = _top_k(of_tokens, head, teacher.vocabulary.position(of_row[of_row != -100]), size, k)
            writer.add(s.key, encoded(format_, signal, size))
            written.add(s.key)
            bar.update(s.trained)
    writer.flush()


def _seen_batches(trainer: TAIDTrainer) -> Iterator[dict[str, Any]]:
    """The batches of a run's first epoch, as training sees them, and of its evaluations."""
    yield from trainer.get_train_dataloader()
    for dataset in _held_out(trainer).values():
        yield from trainer.get_eval_dataloader(dataset)


@torch.no_grad()
def _top_k(hidden: Tensor, head: Head, labels: Tensor, size: int, k: int) -> TopK:
    parts = [
        TopK.of(head.logits(hidden[start : start + _TOKENS])[:, :size], labels[start : start + _TOKENS], k)
        for start in range(0, len(hidden), _TOKENS)
    ]
    return TopK(
        *(
            torch.cat([getattr(part, name) for part in parts])
            for name in ("ids", "log_probs", "log_rest", "label_log_probs")
        )
    )
