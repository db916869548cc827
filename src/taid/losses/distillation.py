"""The distillation loss by the plain formula: the contract of the fused one, and the form for your own objectives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from taid.losses import objectives
from taid.losses.kernels.row_task import COLUMNS, Finish, RowTask
from taid.losses.objective_table import OBJECTIVES
from taid.losses.sparse_logits import Sampled, Sparse, TopK


class DistillationLoss(NamedTuple):
    """The result of :func:`distillation_loss` and of :func:`taid.fused_distillation_loss`.

    Attributes:
        loss: the loss summed over trained tokens, 0-dim, nats; differentiable.
        sums: sums over trained tokens, 0-dim, float64 (float32 where the device has none), without a gradient:
            ``trained`` (their number), ``objective``, ``kl`` (forward KL to the teacher), ``cross_entropy`` (to the
            labels), ``entropy`` (of the student), ``correct`` (the label is the student's likeliest token),
            ``teacher_cross_entropy``, ``target_cross_entropy`` (of TAID's target and the student) and
            ``temperature_gradient`` (of ctkd's objective). Zero where there is no teacher.
    """

    loss: Tensor
    sums: dict[str, Tensor]


def distillation_loss(
    student_NV: Tensor,
    teacher_NV: Tensor | Sparse | None,
    labels_N: Tensor,
    objective: str | Callable[[Tensor, Tensor], Tensor] = "taid",
    *,
    kd_ratio: float = 1.0,
    **parameters: Any,
) -> DistillationLoss:
    r"""The sum over N trained tokens of an objective, from logits, by the plain formula.

    .. math:: \sum_n kd\_ratio \cdot objective_n + (1 - kd\_ratio) \cdot (-\log q_n(label_n))

    Args:
        student_NV: the student's logits.
        teacher_NV: the teacher's, or its :class:`TopK` or :class:`Sampled`; None for the label's cross-entropy alone.
        labels_N: the tokens to predict, int64.
        objective: the name of a function of :mod:`.objectives`, "sft", or a function of your own of both logits
            that gives N values.
        kd_ratio: share of the objective; the rest is cross-entropy to the labels.
        **parameters: those of the objective.

    Raises:
        ValueError: as :func:`taid.fused_distillation_loss`, or your own function gives something else.
    """
    own = objective if callable(objective) else None
    name = "forward_kl" if callable(objective) else objective  # what is asked of the teacher is the same
    task = RowTask.for_objective(name, kd_ratio, parameters, Finish(), Finish())
    share, student_NV = task.kd_ratio, student_NV.float()
    _check_labels(labels_N, student_NV.shape[-1])
    with contextlib.nullcontext() if share < 1 else torch.no_grad():
        cross_entropy = F.cross_entropy(student_NV, labels_N, reduction="none")
    zero = torch.zeros_like(cross_entropy)
    columns = dict.fromkeys(COLUMNS, zero) | {"cross_entropy": cross_entropy}
    columns |= _without_objective(student_NV, teacher_NV, labels_N)
    if isinstance(teacher_NV, Sparse) and share > 0:
        if own is not None:
            raise ValueError(
                "an objective of your own needs the teacher's whole distribution, not its top k or samples"
            )
        teacher_NV.check_objective(name)
    if isinstance(teacher_NV, TopK):  # from here on, of k + 1 outcomes
        student_NV, teacher_NV = teacher_NV.outcomes(student_NV)
    if isinstance(teacher_NV, Sampled):
        estimate = teacher_NV.forward_kl(student_NV)
        columns |= {"kl": estimate} | ({"objective": estimate} if share > 0 else {})
    elif teacher_NV is not None:
        columns |= _against_teacher(student_NV, teacher_NV, labels_N, task, own)
    loss = (share * columns["objective"] + (1 - share) * cross_entropy).sum()
    sums = {name: column.detach().sum(dtype=exact_dtype(column)) for name, column in columns.items()}
    return DistillationLoss(loss, {"trained": zero.new_full((), len(zero), dtype=exact_dtype(zero)), **sums})


def _check_labels(labels_N: Tensor, V: int) -> None:
    if labels_N.device.type == "cpu" and labels_N.numel() and not 0 <= labels_N.min() <= labels_N.max() < V:
        raise ValueError(
            f"labels must be ids 0 .. {V - 1} of trained tokens: leave tokens that are not trained (-100) out"
        )


@torch.no_grad()
def _without_objective(student_NV: Tensor, teacher_NV: Tensor | Sparse | None, labels_N: Tensor) -> dict[str, Tensor]:
    """Return the columns that compare each model with the labels alone, and the student's entropy."""
    columns = {
        "entropy": torch.special.entr(student_NV.softmax(-1)).sum(-1),
        "correct": student_NV.gather(-1, labels_N[:, None])[:, 0] >= student_NV.amax(-1),
    }
    if isinstance(teacher_NV, Sparse):
        columns["teacher_cross_entropy"] = -teacher_NV.label_log_probs
    elif teacher_NV is not None:
        columns["teacher_cross_entropy"] = F.cross_entropy(teacher_NV.float(), labels_N, reduction="none")
    return columns


def _against_teacher(
    student_NV: Tensor,
    teacher_NV: Tensor,
    labels_N: Tensor,
    task: RowTask,
    own: Callable[[Tensor, Tensor], Tensor] | None,
) -> dict[str, Tensor]:
    """Return the columns that compare the student with the teacher: the objective, the KL and what moves by them."""
    columns = _objective(student_NV, teacher_NV, labels_N, task, own) if task.kd_ratio > 0 else {}
    with torch.no_grad():
        same = task.objective == "forward_kl" and own is None and task.kd_ratio > 0
        columns["kl"] = columns["objective"] if same else objectives.forward_kl(student_NV, teacher_NV)
        if task.objective == "taid" and task.kd_ratio > 0:
            target_NV = objectives.interpolated_log_probs(student_NV, teacher_NV, **task.parameters).exp()
            columns["target_cross_entropy"] = F.cross_entropy(student_NV, target_NV, reduction="none")
    return columns


def _objective(
    student_NV: Tensor,
    teacher_NV: Tensor,
    labels_N: Tensor,
    task: RowTask,
    own: Callable[[Tensor, Tensor], Tensor] | None,
) -> dict[str, Tensor]:
    """Return the objective's values, and the gradient of ctkd's temperature as the first of N values."""
    known = OBJECTIVES[task.objective]
    given = task.parameters | ({"labels": labels_N} if known.needs_labels else {})
    learns_temperature = known.moves == "temperature" and torch.is_grad_enabled()
    if learns_temperature:
        given["temperature"] = torch.as_tensor(given["temperature"]).detach().to(student_NV).requires_grad_()
    values = (own or getattr(objectives, task.objective))(student_NV, teacher_NV, **given)
    tokens = student_NV.shape[:1]
    if not isinstance(values, Tensor) or values.shape != tokens:
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"an objective gives one value a token, {list(tokens)}; yours gave {got}")
    if torch.is_grad_enabled() and student_NV.requires_grad and not values.requires_grad:
        raise ValueError("an objective of your own has no gradient: it must not detach the student's logits")
    if not learns_temperature:
        return {"objective": values}
    gradient = torch.autograd.grad(values.sum(), given["temperature"], retain_graph=True)[0]
    return {"objective": values, "temperature_gradient": torch.cat([gradient[None], torch.zeros_like(values)])}


def exact_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that sums over tokens add up in; Apple's GPUs have no float64."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
