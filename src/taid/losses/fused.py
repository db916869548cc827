r"""The distillation loss fused with both output heads: without logits in memory, gradients in the forward pass.

Per chunk of M trained tokens (N tokens in all, widths D of student and E of teacher, V shared ids):

    student_MV = student_hidden_MD @ student_weight_VD.T          |
    teacher_MV = teacher_hidden_ME @ teacher_weight_VE.T          |  the four products of the floor
    kernels: statistics of each row, then dL/dz_q in place        |  (docs/performance.md)
    d_hidden_MD = gradient_MV @ student_weight_VD                 |
    d_weight_VD += gradient_MV.T @ student_hidden_MD              |

Only two ``[M, V]`` tiles exist, whatever N is. The loss is a sum and its gradient known as soon as both tiles are, so
the backward pass multiplies what is there by one number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from taid.losses.distillation import DistillationLoss, exact_dtype
from taid.losses.kernels import row_stage
from taid.losses.kernels.head_matmul import HeadProducts, chunk_rows, scalable
from taid.losses.kernels.row_task import COLUMNS, Finish, RowTask
from taid.losses.sparse_logits import Sparse, sparse_rows


@dataclass(frozen=True, eq=False)
class Head:
    """An output head: ``logits = cap(scale (hidden @ weight.T + bias))``, ``cap(z) = softcap tanh(z / softcap)``.

    Attributes:
        weight: ``[V, D]``; V may be padded.
        bias: ``[V]`` or None.
        scale: what a model multiplies its logits by (Cohere's ``logit_scale``, the inverse of Granite's
            ``logits_scaling``).
        softcap: Gemma's ``final_logit_softcapping``, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def to(self, device: torch.device) -> Head:
        """Return the head on another device."""
        return Head(
            self.weight.to(device), None if self.bias is None else self.bias.to(device), self.scale, self.softcap
        )

    def at(self, ids: Tensor | None) -> Head:
        """Return the head of some ids only, ``[V']``; None stands for all."""
        if ids is None:
            return self
        ids = ids.to(self.weight.device)
        bias = None if self.bias is None else self.bias.index_select(0, ids)
        return Head(self.weight.index_select(0, ids), bias, self.scale, self.softcap)

    def finish(self, size: int) -> Finish:
        """Return what turns products with the first `size` rows of the weight into logits; no gradient."""
        return Finish(None if self.bias is None else self.bias.detach()[:size], self.scale, self.softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """The plain formula: logits ``[..., V]`` of hidden states ``[..., D]``."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def shifted(labels: Tensor) -> Tensor:
    """Return what each position has to predict, from the labels ``[B, T]`` of a batch; the last predicts nothing."""
    return F.pad(labels[:, 1:], (0, 1), value=-100)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it could not look into a compiled kernel
def fused_distillation_loss(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher_hidden: Tensor | Sparse | None,
    teacher_head: Head | Tensor | None,
    labels: Tensor,
    objective: str = "taid",
    *,
    kd_ratio: float = 1.0,
    vocabulary_size: int | None = None,
    num_trained: int | None = None,
    **parameters: Any,
) -> DistillationLoss:
    r"""The sum over trained tokens of an objective, from hidden states and output heads.

    The contract is the plain formula, :func:`taid.distillation_loss`, of which this is a faster and smaller form:

    .. code-block:: python

        trained = labels != -100
        student_NV = student_head.logits(student_hidden[trained])[:, :vocabulary_size]
        teacher_NV = teacher_head.logits(teacher_hidden[trained])[:, :vocabulary_size]
        distillation_loss(student_NV, teacher_NV, labels[trained], objective, kd_ratio=kd_ratio, **parameters)

    Untrained tokens are never projected. Gradients reach ``student_hidden``, the student's head weight and bias, and
    ctkd's ``temperature`` where they require one; the head's gradient adds up in float32. They are formed in the
    forward pass: the loss can be differentiated once, and not a second time.

    Args:
        student_hidden: ``[..., D]``, what the student's output head is given, at the positions that predict `labels`.
        student_head: a :class:`Head`, or its weight ``[V, D]``.
        teacher_hidden: ``[..., E]``; or, without a `teacher_head`, the :class:`TopK` or :class:`Sampled` of the trained
            tokens in their order; None for the label's cross-entropy alone.
        teacher_head: a :class:`Head` or its weight ``[V', E]``; any dtype, independent of the student's.
        labels: ``[...]``, int64: the token that each position has to predict, -100 where it is not trained.
        objective: the name of a function of :mod:`taid.losses.objectives`, or "sft".
        kd_ratio: share of the objective; the rest is cross-entropy to the labels.
        vocabulary_size: the ids 0 .. n-1 that both heads share, where their rows are padded differently.
        num_trained: the number of trained tokens where the caller knows it; on CUDA this saves a synchronisation.
        **parameters: those of the objective, as in :mod:`taid.losses.objectives`: taid's ``t``, jsd's ``beta``, ...

    Raises:
        ValueError: shapes that do not fit, a label that is no id, an objective or parameter that does not exist.
        RuntimeError: the loss is differentiated twice.

    Reference: TAID, arXiv 2501.16937; gradients in the forward pass as in Liger Kernel, arXiv 2410.10989.
    """
    student_head, teacher_head = _as_head(student_head), None if teacher_head is None else _as_head(teacher_head)
    sparse, teacher_hidden = (teacher_hidden, None) if isinstance(teacher_hidden, Sparse) else (None, teacher_hidden)
    size = _check(student_hidden, student_head, teacher_hidden, teacher_head, labels, vocabulary_size)
    teacher_finish = teacher_head.finish(size) if teacher_head else Finish()
    task = RowTask.for_objective(objective, kd_ratio, _detached(parameters), student_head.finish(size), teacher_finish)
    if task.kd_ratio > 0 and teacher_hidden is None and sparse is None:
        raise ValueError(f"objective {objective!r} needs the teacher's hidden states and head")
    student_hidden = student_hidden.reshape(-1, student_hidden.shape[-1])
    kept = _kept(labels.reshape(-1), num_trained)
    if sparse is not None:
        if task.kd_ratio > 0:
            sparse.check_objective(objective)
        sparse.check(len(kept), size)
    job = _Job(
        teacher_hidden=None
        if teacher_hidden is None
        else teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        teacher_weight=None if teacher_head is None else teacher_head.weight.detach(),
        sparse=sparse,
        labels=labels.reshape(-1).index_select(0, kept),
        kept=kept,
        size=size,
        task=task,
        gradient=torch.is_grad_enabled(),
        autocast=_autocast_dtype(student_hidden.device.type),
    )
    temperature = parameters.get("temperature")
    learned = temperature if isinstance(temperature, Tensor) else None
    loss, sums = _Fused.apply(student_hidden, student_head.weight, student_head.bias, learned, job)  # type: ignore[no-untyped-call]
    by_name = dict(zip(COLUMNS, sums.unbind(), strict=True))
    return DistillationLoss(loss, {"trained": sums.new_full((), len(kept)), **by_name})


@dataclass(frozen=True, eq=False)
class _Job:
    """The arguments of :class:`_Fused` that have no gradient."""

    teacher_hidden: Tensor | None  # [N', E], untrained tokens included
    teacher_weight: Tensor | None  # [V, E]
    sparse: Sparse | None  # of the N trained tokens
    labels: Tensor  # [N]
    kept: Tensor  # [N], places of the trained tokens
    size: int  # V
    task: RowTask
    gradient: bool
    autocast: torch.dtype | None  # what products may round their operands to


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor | None, job: _Job
    ) -> tuple[Tensor, Tensor]:
        # Products choose their own precision; autocast would round the tiles.
        with torch.autocast(hidden.device.type, enabled=False):
            wanted = [wants and job.gradient for wants in ctx.needs_input_grad[:4]]
            loss, sums, gradients = _forward(hidden, weight, bias, job, wanted)
        ctx.gradients = gradients if any(wanted) else None
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias, temperature)]
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # once_differentiable lets pass what does not come from a gradient itself
            raise RuntimeError("the fused loss can be differentiated only once: create_graph=True asks for twice")
        if ctx.gradients is None:
            raise RuntimeError(
                "the fused loss can be differentiated only once: its gradients are gone. Compute it again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        if upstream.device.type != "cpu" or upstream != 1:  # on a GPU, looking would cost more than multiplying
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(upstream)
        scaled = (None if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        return (*scaled, None)


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job, wanted: list[bool]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Return the loss, sums ``[K]`` of all columns, and the wanted gradients of hidden, weight, bias, temperature."""
    wants_hidden, wants_weight, wants_bias, wants_temperature = wanted
    student = HeadProducts(weight.detach(), job.size, job.autocast, wants_weight)
    teacher = None if job.teacher_weight is None else HeadProducts(job.teacher_weight, job.size, job.autocast, False)
    N, V = len(job.kept), job.size
    exact = torch.promote_types(weight.dtype, torch.float32)
    columns = hidden.new_empty(N, len(COLUMNS), dtype=exact)
    d_hidden = torch.zeros_like(hidden, dtype=scalable(hidden.dtype)) if wants_hidden else None
    d_bias = torch.zeros(weight.shape[0], dtype=exact, device=weight.device) if wants_bias else None

    rows = chunk_rows(N, V, student.tile_dtype.itemsize, hidden.device.type)
    tiles = [p.tile(rows) for p in (student, teacher) if p]
    for start in range(0, N, rows):
        chunk = slice(start, min(start + rows, N))
        M, places = chunk.stop - chunk.start, job.kept[chunk]
        hidden_MD = student.operand(hidden.index_select(0, places))
        padded_MV, teacher_MV = student.project(hidden_MD, tiles[0]), None
        student_MV = padded_MV[:M]
        if teacher is not None and job.teacher_hidden is not None:
            hidden_ME = teacher.operand(job.teacher_hidden.index_select(0, places))
            teacher_MV = teacher.project(hidden_ME, tiles[1])[:M]
        of_rows = job.labels[chunk], job.task, columns[chunk]
        gradient_dtype = student.operand_dtype if any(wanted[:3]) else None
        if job.sparse is None:
            gradient_MV = row_stage(student_MV, teacher_MV, *of_rows, gradient=gradient_dtype)
        else:
            gradient_MV = sparse_rows(student_MV, job.sparse[chunk], *of_rows, gradient=gradient_dtype)
        if len(padded_MV) > M:  # on a CPU only, where the gradient lies in the tile
            padded_MV[M:] = 0
            gradient_MV = padded_MV
        if d_hidden is not None:
            d_hidden.index_copy_(0, places, student.project_back(gradient_MV)[:M].to(d_hidden.dtype))
        if wants_weight:
            student.add_outer(gradient_MV, hidden_MD)
        if d_bias is not None:
            d_bias[:V] += gradient_MV.sum(0, dtype=exact)

    sums = columns.sum(0, dtype=exact_dtype(columns))
    by_name = dict(zip(COLUMNS, sums.unbind(), strict=True))
    share = job.task.kd_ratio
    loss = share * by_name["objective"] + (1 - share) * by_name["cross_entropy"] if share else by_name["cross_entropy"]
    for tile in tiles:  # the memory of both is needed now for the rounded copy of a half-precision gradient
        tile.untyped_storage().resize_(0)
    return (
        loss.to(exact),
        sums,
        [
            d_hidden,
            student.outer_sum() if wants_weight else None,
            None if d_bias is None or bias is None else d_bias.to(scalable(bias.dtype)),
            (share * by_name["temperature_gradient"]).to(exact) if wants_temperature else None,
        ],
    )


def _kept(labels: Tensor, num_trained: int | None) -> Tensor:
    trained = labels != -100
    if num_trained is None or labels.device.type == "cpu":
        kept = trained.nonzero()[:, 0]
        if num_trained not in (None, len(kept)):
            raise ValueError(f"num_trained is {num_trained}, but {len(kept)} labels are not -100")
        return kept
    return torch.nonzero_static(trained, size=num_trained)[:, 0]


def _as_head(head: Head | Tensor) -> Head:
    head = Head(head) if isinstance(head, Tensor) else head
    if not isinstance(head.weight, DTensor):
        return head
    # Gathered once, here, and not once a chunk.
    bias = head.bias.full_tensor() if isinstance(head.bias, DTensor) else head.bias
    return Head(head.weight.full_tensor(), bias, head.scale, head.softcap)


def _check(
    student_hidden: Tensor, student_head: Head, teacher_hidden: Tensor | None, teacher_head: Head | None,
    labels: Tensor, vocabulary_size: int | None,
) -> int:  # fmt: skip
    """Raise a ValueError for what does not fit; return the number of shared ids."""
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")
    if (teacher_hidden is None) != (teacher_head is None):
        raise ValueError("the teacher's hidden states and head go together: pass both or neither")
    sizes = []
    for role, hidden, head in (("student", student_hidden, student_head), ("teacher", teacher_hidden, teacher_head)):
        if hidden is None or head is None:
            continue
        if head.weight.dim() != 2 or head.weight.shape[1] != hidden.shape[-1]:
            raise ValueError(
                f"the {role}'s head must be [V, {hidden.shape[-1]}] for hidden states of that width, "
                f"got {list(head.weight.shape)}"
            )
        if hidden.shape[:-1] != labels.shape:
            raise ValueError(
                f"the {role}'s hidden states are {list(hidden.shape[:-1])} tokens and the labels {list(labels.shape)}: "
                "each position needs one label, already shifted to the token that it predicts"
            )
        if not hidden.is_floating_point():
            raise ValueError(f"the {role}'s hidden states must be floating-point numbers, got {hidden.dtype}")
        if head.bias is not None and head.bias.shape != head.weight.shape[:1]:  # rows.c reads V numbers whatever it is
            raise ValueError(f"the {role}'s bias must be [{len(head.weight)}] as its head, got {list(head.bias.shape)}")
        if head.softcap is not None and not 0 < head.softcap < math.inf:
            raise ValueError(f"the {role}'s softcap must be a positive number or None, got {head.softcap}")
        sizes.append(head.weight.shape[0])
    if vocabulary_size is None and len(set(sizes)) > 1:
        raise ValueError(
            f"the student's head has {sizes[0]} rows and the teacher's {sizes[1]}: pass vocabulary_size, the number "
            "of ids that mean the same token to both (taid.models.vocabulary)"
        )
    size = min(sizes) if vocabulary_size is None else vocabulary_size
    if not 0 < size <= min(sizes):
        raise ValueError(f"vocabulary_size must lie in 1 .. {min(sizes)}, got {size}")
    if labels.device.type == "cpu" and labels.numel():  # on a GPU, looking would cost a synchronisation
        for wrong in labels[(labels >= size) | ((labels < 0) & (labels != -100))].tolist()[:1]:
            raise ValueError(f"label {wrong} is no id of the {size} that student and teacher share, and not -100")
    return size


def _detached(parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in parameters.items()}


def _autocast_dtype(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
