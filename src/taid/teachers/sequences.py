"""Find the sequences of a batch and their content keys, which depend on neither batch, padding, packing nor order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

KEY_BYTES = 16


class Sequence(NamedTuple):
    """A sequence within a batch: its location, its key, its token ids, and which of its positions are trained."""

    row: int
    start: int
    stop: int
    key: bytes
    ids: np.ndarray
    positions: np.ndarray

    @property
    def trained(self) -> int:
        """The number of its trained tokens."""
        return len(self.positions)


def sequences(inputs: dict[str, Any], labels: Tensor) -> Iterator[Sequence]:
    """Yield the sequences of a batch in the order of its trained tokens.

    Args:
        inputs: ``input_ids`` ``[B, T]`` with an ``attention_mask``. If several sequences share a row (packed,
            padding-free), ``position_ids`` that restart at 0 instead.
        labels: ``[B, T]``: the token that each position has to predict, -100 where it is not trained.
    """
    ids, trained = inputs["input_ids"].cpu().numpy(), (labels != -100).cpu().numpy()
    if "attention_mask" in inputs:
        mask = inputs["attention_mask"].cpu().numpy()
        bounds = [
            (row, int(seen[0]), int(seen[-1]) + 1) for row, m in enumerate(mask) if len(seen := np.flatnonzero(m))
        ]
    else:
        bounds = []
        for row, positions in enumerate(inputs["position_ids"].cpu().numpy()):
            starts = np.flatnonzero(positions == 0).tolist()
            bounds += [(row, *pair) for pair in zip(starts, [*starts[1:], len(positions)], strict=True)]
    for row, start, stop in bounds:
        of_ids, of_trained = ids[row, start:stop].astype("<i8"), trained[row, start:stop]
        content = of_ids.tobytes() + np.packbits(of_trained).tobytes()
        key = hashlib.blake2b(content, digest_size=KEY_BYTES).digest()
        yield Sequence(row, start, stop, key, of_ids, np.flatnonzero(of_trained))
