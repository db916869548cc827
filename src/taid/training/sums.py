"""Sums over trained tokens: from the micro-batches of one process to means over all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class MicroBatches:
    """What was summed in each micro-batch since it was last asked, on this process.

    Args:
        accelerator: reduces over processes.
        sharing: how many processes split one model and so see the same rows.
    """

    def __init__(self, accelerator: Any, sharing: int) -> None:
        self.accelerator, self.sharing = accelerator, sharing
        self._sums: list[dict[str, Tensor]] = []

    def add(self, sums: dict[str, Tensor]) -> None:
        """One more micro-batch."""
        self._sums.append(sums)

    def clear(self) -> None:
        """Forget them."""
        self._sums = []

    def total(self) -> dict[str, float]:
        """Add them up over all processes, and begin anew: one small all-reduce, one transfer."""
        names = sorted(self._sums[0])
        # float64 keeps long evaluations exact; Apple's GPUs have none.
        dtype = torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        rows = torch.stack([torch.stack([sums[name].to(dtype) for name in names]) for sums in self._sums])
        self._sums = []
        total = self.accelerator.reduce(rows.sum(0), "sum") / self.sharing
        return dict(zip(names, total.tolist(), strict=True))

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Within this context others are summed; then those from before go on."""
        before, self._sums = self._sums, []
        try:
            yield
        finally:
            self._sums = before


def means(sums: dict[str, float]) -> dict[str, float]:
    """Means a trained token of what was summed, under the names that SFTTrainer logs."""
    trained = max(sums["trained"], 1.0)
    found: dict[str, float] = {
        name: sums[name] / trained
        for name in ("cross_entropy", "kl", "teacher_cross_entropy", "entropy")
        if name in sums
    }
    found["mean_token_accuracy"] = sums["correct"] / trained
    if "aux_loss" in sums:
        found["aux_loss"] = sums["aux_loss"] / sums["aux_batches"]
    return found
