r"""A teacher known by its k likeliest tokens and the mass of the rest, and what it means: the tail rule.

For a token with the student's distribution q and the teacher's p, of which only k ids and the mass
:math:`P = 1 - \sum_{listed} p` of all others is known, the teacher is taken to agree with the student on how the rest
is shared out:

.. math:: \hat p(v) = p(v) \text{ if listed, else } P \, q(v) / Q, \qquad Q = 1 - \sum_{listed} q

with the gradient of q stopped. The ratio of the two is then one number for all of the rest, and so every divergence
that is a sum over ids of a function of p and q, and TAID's target, which is proportional to :math:`q^{1-t} \hat p^t`,
are those of k + 1 outcomes: the listed ids, and the rest as a whole. By the data processing inequality the loss is not
larger than that of the full teacher, and equal to it where the teacher does share out the rest as the student.

What it is not exact for: objectives at another temperature (dkd, ctkd), at which P is another number, and adaptive_kl,
whose head may reach into the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taid.kernels.rows import COLUMNS, LOG_ZERO, Finish, RowTask, block_rows, row_of, rows, softmax

OBJECTIVES = ("sft", "taid", "forward_kl", "reverse_kl", "jsd", "tvd", "skew_forward_kl", "skew_reverse_kl")


def check_objective(objective: str) -> None:
    """Raise a ValueError for an objective that k ids and the mass of the rest do not determine."""
    if objective not in OBJECTIVES:
        raise ValueError(
            f"objective {objective!r} needs the teacher's whole distribution, not its top k: use a cache of hidden "
            f"states or the teacher itself, or one of {', '.join(OBJECTIVES)}"
        )


@dataclass(frozen=True, eq=False)
class TopK:
    """What is known of a teacher's distribution at N trained tokens.

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

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, tokens: slice) -> TopK:
        return TopK(self.ids[tokens], self.log_probs[tokens], self.log_rest[tokens], self.label_log_probs[tokens])

    @classmethod
    def of(cls, teacher_NV: Tensor, labels_N: Tensor, k: int) -> TopK:
        """The k likeliest ids of full logits."""
        log_p_NV = teacher_NV.float().log_softmax(-1)
        log_probs, ids = log_p_NV.topk(min(k, teacher_NV.shape[-1]), sorted=True)
        label_log_probs = log_p_NV.gather(-1, labels_N[:, None])[:, 0]
        # The rest is added up by itself: 1 less the sum of the listed would keep no digit of a small one.
        log_rest = log_p_NV.scatter_(-1, ids, -torch.inf).logsumexp(-1)
        return cls(ids, log_probs, log_rest, label_log_probs)

    def outcomes(self, student_NV: Tensor) -> tuple[Tensor, Tensor]:
        """The plain formula: log-probabilities ``[N, k + 1]`` of the student and the teacher.

        ``objective(*teacher.outcomes(student_NV))`` of :mod:`taid.objectives` is the loss.
        """
        log_q_NV = student_NV.log_softmax(-1)
        rest_N = log_q_NV.scatter(-1, self.ids, LOG_ZERO).logsumexp(-1)
        return torch.cat([log_q_NV.gather(-1, self.ids), rest_N[:, None]], -1), self._log_probs(student_NV.dtype)

    def _log_probs(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([self.log_probs, self.log_rest[:, None]], -1).to(dtype).clamp_(min=LOG_ZERO)


def top_k_rows(
    student_MV: Tensor,
    teacher: TopK,
    labels_M: Tensor,
    task: RowTask,
    columns_MK: Tensor,
    *,
    gradient: torch.dtype | None,
) -> Tensor:
    r"""The row stage against a teacher's top k; the arguments are those of :func:`taid.kernels.rows.rows`.

    Of g, the gradient with respect to the log-probabilities of the k + 1 outcomes, which sums to 0, follows

    .. math:: dL/dz_v = g_v \text{ if listed, else } g_{rest} \, q_v / Q

    with q / Q as a softmax of its own: all that is not listed may be less likely than a float can say.
    """
    M, V = student_MV.shape
    share, dtype = task.kd_ratio, columns_MK.dtype
    objective = task.objective if share > 0 else "forward_kl"  # its KL is logged all the same
    of_outcomes = RowTask(objective, 1.0, task.parameters if share > 0 else {}, Finish(), Finish())
    step = M if student_MV.is_cuda else min(M, block_rows(V))
    scratch = student_MV.new_empty(4, step, V, dtype=dtype)
    for start in range(0, M, step):
        block = slice(start, min(start + step, M))
        product, listed, label = student_MV[block], teacher[block], labels_M[block, None]
        z, q, rest, of_rest = (buffer[: len(product)] for buffer in scratch)
        slope = task.student.apply(z.copy_(product))
        columns = dict(zip(COLUMNS, columns_MK[block].zero_().unbind(-1), strict=True))
        log_normaliser = row_of(z, q, label, columns)
        top = rest.copy_(z).scatter_(-1, listed.ids, LOG_ZERO).amax(-1, keepdim=True)
        log_rest = softmax(rest, of_rest) + top  # and all of it centred like z
        log_q = torch.cat([z.gather(-1, listed.ids), log_rest], -1).sub_(log_normaliser).clamp_(min=LOG_ZERO)
        found: Any = log_q.new_empty(len(product), len(COLUMNS))
        g = rows(log_q, listed._log_probs(dtype), torch.zeros_like(label[:, 0]), of_outcomes, found, gradient=dtype)
        found = dict(zip(COLUMNS, found.unbind(-1), strict=True))
        columns["kl"].copy_(found["kl"])
        columns["teacher_cross_entropy"].copy_(-listed.label_log_probs)
        if share > 0:
            for name in ("objective", "target_cross_entropy"):
                columns[name].copy_(found[name])
        if gradient is None:
            continue
        if share > 0:  # share g + (1 - share) q
            q.mul_(1 - share)
            on_listed = torch.add(q.gather(-1, listed.ids), g[:, :-1], alpha=share)
            q.add_(of_rest.mul_(share * g[:, -1:])).scatter_(-1, listed.ids, on_listed)
        q.scatter_add_(-1, label, torch.full_like(label, share - 1, dtype=dtype))
        product.copy_(q if slope is None else q.mul_(slope))
    return student_MV
