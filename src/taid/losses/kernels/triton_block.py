"""One block of ids in Triton: load, compute, store. :mod:`taid.losses.kernels.triton_rows` sweeps over the blocks.

Triton has no expm1, log1p and tanh for every device. Those of this file are good to about an ulp.
"""

# Triton compiles the functions of this file from their source; their arguments have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import triton
import triton.language as tl

from taid.losses.divergences import LOG_ZERO

_LOG_ZERO = tl.constexpr(LOG_ZERO)


@triton.jit
def load_logits(tile, row, ids, V):
    """Logits of some ids of a row; LOG_ZERO beyond the last id."""
    # In whole groups of 16, the last of them in the padding, loads are 16 bytes wide whatever V is.
    z = tl.load(tile.products + row * tile.stride + ids, mask=ids < tl.cdiv(V, 16) * 16, other=0.0)
    z = tl.where(ids < V, z, 0.0)
    if tile.bias is not None:
        z += tl.load(tile.bias + ids, mask=ids < V, other=0.0)
    z *= tile.scale
    if tile.softcap is not None:
        z = tile.softcap * tanh(z / tile.softcap)
    # Not by a maximum, which would make a logit of NaN.
    return tl.where((z < _LOG_ZERO) | (ids >= V), _LOG_ZERO, z)


@triton.jit
def store_gradient(gradient, student, row, ids, label, g, q, logits, kd_ratio, V):
    """Mix the labels' part into a block of dL/dz_q and write it, as dL/d product, over the products.

    Half-precision block k lies over the float32 products from k BLOCK / 2 up to (k + 1) BLOCK / 2, none of them beyond
    block k. Nothing that is still to be read is overwritten if every thread holds block k before any thread writes it:
    one barrier a block is enough.
    """
    if gradient.products is not None:
        g = kd_ratio * g + (1 - kd_ratio) * tl.where(ids == label, q - 1, q)
        g *= student.scale
        if student.softcap is not None:
            y = tl.maximum(logits / student.softcap, -1.0)
            g *= 1 - y * y
        tl.debug_barrier()
        tl.store(gradient.products + row * gradient.stride + ids, g, mask=ids < tl.cdiv(V, 16) * 16)


@triton.jit
def exponential(x):
    """exp(x), exp(x) - 1 and exp(x) - 1 - x for x <= 0.5."""
    y = tl.maximum(x, -0.5)
    series = 1 / 720 + y * (1 / 5040 + y * (1 / 40320 + y * (1 / 362880)))
    series = y * y * (1 / 2 + y * (1 / 6 + y * (1 / 24 + y * (1 / 120 + y * series))))
    exp, near = tl.exp(x), x > -0.5
    expm1 = tl.where(near, x + series, exp - 1)
    return exp, expm1, tl.where(near, series, expm1 - x)


@triton.jit
def log1p(x):
    """log(1 + x) for -1 < x <= 1: 2 atanh(x / (2 + x)) by its series down to x = -0.5."""
    s = x / (2 + x)
    ss = s * s
    series = 1 / 5 + ss * (1 / 7 + ss * (1 / 9 + ss * (1 / 11 + ss * (1 / 13))))
    return tl.where(x >= -0.5, 2 * s * (1 + ss * (1 / 3 + ss * series)), tl.log(1 + x))


@triton.jit
def softplus(x):
    """log(1 + exp(x))."""
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def tanh(x):
    """(exp(2 x) - 1) / (exp(2 x) + 1)."""
    _, expm1, _ = exponential(-2 * tl.abs(x))
    return tl.where(x > 0, -expm1, expm1) / (2 + expm1)


@triton.jit
def take_in(z, top, total, T):
    """Add one z a lane to its maximum and its sum of ``exp((z - maximum) / T)``; one of the two exp() is that of 0."""
    smaller = tl.exp(-tl.abs(z - top) / T)
    return tl.maximum(z, top), tl.where(z > top, total * smaller + 1, total + smaller)


@triton.jit
def meet(tops, totals, T):
    """Maximum and sum of all lanes."""
    top = tl.max(tops)
    return top, tl.sum(totals * tl.exp((tops - top) / T))


@triton.jit
def softmax(logits, top, total):
    """Centred logits and their probabilities."""
    z = logits - top
    return z, tl.exp(z) * (1 / total)


@triton.jit
def compare(q, p, d):
    """``q - p`` and the terms of ``KL(p || q)`` and ``KL(q || p)``, none negative, from ``d = log q - log p``.

    The larger of both times a function of -abs(d): nothing cancels where they are close, nothing overflows elsewhere.
    """
    larger, x = tl.maximum(q, p), -tl.abs(d)
    exp, expm1, rest = exponential(x)
    y = tl.maximum(x, -0.5)
    by_larger = larger * rest  # a (b / a - 1 - log(b / a)), a the larger
    by_smaller = larger * tl.where(x > -0.5, y * y - rest * (1 - y), x * exp - expm1)  # the same, a the smaller
    difference = larger * tl.where(d > 0, -expm1, expm1)
    return difference, tl.where(d > 0, by_smaller, by_larger), tl.where(d > 0, by_larger, by_smaller)


@triton.jit
def label_divergence(odds_q, odds_p):
    """dkd: ``q_y - p_y`` and the KL of (label, not label), from log-odds of the label."""
    log_q, log_p = -softplus(-odds_q), -softplus(-odds_p)
    difference, on, _ = compare(tl.exp(log_q), tl.exp(log_p), log_q - log_p)
    log_q, log_p = -softplus(odds_q), -softplus(odds_p)
    _, off, _ = compare(tl.exp(log_q), tl.exp(log_p), log_q - log_p)
    return difference, on + off


@triton.jit
def to_mixture(d, share_of_p):
    """``log p / m``, ``log q / m``, ``p / m - 1`` and ``q / m - 1`` for ``m = share p + (1 - share) q``."""
    # m = larger (1 + inner)
    _, expm1, _ = exponential(-tl.abs(d))
    inner = tl.where(d > 0, share_of_p, 1 - share_of_p) * expm1
    log_ratio = log1p(inner)
    of_larger, of_smaller = -inner / (1 + inner), (expm1 - inner) / (1 + inner)
    p_to_m, q_to_m = -(tl.maximum(d, 0.0) + log_ratio), tl.minimum(d, 0.0) - log_ratio
    return p_to_m, q_to_m, tl.where(d > 0, of_smaller, of_larger), tl.where(d > 0, of_larger, of_smaller)


@triton.jit
def derivative(d, beta, skew, OBJECTIVE: tl.constexpr):
    """The x of J(x), but for a constant: always a function of ``d = log q - log p``."""
    if OBJECTIVE == "tvd":
        return tl.where(d > 0, 0.5, tl.where(d < 0, -0.5, 0.0))
    elif OBJECTIVE == "jsd":
        _, q_to_m, _, _ = to_mixture(d, beta)
        return (1 - beta) * q_to_m
    elif OBJECTIVE == "skew_forward_kl":
        _, _, p_over_m, _ = to_mixture(d, skew)
        return (skew - 1) * p_over_m
    elif OBJECTIVE == "skew_reverse_kl":
        _, q_to_m, _, q_over_m = to_mixture(d, 1 - skew)
        return q_to_m - skew * q_over_m
    else:
        return d


@triton.jit
def summands(q, p, d, difference, reverse, beta, skew, OBJECTIVE: tl.constexpr):
    """Return the terms that objectives with the gradient J(x) sum over the ids; in adaptive_kl, those of reverse KL."""
    if OBJECTIVE == "tvd":
        return 0.5 * tl.abs(difference)
    elif OBJECTIVE == "jsd":
        p_to_m, q_to_m, _, _ = to_mixture(d, beta)
        return beta * p * p_to_m + (1 - beta) * q * q_to_m
    elif OBJECTIVE == "skew_forward_kl":
        p_to_m, _, _, _ = to_mixture(d, skew)
        return (1 - skew) * difference + p * p_to_m
    elif OBJECTIVE == "skew_reverse_kl":
        _, q_to_m, _, _ = to_mixture(d, 1 - skew)
        return (skew - 1) * difference + q * q_to_m
    else:
        return reverse


@triton.jit
def mixed(z_q, z_p, log_ratio, power, share):
    """amid's mean of q and p, from `log_ratio`, the log of the student's normaliser less that of the teacher's.

    Its logits, which lie above log mean as the student's lie above log q; log mean - log q and log mean - log p; and
    the student's part in it. Near is the one with the larger share, in units of whose power the mean's is
    ``1 + s (exp(y) - 1)``: there, nothing cancels.
    """
    gap, q_near = z_p - z_q + log_ratio, share < 0.5
    s, to_other = tl.where(q_near, share, 1 - share), tl.where(q_near, gap, -gap)
    y = power * to_other
    far = tl.where(s > 0, y, 0.0) > 0.5  # in units of the other one's power, the mean's is s + (1 - s) exp(-y)
    exp, expm1, _ = exponential(tl.where(far, -y, tl.minimum(y, 0.5)))
    change = s * expm1
    mean = tl.where(far, s + (1 - s) * exp, 1 + change)
    log_mean = tl.where(far, tl.log(mean), log1p(change)) / tl.where(power == 0, 1.0, power)
    from_near = tl.where(far, to_other + log_mean, tl.where(power == 0, s * to_other, log_mean))
    from_other = tl.where(far, log_mean, from_near - to_other)
    from_q, from_p = tl.where(q_near, from_near, from_other), tl.where(q_near, from_other, from_near)
    # On top of the smaller step: of a masked id, only the other one's logit is a number to count with.
    z_mean = tl.where(tl.abs(from_q) < tl.abs(from_p), z_q + from_q, z_p + log_ratio + from_p)
    near_part, other_part = (1 - s) * tl.where(far, exp, 1.0), s * tl.where(far, 1.0, exp)
    return z_mean, from_q, from_p, tl.where(q_near, near_part, other_part) / mean


@triton.jit
def alpha_beta(log_r, log_p, d, alpha, beta):
    """Terms of the divergence of p from r, none negative, and their slopes on log r, from ``d = log p - log r``.

    The larger one's power alpha + beta times functions of -abs(d). Where that is p, they are those of exchanged powers,
    as the divergence of p from r is then that of r from p. `near` has no terms of first order, `far` none that grow.
    """
    p_larger, x = d > 0, -tl.abs(d)
    larger = tl.exp((alpha + beta) * tl.where(p_larger, log_p, log_r))
    exp_a, expm1_a, per_a, less_a = powers_of(x, alpha)
    exp_b, expm1_b, per_b, less_b = powers_of(x, beta)
    near = tl.where(p_larger, less_a - less_b + expm1_b * per_a, less_b - less_a + expm1_a * per_b)
    far = tl.where(p_larger, exp_b * per_a - per_b, exp_a * per_b - per_a)
    terms = larger * tl.where(x * tl.maximum(alpha, beta) > -1.0, near, far) / (alpha + beta)
    return terms, larger * tl.where(p_larger, exp_b * per_a, -per_a)


@triton.jit
def powers_of(x, u):
    """exp(u x), exp(u x) - 1; the latter and exp(u x) - 1 - u x over u, for u = 0 in the limit."""
    exp, expm1, rest = exponential(u * x)
    divisor = tl.where(u == 0, 1.0, u)
    return exp, expm1, tl.where(u == 0, x, expm1 / divisor), rest / divisor


@triton.jit
def softened(logits, ids, label, OBJECTIVE: tl.constexpr):
    """Return the logits that the temperature divides: in dkd, without the label's."""
    if OBJECTIVE == "dkd":
        logits = tl.where(ids == label, _LOG_ZERO, logits)
    return logits


@triton.jit
def slopes(z_q, z_p, models, mixture, alpha, beta, power, share, OBJECTIVE: tl.constexpr):
    """Terms of the divergence of p from r, the slopes on log r, r itself, and the student's part in it."""
    _, total_q, _, total_p = models
    top_r, total_r = mixture
    if OBJECTIVE == "amid":
        z_r, _, from_p, of_student = mixed(z_q, z_p, tl.log(total_q / total_p), power, share)
        z_r -= top_r
        d = top_r + tl.log(total_r / total_q) - from_p
    else:
        z_r, total_r, d, of_student = z_q, total_q, z_p - z_q + tl.log(total_q / total_p), 1.0
    terms, slope = alpha_beta(z_r - tl.log(total_r), z_p - tl.log(total_p), d, alpha, beta)
    return terms, slope, tl.exp(z_r) * (1 / total_r), of_student
