r"""The row stage of the fused loss in plain torch: two tiles of logits in, statistics and the gradient out.

What a compiled kernel computes faster, and what it is tested against. In closed form, for a row of logits ``z_q`` of
the student and ``z_p`` of the teacher, ``q`` and ``p`` their distributions and ``J(x) = q (x - sum q x)`` the Jacobian
of the softmax applied to ``x``, the gradients ``dL/dz_q`` are:

===================  ==========================================================================
taid                 q - p_t                            (whatever the mixture)
forward_kl           q - p
reverse_kl           J(d),                              d = log q - log p
jsd                  (1 - beta) J(log q - log m),       m = beta p + (1 - beta) q
tvd                  J(sign(q - p)) / 2
skew_forward_kl      J(-(1 - skew) p / m),              m = skew p + (1 - skew) q
skew_reverse_kl      J(log q - log m - skew q / m),     m = (1 - skew) p + skew q
adaptive_kl          w_head (q - p) + w_tail J(d),      weights held constant
abkd                 G(q) - q sum G(q),                 G(r) = r^beta (r^alpha - p^alpha) / alpha
amid                 H - q sum H,                       H = w (G(r) - r sum G(r)), w the student's part in r,
                                                        (1 - share) q^a / (share p^a + (1 - share) q^a)
dkd                  T (beta (q^ - p^) + alpha (p_y - q_y) q^) off the label, T alpha (q_y - p_y) on it
ctkd                 T (q_T - p_T),                     dL/dT = T (2 KL - sum (q_T - p_T) d_T - sum (b - E_p b) f),
                                                        b = z_p / T, f the terms of KL(p_T || q_T)
label cross-entropy  q - 1_y
===================  ==========================================================================

``J(x)`` does not change with a constant added to x; x is taken relative to its value at the student's likeliest
token, without which ``x - sum q x`` cancels where q is nearly 1 there. Those of the skewed KLs have 1 taken off
``p / m`` and ``q / m``, which are near it wherever student and teacher are near each other.

M rows of a tile, V ids, K columns of statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from taid.losses.divergences import LOG_ZERO, ab_divergence, alpha_mixture
from taid.losses.kernels.row_task import COLUMNS, RowTask

# Logits of so many ids of both models and what is made of them stay in a core's cache.
_BLOCK = 2**18


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
    step = min(M, block_rows(V, on_cpu=student_MV.device.type == "cpu"))
    # Memory is asked for once: fresh pages for every intermediate result would take longer than the arithmetic.
    scratch = student_MV.new_empty(8, step, V, dtype=dtype)
    for start in range(0, M, step):
        block = slice(start, min(start + step, M))
        product = student_MV[block]
        buffers = [buffer[: len(product)] for buffer in scratch]
        z_q = buffers[0].copy_(product)
        z_p = None if teacher_MV is None else buffers[1].copy_(teacher_MV[block])
        slope = task.student.apply(z_q)
        if z_p is not None:
            task.teacher.apply(z_p)
        columns = dict(zip(COLUMNS, columns_MK[block].zero_().unbind(-1), strict=True))
        row = _Row(z_q, z_p, labels_M[block, None], columns, *buffers[2:])
        g, scale_q = _GRADIENTS[task.objective](row, **task.parameters) if task.kd_ratio > 0 else (row.q, 0.0)
        if gradient is None:
            continue
        if task.kd_ratio < 1 or isinstance(scale_q, Tensor):
            # kd_ratio (g + scale_q q) + (1 - kd_ratio) (q - 1_y)
            torch.mul(row.q, task.kd_ratio * scale_q + (1 - task.kd_ratio), out=z_q)
            g = z_q.add_(g, alpha=task.kd_ratio) if task.kd_ratio > 0 else z_q
            g.scatter_add_(-1, row.label, torch.full_like(row.label, task.kd_ratio - 1, dtype=dtype))
        product.copy_(g if slope is None else g.mul_(slope))
    return student_MV


def block_rows(V: int, *, on_cpu: bool = True) -> int:
    """Return the number of rows of V ids that stay in a core's cache, or keep another device busy."""
    return max(1, (_BLOCK if on_cpu else 2**22) // V)


def row_of(z_q: Tensor, q: Tensor, label: Tensor, columns: dict[str, Tensor]) -> Tensor:
    """Centre the student's logits in place, fill `q` and the columns that are the student's alone.

    Returns the log of the normaliser of the centred logits.
    """
    columns["correct"].copy_((z_q.gather(-1, label) >= z_q.amax(-1, keepdim=True))[:, 0])
    log_normaliser = softmax(z_q, q)
    columns["cross_entropy"].copy_((log_normaliser - z_q.gather(-1, label))[:, 0])
    columns["entropy"].copy_(log_normaliser[:, 0] - _dot(q, z_q))
    return log_normaliser


# An objective fills its columns and returns (g, s) with dL/dz_q = g + s q. It may use up what it is given, but for q.
_Gradient = tuple[Tensor, Tensor | float]


class _Row:
    """A few rows as every objective wants them: centred logits, distributions, and d = log q - log p."""

    def __init__(
        self, z_q: Tensor, z_p: Tensor | None, label: Tensor, columns: dict[str, Tensor], *buffers: Tensor
    ) -> None:
        self.q, self.p, self.d, self.difference, self.spare, self.other = buffers
        self.z_q, self.label, self.columns = z_q, label, columns
        self.log_normaliser_q = row_of(z_q, self.q, label, columns)
        if z_p is None:
            return
        self.z_p = z_p
        self.log_normaliser_p = softmax(z_p, self.p)
        columns["teacher_cross_entropy"].copy_((self.log_normaliser_p - z_p.gather(-1, label))[:, 0])
        torch.sub(z_q, z_p, out=self.d).sub_(self.log_normaliser_q - self.log_normaliser_p)
        columns["kl"].copy_(-_dot(self.p, self.d))

    def compare(self, p: Tensor, d: Tensor, q: Tensor | None = None) -> Tensor:
        """Fill ``difference = q - p`` of ``d = log q - log p`` to the last digit; return ``KL(p || q)``.

        ``(q + p) tanh(d / 2)``: nothing cancels where they are close, nothing overflows where they are not.
        ``sum (q - p - p d)`` is ``-sum p d`` but for rounding, to which it is less sensitive.
        """
        both = torch.add(self.q if q is None else q, p, out=self.spare)
        torch.div(d, 2, out=self.difference).tanh_().mul_(both)
        return self.difference.sum(-1) - _dot(p, d)

    def log_probs(self) -> tuple[Tensor, Tensor]:
        """``log q`` and ``log p``."""
        return self.z_q - self.log_normaliser_q, self.z_p - self.log_normaliser_p

    def jacobian(self, x: Tensor) -> _Gradient:
        """``J(x) = q (x - sum q x)``; x relative to its value at the student's likeliest token."""
        likeliest = torch.eq(self.z_q, 0, out=self.spare)  # the logits are centred; argmax takes 30 times as long
        x.sub_((_dot(x, likeliest) / likeliest.sum(-1))[:, None])
        g = x.mul_(self.q)
        return g, -g.sum(-1, keepdim=True)


def _taid(row: _Row, t: float | Tensor, mixture: float) -> _Gradient:
    if mixture != 1.0:
        log_q, log_p = row.log_probs()
        log_r, from_r, _ = alpha_mixture(log_q, log_p, row.d.neg(), mixture, t)
        row.columns["objective"].copy_(row.compare(log_r.exp_(), from_r))
        row.columns["target_cross_entropy"].copy_(-_dot(log_r, log_q))
        return row.difference, 0.0
    z_t = torch.mul(row.z_q, 1 - t, out=row.p).add_(torch.mul(row.z_p, t, out=row.spare))
    top = z_t.amax(-1, keepdim=True)
    log_normaliser_t = softmax(z_t, row.other) + top
    d_t = torch.sub(row.z_q, row.z_p, out=row.d).mul_(t).add_(log_normaliser_t - row.log_normaliser_q)
    p_t = row.other
    row.columns["objective"].copy_(row.compare(p_t, d_t))
    row.columns["target_cross_entropy"].copy_(row.log_normaliser_q[:, 0] - _dot(p_t, row.z_q))
    return row.difference, 0.0


def _forward_kl(row: _Row) -> _Gradient:
    forward = row.compare(row.p, row.d)
    row.columns["kl"].copy_(forward)
    row.columns["objective"].copy_(forward)
    return row.difference, 0.0


def _reverse_kl(row: _Row) -> _Gradient:
    row.columns["kl"].copy_(row.compare(row.p, row.d))
    row.columns["objective"].copy_(_dot(row.q, row.d) - row.difference.sum(-1))
    return row.jacobian(row.d)


def _log_shares(row: _Row, share_of_p: float) -> tuple[Tensor, Tensor]:
    """``log p - log m`` and ``log q - log m`` for ``m = share p + (1 - share) q``, to the last digit."""
    # m = larger (1 + share_of_smaller (smaller / larger - 1))
    share_of_smaller = torch.where(row.d >= 0, row.d.new_tensor(share_of_p), 1 - share_of_p)
    log_ratio = torch.abs(row.d, out=row.spare).neg_().expm1_().mul_(share_of_smaller).log1p_()
    q_to_m = torch.clamp(row.d, max=0, out=row.other).sub_(log_ratio)
    return row.d.clamp_(min=0).add_(log_ratio).neg_(), q_to_m


def _jsd(row: _Row, beta: float) -> _Gradient:
    p_to_m, q_to_m = _log_shares(row, beta)
    row.columns["objective"].copy_(beta * _dot(row.p, p_to_m) + (1 - beta) * _dot(row.q, q_to_m))
    return row.jacobian(q_to_m.mul_(1 - beta))


def _tvd(row: _Row) -> _Gradient:
    row.compare(row.p, row.d)
    row.columns["objective"].copy_(0.5 * torch.abs(row.difference, out=row.spare).sum(-1))
    return row.jacobian(row.difference.sign_().mul_(0.5))


def _skew_forward_kl(row: _Row, skew: float) -> _Gradient:
    if skew == 0.0:
        return _forward_kl(row)
    row.compare(row.p, row.d)
    p_to_m, _ = _log_shares(row, skew)
    row.columns["objective"].copy_(torch.mul(row.p, p_to_m, out=row.spare).add_(row.difference, alpha=1 - skew).sum(-1))
    return row.jacobian(p_to_m.expm1_().mul_(skew - 1))


def _skew_reverse_kl(row: _Row, skew: float) -> _Gradient:
    if skew == 0.0:
        return _reverse_kl(row)
    row.compare(row.p, row.d)
    _, q_to_m = _log_shares(row, 1 - skew)
    row.columns["objective"].copy_(torch.mul(row.q, q_to_m, out=row.spare).sub_(row.difference, alpha=1 - skew).sum(-1))
    return row.jacobian(q_to_m.sub_(torch.expm1(q_to_m, out=row.spare), alpha=skew))


def _adaptive_kl(row: _Row, head_mass: float) -> _Gradient:
    forward = row.compare(row.p, row.d)
    reverse = _dot(row.q, row.d) - row.difference.sum(-1)
    in_head = row.z_p > _below_head(row.z_p, row.p, row.spare, head_mass)
    gaps = torch.abs(row.difference, out=row.spare)
    whole = gaps.sum(-1, keepdim=True)
    w_head = torch.where(whole > 0, gaps.mul_(in_head).sum(-1, keepdim=True) / whole, 0.5)
    row.columns["objective"].copy_(w_head[:, 0] * forward + (1 - w_head[:, 0]) * reverse)
    g, scale_q = row.jacobian(row.d)
    return row.difference.mul_(w_head).add_(g.mul_(1 - w_head)), scale_q * (1 - w_head)


def _abkd(row: _Row, alpha: float, beta: float) -> _Gradient:
    (log_q, log_p), gap = row.log_probs(), row.d.neg()
    value, slope = ab_divergence(log_p, log_q, gap, alpha, beta)
    row.columns["objective"].copy_(value)
    return _through_softmax(slope, row.q)


def _amid(row: _Row, mixture: float, share: float, alpha: float, beta: float) -> _Gradient:
    if share == 0.0:
        return _abkd(row, alpha, beta)
    (log_q, log_p), gap = row.log_probs(), row.d.neg()
    log_r, _, from_r = alpha_mixture(log_q, log_p, gap, mixture, share)
    value, slope = ab_divergence(log_p, log_r, from_r, alpha, beta)
    row.columns["objective"].copy_(value)
    g, scale_r = _through_softmax(slope, log_r.exp_())
    of_student = torch.sigmoid(gap.mul_((mixture - 1) / 2).sub_(math.log(share / (1 - share))))
    return _through_softmax(g.add_(log_r.mul_(scale_r)).mul_(of_student), row.q)


def _through_softmax(slope: Tensor, q: Tensor) -> _Gradient:
    """``slope - q sum slope``, of the slope less a multiple of q that makes it 0 at the likeliest token.

    That changes nothing, and without it the two cancel where q is nearly 1 there.
    """
    likeliest = q == q.amax(-1, keepdim=True)
    multiple = (slope / q).where(likeliest, 0.0).sum(-1, keepdim=True) / likeliest.sum(-1, keepdim=True)
    g = slope.sub_(multiple * q)
    return g, -g.sum(-1, keepdim=True)


def _below_head(z_p: Tensor, p: Tensor, spare: Tensor, head_mass: float) -> Tensor:
    """A value just below the teacher's logits of the head: bisected, because sorting V logits costs far more."""
    low = z_p.new_full((len(z_p), 1), -104.0)  # exp() of it is 0 in float32
    high = torch.zeros_like(low)  # the logits are centred: no mass lies above
    for _ in range(36):
        middle = (low + high) / 2
        enough = _dot(p, torch.gt(z_p, middle, out=spare)) >= head_mass
        low, high = torch.where(enough[:, None], middle, low), torch.where(enough[:, None], high, middle)
    return low


def _dkd(row: _Row, alpha: float, beta: float, temperature: float) -> _Gradient:
    y_q, rest_q, normaliser_q, _ = _without_label(row.z_q, row.label, temperature, row.other)
    y_p, rest_p, normaliser_p, has_others = _without_label(row.z_p, row.label, temperature, row.p)
    beta_M1 = beta * has_others
    d = torch.sub(row.z_q, row.z_p, out=row.d).sub_(normaliser_q - normaliser_p)
    non_target = row.compare(row.p, d, row.other)
    log_b_q, log_b_p = torch.cat([y_q, rest_q], -1), torch.cat([y_p, rest_p], -1)
    d_b = log_b_q - log_b_p
    difference_b = -torch.maximum(log_b_q, log_b_p).exp() * d_b.sign() * d_b.abs().neg().expm1()
    target = difference_b.sum(-1) - _dot(log_b_p.exp(), d_b)
    row.columns["objective"].copy_(temperature**2 * (alpha * target + beta_M1[:, 0] * non_target))
    on_label = temperature * alpha * difference_b[:, :1]
    g = row.difference.mul_(temperature * beta_M1).sub_(row.other.mul_(on_label))
    return g.scatter_(-1, row.label, on_label), 0.0


def _without_label(
    z: Tensor, label: Tensor, temperature: float, probs: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fill the distribution without the label; return log p_y, log (1 - p_y), the normaliser of z, which is without y
    from here on, and 1 where there is another token at all, else 0."""
    y = z.gather(-1, label) / temperature
    top = z.scatter_(-1, label, LOG_ZERO).amax(-1, keepdim=True)
    normaliser = softmax(z.div_(temperature), probs)
    rest = normaliser + top / temperature
    log_all = torch.logaddexp(y, rest)
    return y - log_all, rest - log_all, normaliser, (top > LOG_ZERO / 2).to(z.dtype)


def _ctkd(row: _Row, temperature: float | Tensor) -> _Gradient:
    T = temperature
    normalisers = [softmax(z.div_(T), out) for z, out in ((row.z_q, row.other), (row.z_p, row.p))]
    row.z_p.clamp_(min=-1e3)  # p is 0 there, and `both` and `moment` each contain what then adds up to nothing
    d = torch.sub(row.z_q, row.z_p, out=row.d).sub_(normalisers[0] - normalisers[1])
    kl = row.compare(row.p, d, row.other)
    both = _dot(row.difference, d)
    terms = d.mul_(row.p).neg_().add_(row.difference)
    moment = _dot(terms, row.z_p.sub_(_dot(row.p, row.z_p)[:, None]))
    row.columns["objective"].copy_(T * T * kl)
    row.columns["temperature_gradient"].copy_(T * (2 * kl - both - moment))
    return row.difference.mul_(T), 0.0


_GRADIENTS: dict[str, Callable[..., _Gradient]] = {
    "taid": _taid,
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "tvd": _tvd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "adaptive_kl": _adaptive_kl,
    "abkd": _abkd,
    "amid": _amid,
    "dkd": _dkd,
    "ctkd": _ctkd,
}


def softmax(z: Tensor, out: Tensor) -> Tensor:
    """Centre z in place; fill `out` with its softmax; return the log of the normaliser of the centred logits."""
    z.clamp_(min=LOG_ZERO)
    z.sub_(z.amax(-1, keepdim=True))
    # By exp2: torch.exp is left to a library that takes three times as long on some processors.
    total = torch.mul(z, math.log2(math.e), out=out).exp2_().sum(-1, keepdim=True)
    out.div_(total)
    return total.log_()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    products: Tensor = torch.linalg.vecdot(a, b)
    return products
