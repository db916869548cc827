"""The row stage of the fused loss, in the form that is fastest on the device at hand."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from taid.losses.kernels.c_rows import native_rows
from taid.losses.kernels.row_task import RowTask
from taid.losses.kernels.torch_rows import rows

__all__ = ["row_stage"]


def row_stage(
    student_MV: Tensor,
    teacher_MV: Tensor | None,
    labels_M: Tensor,
    task: RowTask,
    columns_MK: Tensor,
    *,
    gradient: torch.dtype | None,
) -> Tensor:
    """Compute :func:`taid.losses.kernels.torch_rows.rows` in the form that is fastest on the device of the tiles."""
    return _form(student_MV.device.type)(student_MV, teacher_MV, labels_M, task, columns_MK, gradient=gradient)


@functools.cache
def _form(device: str) -> Callable[..., Tensor]:
    if device == "cuda" and importlib.util.find_spec("triton") is not None:
        from taid.losses.kernels import triton_rows

        return triton_rows.rows
    return native_rows if device == "cpu" else rows
