"""Find the token ids that student and teacher share: by the identity of tokens, never by the size of a matrix.

Models of one family often pad their embeddings to different sizes (Qwen2.5: 151,936 rows for 0.5B, 152,064 for 7B,
151,665 tokens in both). A padding row has probability zero on both sides: the logits of both models are first cut to
the shared ids.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Texts whose tokens differ when two tokenizers hold the same entries but normalize or split differently. The last one
# is a ligature, a circled digit and the sign of the angstrom, which Unicode's normal forms replace.
_PROBES = (
    *("The quick brown fox", "  def f(x):\n\treturn x**2\n", "1234567.89", "naïve 東京 😀", "Don't\r\n\n  STOP"),
    "\ufb01\u2460\u212b",
)

_WAYS_OUT = (
    "Ways out: give the student the teacher's tokenizer (tokenizer_from: teacher; its embeddings are resized and "
    "tokens known to both keep their vectors), or choose a teacher of the student's family."
)


@dataclass(frozen=True)
class Vocabulary:
    """The token ids that logits are cut to.

    Attributes:
        ids: the shared ids in ascending order.
    """

    ids: tuple[int, ...]

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, rows: int) -> Vocabulary:
        """Return the ids of one tokenizer that a model with `rows` output rows can predict."""
        return cls(tuple(sorted(i for i in tokenizer.get_vocab().values() if i < rows)))

    @classmethod
    def shared(
        cls, student_tokenizer: Any, teacher_tokenizer: Any, *, student_rows: int, teacher_rows: int
    ) -> Vocabulary:
        """Return the ids that mean the same token to both tokenizers and exist in both output heads.

        Special tokens may differ (a renamed reserved token, an image placeholder). Their ids are not shared, and
        :meth:`require_shared` guards the data against them. Ordinary tokens may not differ.

        Raises:
            ValueError: the tokenizers differ; names the first ordinary token that does, and the ways out.
        """
        student, teacher = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
        special = {*student_tokenizer.get_added_vocab(), *teacher_tokenizer.get_added_vocab()}
        if different := {t for t in {**student, **teacher} if student.get(t) != teacher.get(t)} - special:
            ids = {**teacher, **student}
            token = min(different, key=lambda token: (ids[token], token not in teacher))
            raise ValueError(
                f"student and teacher have different tokenizers: the first difference is token {token!r}, id "
                f"{student.get(token, 'none')} for the student and {teacher.get(token, 'none')} for the teacher. "
                + _WAYS_OUT
            )
        if not _same_pipeline(student_tokenizer, teacher_tokenizer):
            texts = _as_text(student_tokenizer, sorted(i for t, i in student.items() if t not in special))
            if found := split_differently(student_tokenizer, teacher_tokenizer, texts):
                text, ours, theirs = found
                raise ValueError(
                    f"student and teacher have the same vocabulary but split text differently: {text!r} becomes {ours} "
                    f"for the student and {theirs} for the teacher. " + _WAYS_OUT
                )
        rows = min(student_rows, teacher_rows)
        return cls(tuple(sorted(i for token, i in student.items() if teacher.get(token) == i and i < rows)))

    @property
    def is_prefix(self) -> bool:
        """Return whether the ids are 0 .. n-1 without a gap, so that cutting is a view."""
        return not self.ids or self.ids[-1] == len(self.ids) - 1

    @functools.cached_property
    def index(self) -> Tensor:
        """The ids as a tensor on the CPU. It is cached because a step needs it several times."""
        return torch.tensor(self.ids)

    @property
    def kept_ids(self) -> Tensor | None:
        """The ids to select as a tensor; None if they are a prefix, so that a slice is enough."""
        return None if self.is_prefix else self.index

    def select(self, logits: Tensor) -> Tensor:
        """Cut logits ``[..., rows]`` to the shared ids, ``[..., len(ids)]``."""
        if self.is_prefix:
            return logits[..., : len(self.ids)]
        return logits.index_select(-1, self.index.to(logits.device))

    def position(self, labels: Tensor) -> Tensor:
        """Map token ids to their positions among the shared ids."""
        if self.is_prefix:
            return labels
        return torch.searchsorted(self.index.to(labels.device), labels)

    def require_shared(self, rows: Iterable[list[int]], tokenizer: Any, name: str) -> None:
        """Raise a ValueError that names the first token in `rows` that is not shared, and its row."""
        shared = frozenset(self.ids)
        for number, row in enumerate(rows):
            if not shared.issuperset(row):
                unknown = next(i for i in row if i not in shared)
                raise ValueError(
                    f"row {number} of {name} contains token {tokenizer.convert_ids_to_tokens(unknown)!r} "
                    f"(id {unknown}), which the teacher does not know by that id. Remove it from the data or the "
                    "chat template, or use tokenizer_from: teacher."
                )


def split_differently(one: Any, other: Any, texts: Iterable[str] = ()) -> tuple[str, list[int], list[int]] | None:
    """Return the first text that two tokenizers split differently, with both lists of ids; None if there is none.

    The texts are probes that reveal most differences, and `texts`.
    """
    texts = [*_PROBES, *texts]
    splits = (tokenizer(texts, add_special_tokens=False)["input_ids"] for tokenizer in (one, other))
    return next((found for found in zip(texts, *splits, strict=True) if found[1] != found[2]), None)


def _same_pipeline(one: Any, other: Any) -> bool:
    """Return whether two fast tokenizers are the same to the last merge, which spares a probe of every token."""
    is_fast = all(hasattr(tokenizer, "backend_tokenizer") for tokenizer in (one, other))
    return is_fast and type(one) is type(other) and one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()


def _as_text(tokenizer: Any, ids: list[int]) -> list[str]:
    """Return all tokens that are valid text, sixteen a line: if merges differ, some token is split."""
    texts = [text for text in tokenizer.batch_decode([[i] for i in ids]) if "\ufffd" not in text]
    return [" ".join(texts[start : start + 16]) for start in range(0, len(texts), 16)]


@torch.no_grad()
def adopt_tokenizer(model: Any, old_tokenizer: Any, new_tokenizer: Any) -> None:
    """Give `model` another tokenizer: resize its embeddings, and keep the vector of each token known to both.

    Input and output embeddings (tied or not) and the output's bias get one row a token of `new_tokenizer`. Tokens that
    are new to the model start at the mean of its old vectors. Special-token ids of the configuration follow the new
    tokenizer.
    """
    old, new = old_tokenizer.get_vocab(), new_tokenizer.get_vocab()
    old_rows = [table[: max(old.values()) + 1].clone() for table in _tables(model)]
    known = [(i, old[token]) for token, i in new.items() if token in old and old[token] < len(old_rows[0])]
    targets, sources = (torch.tensor(column, dtype=torch.long) for column in zip(*known, strict=True))

    model.resize_token_embeddings(max(new.values()) + 1, mean_resizing=False)
    for table, rows in zip(_tables(model), old_rows, strict=True):
        table.copy_(rows.float().mean(0).expand_as(table))
        table[targets.to(rows.device)] = rows[sources.to(rows.device)]
    model.get_input_embeddings().padding_idx = None  # the old one: it would keep another token from learning

    adopt_special_tokens(model, new_tokenizer)


def adopt_special_tokens(model: Any, tokenizer: Any) -> None:
    """Set the special-token ids of a model's configuration to those of a tokenizer."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config.get_text_config(), name, getattr(tokenizer, name))
        setattr(model.generation_config, name, getattr(tokenizer, name))


def _tables(model: Any) -> list[Tensor]:
    """Return the tensors with one row a token: input embeddings, untied output embeddings and the output's bias."""
    head = model.get_output_embeddings()
    tables = (model.get_input_embeddings().weight, getattr(head, "weight", None), getattr(head, "bias", None))
    return list({id(table): table for table in tables if table is not None}.values())
