"""The row stage of the fused loss, in the form that is fastest on the device at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from taid.kernels.native import native_rows
from taid.kernels.rows import RowTask, rows

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
    """See :func:`taid.kernels.rows.rows`, which defines what is computed."""
    form = native_rows if student_MV.device.type == "cpu" else rows
    return form(student_MV, teacher_MV, labels_M, task, columns_MK, gradient=gradient)
