r"""A teacher known by some of its tokens: the likeliest with the mass of the rest (:class:`TopK`), or :class:`Sampled`.

**The k likeliest.** For a token with the student's distribution q and the teacher's p, of which only k ids and the mass
:math:`P = 1 - \sum_{listed} p` of all others is known, the teacher is taken to agree with the student on how the rest
is shared out:

.. math:: \hat p(v) = p(v) \text{ if listed, else } P \, q(v) / Q, \qquad Q = 1 - \sum_{listed} q

with the gradient of q stopped. The ratio of the two is then one number for all of the rest, and so every divergence
that is a sum over ids of a function of p and q, and TAID's target, which is proportional to :math:`q^{1-t} \hat p^t`,
are those of k + 1 outcomes: the listed ids, and the rest as a whole. By the data processing inequality the loss is not
larger than that of the full teacher, and equal to it where the teacher does share out the rest as the student.

What it is not exact for: objectives at another temperature (dkd, ctkd), at which P is another number, and adaptive_kl,
whose head may reach into the rest.

**Samples.** n ids drawn from p give weights :math:`w_v = count_v / n` with :math:`E[w] = p`, and with the teacher's
entropy H(p), which is kept exactly, the forward KL has an estimate without bias, and so has its gradient:

.. math:: \widehat{KL}(p \| q) = -\sum_v w_v \log q_v - H(p), \qquad dL/dz = q - w

The draws are systematic: one uniform number u and the ids at the places (u + i) / n of the cumulative distribution.
Each count is then :math:`n p_v` rounded up or down, and the estimate varies less than with independent draws.
Objectives that are not linear in p have no such estimate. Reference: Sparse Logit Sampling, arXiv 2503.16870.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taid.losses.divergences import LOG_ZERO
from taid.losses.kernels.row_task import COLUMNS, Finish, RowTask
from taid.losses.kernels.torch_rows import block_rows, row_of, rows, softmax
from taid.losses.objective_table import OBJECTIVES


@dataclass(frozen=True, eq=False)
class TopK:
    """The k likeliest ids of a teacher at each of N trained tokens, and the mass of all others.

    Attributes:
        ids: ``[N, k]``, int64, places in the vocabulary that the student's logits are cut to, no two alike.
        log_probs: ``[N, k]``, float: their log-probabilities, nats.
        log_rest: ``[N]``, float: the log of the mass of all other ids; -inf where there are none.
        label_log_probs: ``[N]``, float: the label's log-probability.
    """

    ids: Tensor
    log_probs: Tensor
    log_rest: Tensor
    label_log_probs: Tensor

    OBJECTIVES = tuple(name for name, objective in OBJECTIVES.items() if objective.exact_from_top_k)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, tokens: slice) -> TopK:
        return TopK(self.ids[tokens], self.log_probs[tokens], self.log_rest[tokens], self.label_log_probs[tokens])

    def to(self, device: torch.device) -> TopK:
        """Return the same on another device."""
        return TopK(*(x.to(device) for x in (self.ids, self.log_probs, self.log_rest, self.label_log_probs)))

    @classmethod
    def cat(cls, parts: list[TopK]) -> TopK:
        """Join the tokens of several, one after another."""
        each = [(part.ids, part.log_probs, part.log_rest, part.label_log_probs) for part in parts]
        return cls(*map(torch.cat, zip(*each, strict=True)))

    @classmethod
    def from_logits(cls, teacher_NV: Tensor, labels_N: Tensor, k: int) -> TopK:
        """Take the k likeliest ids of full logits."""
        log_p_NV = teacher_NV.float().log_softmax(-1)
        log_probs, ids = log_p_NV.topk(min(k, teacher_NV.shape[-1]), sorted=True)
        label_log_probs = log_p_NV.gather(-1, labels_N[:, None])[:, 0]
        # The rest is added up by itself: 1 less the sum of the listed would keep no digit of a small one.
        log_rest = log_p_NV.scatter_(-1, ids, -torch.inf).logsumexp(-1)
        return cls(ids, log_probs, log_rest, label_log_probs)

    @classmethod
    def check_objective(cls, objective: str) -> None:
        """Raise a ValueError for an objective that k ids and the mass of the rest do not determine."""
        if objective not in cls.OBJECTIVES:
            raise ValueError(
                f"objective {objective!r} needs the teacher's whole distribution, not its top k: use a cache of hidden "
                f"states or the teacher itself, or one of {', '.join(cls.OBJECTIVES)}"
            )

    def check(self, trained: int, size: int) -> None:
        """Raise a ValueError unless it has `trained` tokens, and ids below `size`."""
        per_token = (self.log_rest, self.label_log_probs)
        _check("the teacher's top k", self.ids, self.log_probs, per_token, trained, size)

    def outcomes(self, student_NV: Tensor) -> tuple[Tensor, Tensor]:
        """The plain formula: log-probabilities ``[N, k + 1]`` of the student and the teacher.

        ``objective(*teacher.outcomes(student_NV))`` of :mod:`taid.losses.objectives` is the loss.
        """
        log_q_NV = student_NV.log_softmax(-1)
        rest_N = log_q_NV.scatter(-1, self.ids, LOG_ZERO).logsumexp(-1)
        return torch.cat([log_q_NV.gather(-1, self.ids), rest_N[:, None]], -1), self._log_probs(student_NV.dtype)

    def _log_probs(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([self.log_probs, self.log_rest[:, None]], -1).to(dtype).clamp_(min=LOG_ZERO)

    def add_to(self, block: _Block, task: RowTask) -> None:
        r"""Add the teacher's part to a block, from g, the gradient on the log-probabilities of the k + 1 outcomes.

        g sums to 0, and so

        .. math:: dL/dz_v = g_v \text{ if listed, else } g_{rest} \, q_v / Q

        with q / Q as a softmax of its own: all that is not listed may be less likely than a float can say.
        """
        share, z, q, columns = task.kd_ratio, block.z, block.q, block.columns
        objective = task.objective if share > 0 else "forward_kl"  # its KL is logged all the same
        of_outcomes = RowTask(objective, 1.0, task.parameters if share > 0 else {}, Finish(), Finish())
        rest, of_rest = block.scratch
        top = rest.copy_(z).scatter_(-1, self.ids, LOG_ZERO).amax(-1, keepdim=True)
        log_rest = softmax(rest, of_rest) + top  # and all of it centred like z
        log_q = torch.cat([z.gather(-1, self.ids), log_rest], -1).sub_(block.log_normaliser).clamp_(min=LOG_ZERO)
        found: Any = log_q.new_empty(len(z), len(COLUMNS))
        labels = self.ids.new_zeros(len(z))
        g = rows(log_q, self._log_probs(z.dtype), labels, of_outcomes, found, gradient=z.dtype)
        found = dict(zip(COLUMNS, found.unbind(-1), strict=True))
        columns["kl"].copy_(found["kl"])
        if share > 0:
            for name in ("objective", "target_cross_entropy"):
                columns[name].copy_(found[name])
            q.mul_(1 - share)
            on_listed = torch.add(q.gather(-1, self.ids), g[:, :-1], alpha=share)
            q.add_(of_rest.mul_(share * g[:, -1:])).scatter_(-1, self.ids, on_listed)


@dataclass(frozen=True, eq=False)
class Sampled:
    """Ids drawn from a teacher's distribution at each of N trained tokens, at most S different ones a token.

    Attributes:
        ids: ``[N, S]``, int64, places in the vocabulary that the student's logits are cut to.
        weights: ``[N, S]``, float: how often each was drawn, as a share of the draws; 0 where a token has fewer ids.
        entropy: ``[N]``, float: of the whole distribution, nats.
        label_log_probs: ``[N]``, float: the label's log-probability.
    """

    ids: Tensor
    weights: Tensor
    entropy: Tensor
    label_log_probs: Tensor

    OBJECTIVES = tuple(name for name, objective in OBJECTIVES.items() if objective.unbiased_from_samples)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, tokens: slice) -> Sampled:
        return Sampled(self.ids[tokens], self.weights[tokens], self.entropy[tokens], self.label_log_probs[tokens])

    def to(self, device: torch.device) -> Sampled:
        """Return the same on another device."""
        return Sampled(*(x.to(device) for x in (self.ids, self.weights, self.entropy, self.label_log_probs)))

    @classmethod
    def from_logits(cls, teacher_NV: Tensor, labels_N: Tensor, draws: int, uniforms_N: Tensor) -> Sampled:
        """Draw from full logits, with a number in [0, 1) for each token to begin at."""
        log_p_NV = teacher_NV.float().log_softmax(-1)
        label_log_probs = log_p_NV.gather(-1, labels_N[:, None])[:, 0]
        p_NV = log_p_NV.exp_()
        entropy = torch.special.entr(p_NV).sum(-1)
        exact = torch.float32 if p_NV.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        steps = p_NV.cumsum(-1, dtype=exact)
        steps = steps.mul_(draws / steps[:, -1:]).add_(uniforms_N.to(steps)[:, None]).floor_()
        counts_NV = steps.diff(dim=-1, prepend=steps.new_zeros(len(steps), 1))
        counts, ids = counts_NV.topk(int((counts_NV > 0).sum(-1).max()) if len(steps) else 0)
        return cls(ids, (counts / draws).float(), entropy, label_log_probs)

    @classmethod
    def check_objective(cls, objective: str) -> None:
        """Raise a ValueError for an objective that is not linear in the teacher's distribution."""
        if objective not in cls.OBJECTIVES:
            raise ValueError(
                f"objective {objective!r} is not linear in the teacher's distribution, so samples of it give a biased "
                "loss: use a cache of another format, or objective forward_kl"
            )

    def check(self, trained: int, size: int) -> None:
        """Raise a ValueError unless it has `trained` tokens, and ids below `size`."""
        per_token = (self.entropy, self.label_log_probs)
        _check("the teacher's samples", self.ids, self.weights, per_token, trained, size)

    def forward_kl(self, student_NV: Tensor) -> Tensor:
        """The plain formula: an estimate ``[N]`` of KL(p || q), nats; negative where chance has it."""
        log_q_NS = student_NV.log_softmax(-1).gather(-1, self.ids)
        return -(self.weights * log_q_NS).sum(-1) - self.entropy

    def add_to(self, block: _Block, task: RowTask) -> None:
        """Add the samples' part to a block; the gradient is q minus the samples' weights."""
        share, weights = task.kd_ratio, self.weights.to(block.z.dtype)
        log_q = block.z.gather(-1, self.ids).sub_(block.log_normaliser)
        block.columns["kl"].copy_(-(weights * log_q).sum(-1) - self.entropy)
        if share > 0:
            block.columns["objective"].copy_(block.columns["kl"])
            block.q.scatter_add_(-1, self.ids, weights * -share)


Sparse = TopK | Sampled


def _check(name: str, ids: Tensor, of_ids: Tensor, per_token: tuple[Tensor, ...], trained: int, size: int) -> None:
    if len(ids) != trained:
        raise ValueError(f"{name} are of {len(ids)} tokens, but {trained} are trained")
    if of_ids.shape != ids.shape or any(x.shape != (trained,) for x in per_token):
        raise ValueError(f"{name} need two tensors [N, ids of a token] and two [N]")
    if ids.device.type == "cpu" and ids.numel():  # on a GPU, looking would cost a synchronisation
        for wrong in (int(ids.min()), int(ids.max())):
            if not 0 <= wrong < size:
                raise ValueError(f"{name} name id {wrong}, but the ids are 0 .. {size - 1}")


@dataclass(frozen=True, eq=False)
class _Block:
    """Some rows of a tile, in full precision.

    What a teacher adds: columns ``kl`` and ``objective``; and q, which is the gradient of log-sum-exp, becomes
    share · d objective / dz + (1 - share) q.
    """

    z: Tensor  # logits, relative to the largest
    q: Tensor  # probabilities
    log_normaliser: Tensor  # [rows, 1]
    columns: dict[str, Tensor]
    scratch: tuple[Tensor, Tensor]  # as large as z


def sparse_rows(
    student_MV: Tensor,
    teacher: Sparse,
    labels_M: Tensor,
    task: RowTask,
    columns_MK: Tensor,
    *,
    gradient: torch.dtype | None,
) -> Tensor:
    """The row stage against such a teacher; the arguments are those of :func:`taid.losses.kernels.torch_rows.rows`."""
    M, V = student_MV.shape
    step = M if student_MV.is_cuda else min(M, block_rows(V))
    buffers = student_MV.new_empty(4, step, V, dtype=columns_MK.dtype)
    for start in range(0, M, step):
        chunk = slice(start, min(start + step, M))
        product, listed, label = student_MV[chunk], teacher[chunk], labels_M[chunk, None]
        z, q, *scratch = (buffer[: len(product)] for buffer in buffers)
        slope = task.student.apply(z.copy_(product))
        columns = dict(zip(COLUMNS, columns_MK[chunk].zero_().unbind(-1), strict=True))
        columns["teacher_cross_entropy"].copy_(-listed.label_log_probs)
        log_normaliser = row_of(z, q, label, columns)
        listed.add_to(_Block(z, q, log_normaliser, columns, (scratch[0], scratch[1])), task)
        if gradient is None:
            continue
        q.scatter_add_(-1, label, torch.full_like(label, task.kd_ratio - 1, dtype=q.dtype))
        product.copy_(q if slope is None else q.mul_(slope))
    return student_MV
