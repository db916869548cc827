"""Multiply a chunk of tokens with one output head, in the precision that the device multiplies best."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from taid.losses.kernels import cpu_matmul

# Rows of a half-precision head whose copy in float32, or sum in it, is small.
_SLAB = 4096


class HeadProducts:
    """Logits of both models' chunks, and the gradients of the student's hidden states and head.

    ======================  =================  ==============  =======================================
    weight, device          operands           tile            weight gradient
    ======================  =================  ==============  =======================================
    float32, float64        as they are        same            added up in the products
    half, CUDA              as they are        float32         added up in float32 by the products
    bfloat16, CPU with it   as they are        bfloat16        added up in float32
    half, elsewhere         float32, by slabs  float32         added up in float32 by the products
    ======================  =================  ==============  =======================================

    A slab is a few thousand rows of the weight. :mod:`.cpu_matmul` says how a CPU multiplies. The last row of the table
    costs no speed: such a CPU multiplies in float32 anyway, and PyTorch's own bfloat16 products there are up to 300
    times slower (docs/performance.md).
    """

    def __init__(self, weight: Tensor, size: int, autocast: torch.dtype | None, wants_gradient: bool) -> None:
        self.size, self.gradient_dtype, self.on_cpu = size, scalable(weight.dtype), weight.device.type == "cpu"
        on_cuda, has_bfloat16 = weight.device.type == "cuda", self.on_cpu and cpu_matmul.has_bfloat16()
        if autocast is not None and (on_cuda or (autocast == torch.bfloat16 and has_bfloat16)):
            weight = weight.to(autocast)
        if weight.stride(0) < weight.shape[1]:  # rows that lie over each other, which no BLAS takes
            weight = weight.contiguous()
        self.weight = weight
        half = weight.dtype.itemsize < 4
        native = not half or on_cuda or (weight.dtype == torch.bfloat16 and has_bfloat16)
        self.operand_dtype = weight.dtype if native else torch.float32
        self.tile_dtype = torch.float32 if half and on_cuda else self.operand_dtype
        self.row_multiple = cpu_matmul.row_multiple(self.operand_dtype) if self.on_cpu else 1
        whole = [slice(0, size)]
        slabs = [slice(start, min(start + _SLAB, size)) for start in range(0, size, _SLAB)]
        self.slabs = whole if native else slabs
        # On its way, the gradient of a half-precision head lies in slabs, which go as their rounded copies come.
        self.sum_slabs = slabs if half and not on_cuda else whole
        sum_dtype = torch.promote_types(weight.dtype, torch.float32)
        self.sums = [
            weight.new_empty(s.stop - s.start, weight.shape[1], dtype=sum_dtype)
            for s in (self.sum_slabs if wants_gradient else [])
        ]
        self.is_first = True

    def operand(self, hidden: Tensor) -> Tensor:
        """Return hidden states in the dtype of the products, with rows of zeros up to a multiple of `row_multiple`."""
        hidden = hidden.to(self.operand_dtype)
        missing = -len(hidden) % self.row_multiple
        return nn.functional.pad(hidden, (0, 0, 0, missing)) if missing else hidden

    def tile(self, rows: int) -> Tensor:
        """Return memory for the logits of `rows` tokens and the zeros behind them."""
        # Rows begin at multiples of 64 elements, so that loads stay aligned where V is odd.
        stride = -(-self.size // 64) * 64
        rows += -rows % self.row_multiple
        tile = torch.empty(rows, stride, dtype=self.tile_dtype, device=self.weight.device)
        tile[:, self.size :] = 0  # oneDNN multiplies what follows a row of odd length by 0, which may not be NaN
        return tile[:, : self.size]

    def project(self, hidden_MD: Tensor, tile: Tensor) -> Tensor:
        """Write ``hidden @ weight.T`` into the first rows of a tile, and return these rows."""
        out_MV = tile[: len(hidden_MD)]
        mixed = {"out_dtype": out_MV.dtype} if out_MV.dtype != self.operand_dtype else {}
        for slab in self.slabs:
            weight = self.weight[slab].to(self.operand_dtype)
            if self.on_cpu:
                cpu_matmul.project(hidden_MD, weight, out_MV[:, slab])
            else:
                torch.mm(hidden_MD, weight.t(), out=out_MV[:, slab], **mixed)
        return out_MV

    def project_back(self, gradient_MV: Tensor) -> Tensor:
        """Return ``gradient @ weight``, the gradient of the hidden states."""
        multiply = cpu_matmul.project_back if self.on_cpu else torch.mm
        parts = (
            multiply(gradient_MV[:, slab].to(self.operand_dtype), self.weight[slab].to(self.operand_dtype))
            for slab in self.slabs
        )
        return functools.reduce(Tensor.add_, parts)

    def add_outer(self, gradient_MV: Tensor, hidden_MD: Tensor) -> None:
        """Add ``gradient.T @ hidden`` to the weight's gradient."""
        beta, self.is_first = 0 if self.is_first else 1, False
        for slab, total in zip(self.sum_slabs, self.sums, strict=True):
            columns = gradient_MV[:, slab].to(self.operand_dtype)
            if self.on_cpu:
                cpu_matmul.add_outer(total, columns, hidden_MD, beta)
            else:
                mixed: dict[str, Any] = {"out_dtype": total.dtype} if total.dtype != self.operand_dtype else {}
                torch.addmm(total, columns.t(), hidden_MD, beta=beta, out=total, **mixed)

    def outer_sum(self) -> Tensor:
        """Return the weight's gradient in its dtype, with zeros for rows beyond the vocabulary."""
        if self.is_first:  # there was no trained token
            return torch.zeros_like(self.weight, dtype=self.gradient_dtype)
        first = self.sums[0]
        if len(self.sums) == 1 and first.shape == self.weight.shape and first.dtype == self.gradient_dtype:
            return first
        gradient = torch.empty_like(self.weight, dtype=self.gradient_dtype)
        gradient[self.size :] = 0
        for slab in reversed(self.sum_slabs):
            gradient[slab] = self.sums.pop()
        return gradient


def chunk_rows(N: int, V: int, itemsize: int, device: str) -> int:
    """Return the rows of a tile: enough for fast products, within a budget of bytes, in chunks of about equal size."""
    if device == "cuda":  # the sums of weight gradients go through its memory once a chunk
        most, budget, unit = 2**14, 2**31, 1
    elif itemsize >= 4:
        most, budget, unit = 512, 400 * 2**20, 16  # as oneDNN is given them
    else:  # bfloat16: its instructions multiply blocks
        most, budget, unit = 704, 240 * 2**20, 64
    most = min(most, budget // (2 * V * itemsize))
    most = max(1, most - most % unit if most > unit else most)
    rows = -(-N // max(1, -(-N // most)))
    return max(1, min(N, most, -(-rows // unit) * unit))


def scalable(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a gradient waits in for its factor: float32 for float16, which overflows in sums.

    A gradient scaler could not save what has vanished in float16 before.
    """
    return torch.float32 if dtype == torch.float16 else dtype
