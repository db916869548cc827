"""What the trainer asks of a teacher, and the teachers that answer: a model at hand, or what one once said.

The trainer and the objectives do not know which one it is. A teacher is given a batch and the places of its trained
tokens, and answers with its final hidden states and head, which determine its whole distribution, or with the top k of
each trained token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from taid.cache import Cache, sequences, shifted
from taid.fused import Head
from taid.heads import OutputHead
from taid.top_k import TopK
from taid.vocabulary import Vocabulary


class Hidden(NamedTuple):
    """Hidden states ``[B, T, E]`` as the teacher's output head is given them, and that head, cut to the shared ids."""

    hidden: Tensor
    head: Head


class Teacher(ABC):
    """A frozen language model, wherever it is."""

    kind: str
    """What its answers are worth: "exact", or which part of a distribution they give."""

    @abstractmethod
    def __call__(self, inputs: dict[str, Any], labels: Tensor) -> Hidden | TopK:
        """What it says of a batch.

        Args:
            inputs: what a model's forward takes.
            labels: ``[B, T]``: the token that each position has to predict, -100 where it is not trained. What is said
                of untrained positions is not read.
        """

    @abstractmethod
    def logits(self, inputs: dict[str, Any], labels: Tensor) -> Tensor | TopK:
        """The same for the plain formula: logits ``[N, V]`` of the N trained tokens over the shared ids."""

    @abstractmethod
    def prefetch(self, batches: Iterable[dict[str, Any]]) -> None:
        """Say which batches come next, their labels not shifted yet."""


class LocalTeacher(Teacher):
    """A loaded model.

    Args:
        model: frozen, in evaluation mode, on its device.
        vocabulary: the ids that student and teacher share.
        autocast: the context that it runs in.
        fused: whether it will be asked for hidden states.

    Raises:
        ValueError: its output head cannot be fused; says why and the remedy.
    """

    kind = "exact"

    def __init__(
        self, model: nn.Module, vocabulary: Vocabulary, autocast: Callable[[], AbstractContextManager[Any]], fused: bool
    ) -> None:
        self.model, self.vocabulary, self.autocast = model, vocabulary, autocast
        self.head = OutputHead(model, "teacher") if fused else None

    def hidden(self, inputs: dict[str, Any]) -> Tensor:
        """Hidden states ``[B, T, E]``; its head is not computed."""
        assert self.head is not None
        hidden: list[Tensor] = []
        with torch.no_grad(), self.autocast(), self.head.replaced_by(hidden.append):
            self.model(**inputs)
        return hidden[0]

    def __call__(self, inputs: dict[str, Any], labels: Tensor) -> Hidden:
        """See :class:`Teacher`."""
        assert self.head is not None
        hidden = self.hidden(inputs).to(labels.device)  # a teacher that device_map has spread may end on another one
        return Hidden(hidden, self.head.head(self.vocabulary.holes).to(labels.device))

    def prefetch(self, batches: Iterable[dict[str, Any]]) -> None:
        """Nothing to fetch."""

    @torch.no_grad()
    def logits(self, inputs: dict[str, Any], labels: Tensor) -> Tensor:
        """See :class:`Teacher`."""
        with self.autocast():
            return self.vocabulary.select(self.model(**inputs).logits[labels != -100])


class CachedTeacher(Teacher):
    """What a teacher said when the cache was captured: the same answer for the same row, whatever batch it is in.

    Args:
        cache: checked against the run.
        vocabulary: the ids that student and teacher share.
        device: where its answers go.
    """

    def __init__(self, cache: Cache, vocabulary: Vocabulary, device: torch.device) -> None:
        self.cache, self.vocabulary, self.kind = cache, vocabulary, cache.kind
        head = cache.head()
        self.head = None if head is None else head.at(vocabulary.holes).to(device)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="taid-cache")
        self._coming: dict[bytes, Future[dict[str, Tensor]]] = {}

    def prefetch(self, batches: Iterable[dict[str, Any]]) -> None:
        """Read the rows of the coming batches from disk while others are computed."""
        self._coming.clear()
        for batch in batches:
            for sequence in sequences(batch, shifted(batch["labels"])):
                if sequence.trained and sequence.key not in self._coming:
                    self._coming[sequence.key] = self._reader.submit(self.cache.read, sequence.key)

    def _read(self, key: bytes) -> dict[str, Tensor]:
        coming = self._coming.pop(key, None)
        return self.cache.read(key) if coming is None else coming.result()

    def __call__(self, inputs: dict[str, Any], labels: Tensor) -> Hidden | TopK:
        """See :class:`Teacher`."""
        records = [self._read(sequence.key) for sequence in sequences(inputs, labels) if sequence.trained]
        signal = self.cache.decoded(records, labels.device)
        if isinstance(signal, TopK):
            return signal
        assert self.head is not None
        hidden = signal.new_zeros(*labels.shape, signal.shape[-1])
        hidden[labels != -100] = signal
        return Hidden(hidden, self.head)

    def logits(self, inputs: dict[str, Any], labels: Tensor) -> Tensor | TopK:
        """See :class:`Teacher`."""
        signal = self(inputs, labels)
        if isinstance(signal, TopK):
            return signal
        return signal.head.logits(signal.hidden[labels != -100])[:, : len(self.vocabulary.ids)]
