"""Whether a cache of the teacher fits a run: the same pair, options and format, and an answer for every row."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from taid.config.training import TAIDConfig
from taid.losses.fused import shifted
from taid.losses.sparse_logits import Sampled, TopK
from taid.models.vocabulary import Vocabulary
from taid.teachers import cache_manifest, digests
from taid.teachers.cache import Cache
from taid.teachers.placement import teacher_init_kwargs
from taid.teachers.sequences import Sequence, sequences

_COLUMNS = ("input_ids", "labels", "seq_lengths")
_FIRST = 16  # rows of which the longest is asked of a server
_SPARSE: dict[str, type[TopK | Sampled]] = {"top_k": TopK, "sampled": Sampled}

ROWS = 64
"""How many rows are collated at a time where only their keys are wanted."""


@dataclass(frozen=True)
class RunRows:
    """The prepared rows of a run, and how they become batches.

    Attributes:
        train: the training rows, which may be a stream.
        held_out: held-out rows, a dict of several, or None.
        collator: makes a batch of rows, as training does.
        accelerator: knows the processes, and reduces over them.
    """

    train: Any
    held_out: Any
    collator: Callable[[list[Any]], dict[str, Any]]
    accelerator: Any

    @property
    def named_held_out(self) -> dict[str, Any]:
        """The held-out data sets by name."""
        named = self.held_out if isinstance(self.held_out, dict) else {"eval": self.held_out}
        return {name: dataset for name, dataset in named.items() if dataset is not None}

    def batches(self, size: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield this process's share of each data set, in its order, `size` rows at a time, collated as for training.

        Raises:
            ValueError: a data set is a stream.
        """
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        for name, dataset in {"train": self.train, **self.named_held_out}.items():
            if not hasattr(dataset, "__len__"):
                raise ValueError(
                    f"the {name} data set is a stream, whose rows are not known beforehand: use a teacher model"
                )
            columns = [name for name in _COLUMNS if name in dataset.column_names]
            own = dataset.select_columns(columns).select(range(rank, len(dataset), ranks))
            for start in range(0, len(own), size):
                yield name, self.collator([own[i] for i in range(start, min(start + size, len(own)))])

    def keys(self) -> dict[str, dict[bytes, int]]:
        """Return, for each data set, the key of every row that a run sees and how many of its tokens are trained.

        On several processes, each has a share of them.
        """
        # Every data set has a name on every process, whether it has a share of it or not.
        found: dict[str, dict[bytes, int]] = {name: {} for name in ("train", *self.named_held_out)}
        for name, batch in self.batches(ROWS):
            found[name].update((s.key, s.trained) for s in sequences(batch, shifted(batch["labels"])) if s.trained)
        return found

    def first(self) -> Sequence:
        """Return the longest of the first training rows."""
        rows = itertools.islice(iter(self.train), _FIRST)
        batch = self.collator([{name: row[name] for name in _COLUMNS if name in row} for row in rows])
        return max(sequences(batch, shifted(batch["labels"])), key=lambda row: len(row.ids))


@dataclass(frozen=True)
class AskedTeacher:
    """The teacher whose answers a run asks for, as far as a cache depends on it.

    Attributes:
        name: of the teacher, or None where the configuration has none.
        tokenizer: the student's, with the chat template of the run.
        teacher_tokenizer: the teacher's.
        vocabulary: the ids that both share.
        args: the options of the run.
    """

    name: str | None
    tokenizer: Any
    teacher_tokenizer: Any
    vocabulary: Vocabulary
    args: TAIDConfig

    def manifest(self, format_: str | None) -> dict[str, Any]:
        """Return what the manifest of a fitting cache says; None where that is not known here."""
        args, name, ids = self.args, self.name, len(self.vocabulary.ids)
        return {
            "format": format_,
            "k": args.teacher_top_k and min(args.teacher_top_k, ids) if format_ == "top_k" else None,
            "draws": args.teacher_cache_samples if format_ == "sampled" else None,
            "server_model": args.teacher_server_model,
            "teacher_revision": None if name and Path(name).expanduser().is_dir() else args.teacher_model_revision,
            "teacher_options": self._options(),
            "teacher_tokenizer": digests.tokenizer_digest(self.teacher_tokenizer),
            **digests.model_digests(name, args.teacher_model_revision),
            "tokenizer": digests.tokenizer_digest(self.tokenizer),
            "chat_template": digests.text_digest(self.tokenizer.chat_template),
            "vocabulary": digests.ids_digest(self.vocabulary.ids),
        }

    def _options(self) -> dict[str, str]:
        """Return how the teacher is loaded and run, as far as it changes its numbers."""
        args = self.args
        autocast = "bfloat16" if args.bf16 else "float16" if args.fp16 else "none"
        loaded = {name: str(value) for name, value in teacher_init_kwargs(args).items() if name != "distributed_config"}
        quantized = {"quantization": args.teacher_quantization} if args.teacher_quantization else {}
        return {"autocast": autocast, **loaded, **quantized}


def check_format(name: str, args: TAIDConfig) -> None:
    """Raise a ValueError where a format keeps too little of the teacher's distribution for what a run asks for."""
    kind = _SPARSE.get(name)
    if kind is None or args.distillation_share == 0:
        return
    kind.check_objective(args.objective)
    if args.taid_signal == "cross_entropy" and args.objective == "taid":
        raise ValueError("taid_signal: cross_entropy needs the teacher's whole distribution, not its top k: use kl")


def require(found: Cache, asked: AskedTeacher, rows: RunRows) -> None:
    """Raise a ValueError where a cache does not fit a run, or lacks rows of it."""
    args = asked.args
    check_format(found.format.name, args)
    expected = asked.manifest(args.teacher_cache_format or found.format.name)
    if found.format.needs_head:
        del expected["vocabulary"]  # hidden states and a head know nothing of ids
    if found.manifest["server_model"] is not None:  # nothing is known of a server's weights and options
        unknown = dict.fromkeys(("teacher_options", "teacher_config", "teacher_weights", "teacher_revision"))
        expected |= unknown | {"server_model": args.teacher_server_model}
    if asked.name is not None and expected["teacher_weights"] is None:
        expected["teacher"] = asked.name  # not on this machine: its name is all there is
    cache_manifest.check(found.manifest, expected, found.folder)
    for name, keys in rows.keys().items():
        counts = torch.tensor([sum(key not in found for key in keys), len(keys)], device=args.device)
        missing, number = rows.accelerator.reduce(counts, "sum").tolist()
        if missing:
            raise ValueError(
                f"teacher cache {found.folder} lacks {missing} of the {number} different rows of the {name} data set. "
                "`taid cache` with this recipe adds them. (A row is its token ids and which of them are trained: "
                "another max_length, template or loss mask makes another row.)"
            )
