r"""The row stage of the fused loss in plain torch: two tiles of logits in, statistics and the gradient out.

What a compiled kernel computes faster, and what it is tested against. In closed form, for a row of logits ``z_q`` of the
student and ``z_p`` of the teacher, ``q`` and ``p`` their distributions and ``J(x) = q (x - sum q x)`` the Jacobian
of the softmax applied to ``x``, the gradients ``dL/dz_q`` are:

===================  ==========================================================================
taid                 q - p_t
forward_kl           q - p
reverse_kl           J(d),                              d = log q - log p
jsd                  (1 - beta) J(log q - log m),       m = beta p + (1 - beta) q
tvd                  J(sign(q - p)) / 2
skew_forward_kl      J(-(1 - skew) p / m),              m = skew p + (1 - skew) q
skew_reverse_kl      J(log q - log m - skew q / m),     m = (1 - skew) p + skew q
adaptive_kl          w_head (q - p) + w_tail J(d),      weights held constant
dkd                  T (beta (q^ - p^) + alpha (p_y - q_y) q^) off the label, T alpha (q_y - p_y) on it
ctkd                 T (q_T - p_T),                     dL/dT = 2 T KL + T (E_p[a] - E_q[a] + Cov_p(b, d_T)),
                                                        a = z_q / T, b = z_p / T
label cross-entropy  q - 1_y
===================  ==========================================================================

``J(x)`` does not change with a constant added to x; x is taken relative to its value at the student's likeliest
token, without which ``x - sum q x`` cancels where q is nearly 1 there.

M rows of a tile, V ids, K columns of statistics.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taid import objectives

COLUMNS = (
    "objective",
    "kl",
    "cross_entropy",
    "entropy",
    "correct",
    "teacher_cross_entropy",
    "target_cross_entropy",
    "temperature_gradient",
)

# -inf marks an id that is no token; exp() of this is 0, and unlike -inf it survives `0 * x` and `x - x`.
LOG_ZERO = -1e30
# Logits of so many ids of both models and what is made of them stay in a core's cache.
_BLOCK = 2**18


@dataclass(frozen=True)
class Finish:
    """From the product of hidden states and weight to logits: ``cap(scale (product + bias))``, ``cap(z) = c tanh(z / c)``.

    Attributes:
        bias: ``[V]`` or None.
        scale: a factor.
        softcap: c, or None for no cap.
    """

    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def apply(self, z: Tensor) -> Tensor | None:
        """Make logits of products, in place; return ``d logits / d product``, or None where it is 1."""
        if self.bias is not None:
            z.add_(self.bias)
        if self.scale != 1.0:
            z.mul_(self.scale)
        if self.softcap is None:
            return None if self.scale == 1.0 else z.new_tensor(self.scale)
        tanh = z.div_(self.softcap).tanh_()
        slope = (1 - tanh * tanh).mul_(self.scale)
        z.mul_(self.softcap)
        return slope


@dataclass(frozen=True)
class RowTask:
    """What is computed of each row.

    Attributes:
        objective: a name of :mod:`taid.objectives`, or "sft".
        kd_ratio: share of the objective; the rest is cross-entropy to the labels.
        parameters: of the objective, complete. ``t`` and ctkd's ``temperature`` may be 0-dim tensors.
        student: how the student's logits come from the products in its tile.
        teacher: likewise.
    """

    objective: str
    kd_ratio: float
    parameters: dict[str, Any]
    student: Finish
    teacher: Finish

    @classmethod
    def of(
        cls, objective: str, kd_ratio: float, parameters: dict[str, Any], student: Finish, teacher: Finish
    ) -> RowTask:
        """Fill in the defaults of the objective and check what is given.

        Raises:
            ValueError: no such objective, a parameter that it does not have or lacks, or a value out of range.
        """
        if not 0.0 <= kd_ratio <= 1.0:
            raise ValueError(f"kd_ratio must lie in [0, 1], got {kd_ratio}")
        if objective == "sft":
            names: dict[str, Any] = {}
        elif objective in _OBJECTIVES:
            signature = inspect.signature(getattr(objectives, objective)).parameters.values()
            names = {p.name: p.default for p in signature if p.kind is p.KEYWORD_ONLY}
        else:
            raise ValueError(f"objective {objective!r} does not exist (choices: sft, {', '.join(_OBJECTIVES)})")
        if unknown := sorted(parameters.keys() - names.keys()):
            raise ValueError(f"{objective} has no parameter {unknown[0]!r} (it has: {', '.join(names) or 'none'})")
        complete = names | parameters
        if missing := [name for name, value in complete.items() if value is inspect.Parameter.empty]:
            raise ValueError(f"{objective} needs its parameter {missing[0]!r}")
        if names:  # the plain formula checks the ranges
            z = torch.zeros(1, 2)
            labels = {"labels": torch.zeros(1, dtype=torch.long)} if objective == "dkd" else {}
            numbers = {n: 1.0 if isinstance(v, Tensor) else v for n, v in complete.items()}
            getattr(objectives, objective)(z, z, **labels, **numbers)
        return cls(objective, kd_ratio if objective != "sft" else 0.0, complete, student, teacher)


def rows(
    student_MV: Tensor,
    teacher_MV: Tensor | None,
    labels_M: Tensor,
    task: RowTask,
    columns_MK: Tensor,
    *,
    gradient: torch.dtype | None,
) -> Tensor:
    """Fill ``columns_MK`` and return ``dL/d product`` of the student, ``[M, V]``, L being the mix that `task` asks for.

    Args:
        student_MV: products of hidden states and weight, used up: the gradient is formed in its memory. The distance
            between rows may be larger than V. In half precision, a few rows at a time are computed in float32.
        teacher_MV: likewise, of the teacher; None where the task is cross-entropy alone.
        labels_M: int64, 0 .. V-1.
        task: what to compute.
        columns_MK: float32 or float64, filled with the statistics of :data:`COLUMNS`.
        gradient: the dtype that the products want the gradient in, or None for no gradient. Where the tile's dtype is
            wider, this form returns the tile's; a kernel may save the memory traffic.
    """
    M, V = student_MV.shape
    dtype = columns_MK.dtype
    step = max(1, _BLOCK // V)
    for start in range(0, M, step):
        block = slice(start, start + step)
        z_q = student_MV[block].to(dtype)
        z_p = None if teacher_MV is None else teacher_MV[block].to(dtype)
        slope = task.student.apply(z_q)
        if z_p is not None:
            task.teacher.apply(z_p)
        columns = dict(zip(COLUMNS, columns_MK[block].zero_().unbind(-1), strict=True))
        _block(z_q, z_p, labels_M[block, None], task, columns, gradient is not None)
        if gradient is not None and slope is not None:
            z_q.mul_(slope)
        if gradient is not None and z_q.dtype != student_MV.dtype:
            student_MV[block] = z_q
    return student_MV


def _block(
    z_q: Tensor, z_p: Tensor | None, label: Tensor, task: RowTask, columns: dict[str, Tensor], gradient: bool
) -> None:
    share = task.kd_ratio
    row = _Row.of(z_q, z_p, label, columns)
    if share > 0:
        assert z_p is not None
        g, scale_q = _OBJECTIVES[task.objective](row, **task.parameters)
    else:
        g, scale_q = row.q, 0.0
    if gradient:  # share (g + scale_q q) + (1 - share) (q - 1_y)
        z_q.copy_(g).mul_(share if share > 0 else 0.0)
        z_q.add_(row.q * (share * scale_q + (1 - share)))
        z_q.scatter_add_(-1, label, torch.full_like(label, share - 1, dtype=z_q.dtype))


# An objective fills its columns and returns (g, s) with dL/dz_q = g + s q. It may use up what it is given.
_Gradient = tuple[Tensor, Tensor | float]


@dataclass
class _Row:
    """A few rows as every objective wants them: centred logits, distributions, and d = log q - log p."""

    z_q: Tensor
    z_p: Tensor
    q: Tensor
    p: Tensor
    d: Tensor
    log_normaliser_q: Tensor
    label: Tensor
    columns: dict[str, Tensor]

    @classmethod
    def of(cls, z_q: Tensor, z_p: Tensor | None, label: Tensor, columns: dict[str, Tensor]) -> _Row:
        """Centre the logits in place and fill the columns that need no objective."""
        columns["correct"].copy_((z_q.gather(-1, label) >= z_q.amax(-1, keepdim=True))[:, 0])
        q, normaliser_q = _softmax(z_q)
        columns["cross_entropy"].copy_((normaliser_q - z_q.gather(-1, label))[:, 0])
        columns["entropy"].copy_(normaliser_q[:, 0] - _dot(q, z_q))
        if z_p is None:
            return cls(z_q, z_q, q, q, q, normaliser_q, label, columns)
        p, normaliser_p = _softmax(z_p)
        columns["teacher_cross_entropy"].copy_((normaliser_p - z_p.gather(-1, label))[:, 0])
        d = (z_q - z_p).sub_(normaliser_q - normaliser_p)
        columns["kl"].copy_(-_dot(p, d))
        return cls(z_q, z_p, q, p, d, normaliser_q, label, columns)

    def difference(self) -> Tensor:
        """``q - p`` to the last digit."""
        return _difference(self.q, self.p, self.d)

    def jacobian(self, x: Tensor) -> _Gradient:
        """``J(x) = q (x - sum q x)``; x relative to its value at the student's likeliest token."""
        x.sub_(x.gather(-1, self.z_q.argmax(-1, keepdim=True)))
        g = x.mul_(self.q)
        return g, -g.sum(-1, keepdim=True)


def _taid(row: _Row, t: float | Tensor) -> _Gradient:
    z_t = row.z_q.mul(1 - t).add_(row.z_p * t)
    top = z_t.amax(-1, keepdim=True)
    p_t, normaliser_t = _softmax(z_t)
    d_t = (row.z_q - row.z_p).mul_(t).add_(normaliser_t + top - row.log_normaliser_q)
    difference = _difference(row.q, p_t, d_t)
    row.columns["objective"].copy_(difference.sum(-1) - _dot(p_t, d_t))
    row.columns["target_cross_entropy"].copy_(row.log_normaliser_q[:, 0] - _dot(p_t, row.z_q))
    return difference, 0.0


def _forward_kl(row: _Row) -> _Gradient:
    difference = row.difference()
    row.columns["objective"].copy_(difference.sum(-1) - _dot(row.p, row.d))
    row.columns["kl"].copy_(row.columns["objective"])  # the same, to more digits
    return difference, 0.0


def _reverse_kl(row: _Row) -> _Gradient:
    row.columns["objective"].copy_(_dot(row.q, row.d) - row.difference().sum(-1))
    return row.jacobian(row.d)


def _log_shares(row: _Row, share_of_p: float) -> tuple[Tensor, Tensor]:
    """``log p - log m`` and ``log q - log m`` for ``m = share p + (1 - share) q``, to the last digit."""
    larger_is_q = row.d >= 0
    # m = larger (1 + share_of_smaller (smaller / larger - 1))
    share_of_smaller = torch.where(larger_is_q, row.d.new_tensor(share_of_p), 1 - share_of_p)
    ratio = row.d.abs().neg_().expm1_().mul_(share_of_smaller).log1p_()
    return -(ratio + row.d.clamp(min=0)), row.d.clamp(max=0).sub_(ratio)


def _jsd(row: _Row, beta: float) -> _Gradient:
    p_to_m, q_to_m = _log_shares(row, beta)
    row.columns["objective"].copy_(beta * _dot(row.p, p_to_m) + (1 - beta) * _dot(row.q, q_to_m))
    return row.jacobian(q_to_m.mul_(1 - beta))


def _tvd(row: _Row) -> _Gradient:
    difference = row.difference()
    row.columns["objective"].copy_(0.5 * difference.abs().sum(-1))
    return row.jacobian(difference.sign_().mul_(0.5))


def _skew_forward_kl(row: _Row, skew: float) -> _Gradient:
    if skew == 0.0:
        return _forward_kl(row)
    p_to_m, _ = _log_shares(row, skew)
    row.columns["objective"].copy_((1 - skew) * row.difference().sum(-1) + _dot(row.p, p_to_m))
    return row.jacobian(p_to_m.exp_().mul_(skew - 1))


def _skew_reverse_kl(row: _Row, skew: float) -> _Gradient:
    if skew == 0.0:
        return _reverse_kl(row)
    _, q_to_m = _log_shares(row, 1 - skew)
    row.columns["objective"].copy_((skew - 1) * row.difference().sum(-1) + _dot(row.q, q_to_m))
    return row.jacobian(q_to_m.sub_(q_to_m.exp().mul_(skew)))


def _adaptive_kl(row: _Row, head_mass: float) -> _Gradient:
    difference = row.difference()
    forward = difference.sum(-1) - _dot(row.p, row.d)
    reverse = _dot(row.q, row.d) - difference.sum(-1)
    gaps = difference.abs()
    whole = gaps.sum(-1, keepdim=True)
    head = gaps.mul_(row.z_p > _below_head(row.z_p, row.p, head_mass)).sum(-1, keepdim=True)
    w_head = torch.where(whole > 0, head / whole, 0.5)
    row.columns["objective"].copy_(w_head[:, 0] * forward + (1 - w_head[:, 0]) * reverse)
    g, s = row.jacobian(row.d)
    return difference.mul_(w_head).add_(g.mul_(1 - w_head)), s * (1 - w_head)


def _below_head(z_p: Tensor, p: Tensor, head_mass: float) -> Tensor:
    """A value just below the teacher's logits of the head: bisected, because sorting V logits costs far more."""
    low = z_p.new_full((len(z_p), 1), -104.0)  # exp() of it is 0 in float32
    high = torch.zeros_like(low)  # the logits are centred: no mass lies above
    for _ in range(36):
        middle = (low + high) / 2
        enough = (p * (z_p > middle)).sum(-1, keepdim=True) >= head_mass
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low


def _dkd(row: _Row, alpha: float, beta: float, temperature: float) -> _Gradient:
    (q, rest_q, y_q), (p, rest_p, y_p) = (_without_label(z, row.label, temperature) for z in (row.z_q, row.z_p))
    # row.z_q and row.z_p are now the logits at the temperature, centred, without the label's
    d = (row.z_q - row.z_p).sub_(rest_q[1] - rest_p[1])
    difference = _difference(q, p, d)
    non_target = difference.sum(-1) - _dot(p, d)
    d_y, d_rest = y_q - y_p, rest_q[0] - rest_p[0]
    difference_y = _difference(y_q.exp(), y_p.exp(), d_y)
    difference_rest = _difference(rest_q[0].exp(), rest_p[0].exp(), d_rest)
    target = difference_y - y_p.exp() * d_y + difference_rest - rest_p[0].exp() * d_rest
    row.columns["objective"].copy_(temperature**2 * (alpha * target[:, 0] + beta * non_target))
    g = difference.mul_(temperature * beta).sub_(q.mul_(temperature * alpha * difference_y))
    return g.scatter_(-1, row.label, temperature * alpha * difference_y), 0.0


def _without_label(z: Tensor, label: Tensor, temperature: float) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Of one model at a temperature: the distribution without the label, (log of its mass, log-normaliser), log p_y."""
    y = z.div_(temperature).gather(-1, label)
    z.scatter_(-1, label, LOG_ZERO)
    top = z.amax(-1, keepdim=True)
    probs, normaliser = _softmax(z)
    log_all = torch.logaddexp(y, normaliser + top)
    return probs, (normaliser + top - log_all, normaliser), y - log_all


def _ctkd(row: _Row, temperature: float | Tensor) -> _Gradient:
    T = temperature
    (q, normaliser_q), (p, normaliser_p) = _softmax(row.z_q.div_(T)), _softmax(row.z_p.div_(T))
    d = (row.z_q - row.z_p).sub_(normaliser_q - normaliser_p)
    difference = _difference(q, p, d)
    mean_d = _dot(p, d)
    kl = difference.sum(-1) - mean_d
    covariance = _dot(p, row.z_p * (d - mean_d[:, None]))
    row.columns["objective"].copy_(T * T * kl)
    row.columns["temperature_gradient"].copy_(2 * T * kl + T * (covariance - _dot(difference, row.z_q)))
    return difference.mul_(T), 0.0


_OBJECTIVES: dict[str, Callable[..., _Gradient]] = {
    "taid": _taid,
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "tvd": _tvd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "adaptive_kl": _adaptive_kl,
    "dkd": _dkd,
    "ctkd": _ctkd,
}


def _softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """Centre z in place; return its softmax and the log of the normaliser of the centred logits."""
    z.clamp_(min=LOG_ZERO)
    z.sub_(z.amax(-1, keepdim=True))
    probs = z.exp()
    total = probs.sum(-1, keepdim=True)
    return probs.div_(total), total.log()


def _difference(q: Tensor, p: Tensor, d: Tensor) -> Tensor:
    """``q - p`` from ``d = log q - log p``: where the two are close, expm1 keeps the digits that subtraction loses."""
    near = d.clamp(-1.0, 1.0)
    return torch.where(near == d, near.expm1_().mul_(p), q - p)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b)
