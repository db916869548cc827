"""The row stage of the fused loss as one Triton kernel; :mod:`taid.losses.kernels.torch_rows` states the closed forms.

A program takes one row and sweeps it two to five times, a block of ids at a time:

1. maxima and sums of every distribution that the objective needs: :func:`_normalise`, and for a mean of p and q, whose
   logits are made of both normalisers, a sweep of its own: :func:`_mixture`;
2. the statistics, and the gradient too where it is ``q - target``: :func:`_to_target`;
3. any other gradient, ``J(x) = q (x - sum q x)``, after the mean of x: :func:`_jacobian`, and :func:`_divergence`, in
   which amid has two such means one after the other.

Each sweep computes q, p and x anew from 8 bytes of logits an id: to keep two of them for the next would take 8 bytes
more to write. So an id costs 18 bytes of traffic with a half-precision gradient, 26 with a third sweep, 42 in amid, 62
in adaptive_kl, and less as far as the row is still in the cache when it is read again.

Compiled in are the objective, the block, and whether there are a teacher, biases, caps and a gradient. All numbers are
arguments and the number of rows is only the grid, so one kernel serves a whole run.
"""

# Triton compiles most functions of this file from their source; their arguments have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: ANN001, ANN202

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from taid.losses.divergences import LOG_ZERO
from taid.losses.kernels.row_task import COLUMNS, Finish, RowTask
from taid.losses.kernels.triton_block import (
    alpha_beta,
    compare,
    derivative,
    label_divergence,
    load_logits,
    meet,
    mixed,
    slopes,
    softened,
    softmax,
    store_gradient,
    summands,
    take_in,
)

# 8 ids of both models a thread: enough loads under way at once, and registers for two programs a multiprocessor.
_BLOCK, _WARPS = 2048, 8

_LOG_ZERO = tl.constexpr(LOG_ZERO)
_TO_TARGET = ("sft", "taid", "mixture_taid", "forward_kl", "dkd", "ctkd")


class _Tile(NamedTuple):
    """A tile, if there is one, and how logits come from its products (see :class:`.torch_rows.Finish`)."""

    products: Any
    stride: int
    bias: Any
    scale: float
    softcap: float | None


class _Gradient(NamedTuple):
    products: Any
    stride: int


def rows(
    student_MV: Tensor,
    teacher_MV: Tensor | None,
    labels_M: Tensor,
    task: RowTask,
    columns_MK: Tensor,
    *,
    gradient: torch.dtype | None,
) -> Tensor:
    """:func:`taid.losses.kernels.torch_rows.rows` for float32 tiles whose rows begin at multiples of 16 numbers.

    The gradient has the dtype that is asked for. If that is a half-precision one, it still lies in the tile's memory:
    each of its rows begins where the tile's row begins.
    """
    M, V = student_MV.shape
    assert columns_MK.shape == (M, len(COLUMNS))
    assert columns_MK.is_contiguous()
    assert labels_M.is_contiguous()
    gradient_MV = student_MV if gradient in (None, torch.float32) else student_MV.view(gradient)[:, :V]
    objective, given = task.kernel if task.kd_ratio > 0 else "sft", task.parameters
    t_or_T = given.get("t", given.get("temperature", given.get("share", 1.0)))
    if not isinstance(t_or_T, Tensor):  # a tensor is read by the kernel: to read it here would wait for the device
        t_or_T = torch.full((), t_or_T, dtype=torch.float32, device=student_MV.device)
    with torch.cuda.device_of(student_MV):
        _row_kernel[(M,)](
            _tile(student_MV, task.student),
            _tile(teacher_MV, task.teacher),
            _Gradient(None if gradient is None else gradient_MV, gradient_MV.stride(0)),
            labels_M, columns_MK, t_or_T, V, float(task.kd_ratio),
            *(float(given.get(name, 0.0)) for name in ("alpha", "beta", "skew", "head_mass")),
            (1.0 - given.get("mixture", 1.0)) / 2,
            OBJECTIVE=objective, TO_TARGET=objective in _TO_TARGET,
            BLOCK=min(_BLOCK, triton.next_power_of_2(V)), num_warps=_WARPS,
        )  # fmt: skip
    return gradient_MV


def _tile(tile_MV: Tensor | None, finish: Finish) -> _Tile:
    if tile_MV is None:
        return _Tile(None, 0, None, 1.0, None)
    assert tile_MV.dtype == torch.float32
    assert tile_MV.stride(1) == 1
    assert tile_MV.stride(0) % 16 == 0
    softcap = None if finish.softcap is None else float(finish.softcap)
    bias = None if finish.bias is None else finish.bias.contiguous()
    return _Tile(tile_MV, tile_MV.stride(0), bias, float(finish.scale), softcap)


# Where a chunk of the labels begins in memory must not make another kernel.
@triton.jit(do_not_specialize_on_alignment=["labels", "t_or_T"])
def _row_kernel(
    student, teacher, gradient, labels, columns, t_or_T, V, kd_ratio, alpha, beta, skew, head_mass, power,
    OBJECTIVE: tl.constexpr, TO_TARGET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # row * stride may not fit 32 bits
    label = tl.load(labels + row).to(tl.int32)
    t_or_T = tl.load(t_or_T).to(tl.float32)

    models, others, p_of_likeliest = _normalise(student, teacher, row, label, t_or_T, V, OBJECTIVE, TO_TARGET, BLOCK)
    top_q, total_q, top_p, total_p = models
    label_q = load_logits(student, row, label, V)
    correct = tl.where(label_q >= top_q, 1.0, 0.0)
    cross_entropy = tl.log(total_q) - (label_q - top_q)
    teacher_cross_entropy = 0.0
    if teacher.products is not None:
        teacher_cross_entropy = tl.log(total_p) - (load_logits(teacher, row, label, V) - top_p)

    target_cross_entropy, temperature_gradient = 0.0, 0.0
    if TO_TARGET:
        objective, kl, mean_z, target_cross_entropy, temperature_gradient = _to_target(
            student, teacher, gradient, row, label, models, others, t_or_T, alpha, beta, power, kd_ratio, V,
            OBJECTIVE, BLOCK,
        )  # fmt: skip
    elif OBJECTIVE == "abkd" or OBJECTIVE == "amid":
        objective, kl, mean_z = _divergence(
            student, teacher, gradient, row, label, models, p_of_likeliest, alpha, beta, power, t_or_T, kd_ratio, V,
            OBJECTIVE, BLOCK,
        )  # fmt: skip
    else:
        objective, kl, mean_z = _jacobian(
            student, teacher, gradient, row, label, models, p_of_likeliest, beta, skew, head_mass, kd_ratio, V,
            OBJECTIVE, BLOCK,
        )  # fmt: skip
    entropy = tl.log(total_q) - mean_z

    values = (
        objective, kl, cross_entropy, entropy, correct,
        teacher_cross_entropy, target_cross_entropy, temperature_gradient,
    )  # fmt: skip  # in the order of COLUMNS
    for k in tl.static_range(len(values)):
        tl.store(columns + row * len(values) + k, values[k])


@triton.jit
def _normalise(
    student, teacher, row, label, t_or_T, V, OBJECTIVE: tl.constexpr, TO_TARGET: tl.constexpr, BLOCK: tl.constexpr
):
    """Maxima and sums of q and p, of what else the objective needs, and the teacher's logit at the student's maximum.

    The others are, in taid, the target with its maximum relative to those of q and p; in dkd and ctkd, student and
    teacher at the temperature. Each lane looks after its own ids; the lanes meet once, at the end of the row.
    """
    lowest, zero = tl.full([BLOCK], _LOG_ZERO, tl.float32), tl.zeros([BLOCK], tl.float32)
    top_q, total_q, top_p, total_p, p_of_likeliest = lowest, zero, lowest, zero, lowest
    top_a, total_a, top_b, total_b = lowest, zero, lowest, zero
    t, T = t_or_T, t_or_T
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        logits_q = load_logits(student, row, ids, V)
        before_q, before_p = top_q, top_p
        top_q, total_q = take_in(logits_q, top_q, total_q, 1.0)
        if teacher.products is not None:
            logits_p = load_logits(teacher, row, ids, V)
            top_p, total_p = take_in(logits_p, top_p, total_p, 1.0)
        if OBJECTIVE == "taid":
            # Mixed after centring: the rounding of logits of 1e4 would leave three digits. The centre moves.
            z_t = (1 - t) * (logits_q - top_q) + t * (logits_p - top_p)
            top_a -= (1 - t) * (top_q - before_q) + t * (top_p - before_p)
            top_a, total_a = take_in(z_t, top_a, total_a, 1.0)
        if OBJECTIVE == "dkd" or OBJECTIVE == "ctkd":
            top_a, total_a = take_in(softened(logits_q, ids, label, OBJECTIVE), top_a, total_a, T)
            top_b, total_b = take_in(softened(logits_p, ids, label, OBJECTIVE), top_b, total_b, T)
        if not TO_TARGET:
            p_of_likeliest = tl.where(top_q > before_q, logits_p, p_of_likeliest)
    if OBJECTIVE == "taid":
        top_a += (1 - t) * (top_q - tl.max(top_q)) + t * (top_p - tl.max(top_p))
        top_a, total_a = meet(top_a, total_a, 1.0)
    if OBJECTIVE == "dkd" or OBJECTIVE == "ctkd":
        top_a, total_a = meet(top_a, total_a, T)
        top_b, total_b = meet(top_b, total_b, T)
    p_of_likeliest = tl.max(tl.where(top_q == tl.max(top_q), p_of_likeliest, lowest))
    top_q, total_q = meet(top_q, total_q, 1.0)
    top_p, total_p = meet(top_p, total_p, 1.0)
    return (top_q, total_q, top_p, total_p), (top_a, total_a, top_b, total_b), p_of_likeliest


@triton.jit
def _to_target(
    student, teacher, gradient, row, label, models, others, t_or_T, alpha, beta, power, kd_ratio, V,
    OBJECTIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sweep of objectives with the gradient ``q - target``, and of the labels alone."""
    top_q, total_q, top_p, total_p = models
    top_a, total_a, top_b, total_b = others
    t, T = t_or_T, t_or_T
    if OBJECTIVE == "mixture_taid":
        top_a, total_a, _from_p = _mixture(student, teacher, row, models, power, t, V, BLOCK)
    if OBJECTIVE == "dkd":
        difference_y, label_part = label_divergence(
            (load_logits(student, row, label, V) - top_a) / T - tl.log(total_a),
            (load_logits(teacher, row, label, V) - top_b) / T - tl.log(total_b),
        )
        beta = tl.where(top_b > _LOG_ZERO / 2, beta, 0.0)  # the teacher may mask all but the label

    # Summed by lane first: added up one by one, 152k terms would lose digits.
    zero = tl.zeros([BLOCK], tl.float32)
    objective, kl, mean_z, mean_t, both, moment, mean_b = zero, zero, zero, zero, zero, zero, zero
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        logits_q = load_logits(student, row, ids, V)
        z_q, q = softmax(logits_q, top_q, total_q)
        mean_z += q * z_q
        g = zero
        if teacher.products is not None:
            logits_p = load_logits(teacher, row, ids, V)
            z_p, p = softmax(logits_p, top_p, total_p)
            d = z_q - z_p - tl.log(total_q / total_p)
        if OBJECTIVE == "forward_kl":
            g, terms, _ = compare(q, p, d)
            objective += terms
        elif teacher.products is not None:
            kl -= p * d  # good to 1e-6 nats, without compare's arithmetic
        if OBJECTIVE == "taid":
            _, p_t = softmax((1 - t) * z_q + t * z_p, top_a, total_a)
            d_t = t * (z_q - z_p) + (top_a + tl.log(total_a / total_q))
        if OBJECTIVE == "mixture_taid":
            z_t, from_q, _, _ = mixed(z_q, z_p, tl.log(total_q / total_p), power, t)
            _, p_t = softmax(z_t, top_a, total_a)
            d_t = top_a + tl.log(total_a / total_q) - from_q
        if OBJECTIVE == "taid" or OBJECTIVE == "mixture_taid":
            g, terms, _ = compare(q, p_t, d_t)
            objective += terms
            mean_t += p_t * z_q
        if OBJECTIVE == "dkd" or OBJECTIVE == "ctkd":
            a = (softened(logits_q, ids, label, OBJECTIVE) - top_a) / T
            b = (softened(logits_p, ids, label, OBJECTIVE) - top_b) / T
            if OBJECTIVE == "ctkd":  # where p is 0, `both` and `moment` each contain what adds up to nothing
                b = tl.maximum(b, -1e3)
            q_T, p_T = tl.exp(a) * (1 / total_a), tl.exp(b) * (1 / total_b)
            offset = tl.log(total_a / total_b)
            g, terms, _ = compare(q_T, p_T, a - b - offset)
            objective += terms
        if OBJECTIVE == "dkd":
            g = T * tl.where(ids == label, alpha * difference_y, beta * g - alpha * difference_y * q_T)
        if OBJECTIVE == "ctkd":
            both += g * (a - b - offset)
            moment += terms * b
            mean_b += p_T * b
            g *= T
        store_gradient(gradient, student, row, ids, label, g, q, logits_q, kd_ratio, V)

    loss = tl.sum(objective)
    kl = loss if OBJECTIVE == "forward_kl" else tl.sum(kl)
    target_cross_entropy, temperature_gradient = 0.0, 0.0
    if OBJECTIVE == "taid" or OBJECTIVE == "mixture_taid":
        target_cross_entropy = tl.log(total_q) - tl.sum(mean_t)
    if OBJECTIVE == "dkd":
        loss = T * T * (alpha * label_part + beta * loss)
    if OBJECTIVE == "ctkd":
        temperature_gradient = T * (2 * loss - tl.sum(both) - (tl.sum(moment) - tl.sum(mean_b) * loss))
        loss = T * T * loss
    return loss, kl, tl.sum(mean_z), target_cross_entropy, temperature_gradient


@triton.jit
def _jacobian(
    student, teacher, gradient, row, label, models, p_of_likeliest, beta, skew, head_mass, kd_ratio, V,
    OBJECTIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The two sweeps of objectives with the gradient ``J(x)``; in adaptive_kl, ``w_head (q - p) + w_tail J(d)``."""
    top_q, total_q, top_p, total_p = models
    log_ratio = tl.log(total_q / total_p)
    x_of_likeliest = derivative(top_p - p_of_likeliest - log_ratio, beta, skew, OBJECTIVE)
    if OBJECTIVE == "adaptive_kl":
        below_head = _below_head(teacher, row, top_p, total_p, head_mass, V, BLOCK)

    zero = tl.zeros([BLOCK], tl.float32)
    objective, kl, mean_z, mean_x, gap, head_gap = zero, zero, zero, zero, zero, zero
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        z_q, q = softmax(load_logits(student, row, ids, V), top_q, total_q)
        z_p, p = softmax(load_logits(teacher, row, ids, V), top_p, total_p)
        d = z_q - z_p - log_ratio
        difference, forward, reverse = compare(q, p, d)
        kl += forward
        mean_z += q * z_q
        mean_x += q * (derivative(d, beta, skew, OBJECTIVE) - x_of_likeliest)
        objective += summands(q, p, d, difference, reverse, beta, skew, OBJECTIVE)
        if OBJECTIVE == "adaptive_kl":
            gap += tl.abs(difference)
            head_gap += tl.where(z_p > below_head, tl.abs(difference), 0.0)

    loss, kl, mean_x = tl.sum(objective), tl.sum(kl), tl.sum(mean_x)
    if OBJECTIVE == "adaptive_kl":
        whole = tl.sum(gap)
        w_head = tl.where(whole > 0, tl.sum(head_gap) / tl.maximum(whole, 1e-37), 0.5)
        loss = w_head * kl + (1 - w_head) * loss
    if gradient.products is not None:
        for start in range(0, V, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            logits_q = load_logits(student, row, ids, V)
            z_q, q = softmax(logits_q, top_q, total_q)
            z_p, p = softmax(load_logits(teacher, row, ids, V), top_p, total_p)
            d = z_q - z_p - log_ratio
            g = q * (derivative(d, beta, skew, OBJECTIVE) - x_of_likeliest - mean_x)
            if OBJECTIVE == "adaptive_kl":
                difference, forward, reverse = compare(q, p, d)
                g = w_head * difference + (1 - w_head) * g
            store_gradient(gradient, student, row, ids, label, g, q, logits_q, kd_ratio, V)
    return loss, kl, tl.sum(mean_z)


@triton.jit
def _divergence(
    student, teacher, gradient, row, label, models, p_of_likeliest, alpha, beta, power, share, kd_ratio, V,
    OBJECTIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sweeps of abkd and amid, in which the divergence is between p and r: q itself, or the mean of both.

    From slopes on the log of a softmax to those on its logits, the slope of the likeliest id is made 0 by a multiple of
    the softmax, without which ``slope - q sum slope`` cancels where q is nearly 1 there. What is of that id alone has a
    name in 1, because a name keeps its shape.
    """
    top_q, total_q, top_p, total_p = models
    mixture = 0.0, 1.0
    of_likeliest_r, mean_r = 0.0, 0.0
    if OBJECTIVE == "amid":
        top_r, total_r, from_p_of_likeliest = _mixture(student, teacher, row, models, power, share, V, BLOCK)
        mixture = top_r, total_r
        d_1 = top_r + tl.log(total_r / total_q) - from_p_of_likeliest
        _terms_1, slope_1 = alpha_beta(-tl.log(total_r), d_1 - tl.log(total_r), d_1, alpha, beta)
        of_likeliest_r = slope_1 * total_r

    zero = tl.zeros([BLOCK], tl.float32)
    objective, kl, mean_z, sum_r, sum_q = zero, zero, zero, zero, zero
    if OBJECTIVE == "abkd":
        _terms_1, slope_1, r_1, of_student_1 = slopes(
            0.0, p_of_likeliest - top_p, models, mixture, alpha, beta, power, share, OBJECTIVE
        )
        of_likeliest_q = slope_1 * total_q
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        z_q, q = softmax(load_logits(student, row, ids, V), top_q, total_q)
        z_p, p = softmax(load_logits(teacher, row, ids, V), top_p, total_p)
        terms, slope, r, _ = slopes(z_q, z_p, models, mixture, alpha, beta, power, share, OBJECTIVE)
        objective += terms
        _, forward, _ = compare(q, p, z_q - z_p - tl.log(total_q / total_p))
        kl += forward
        mean_z += q * z_q
        if OBJECTIVE == "amid":
            sum_r += slope - of_likeliest_r * r
        else:
            sum_q += slope - of_likeliest_q * q

    if gradient.products is not None:
        if OBJECTIVE == "amid":
            mean_r = tl.sum(sum_r)
            _terms_1, slope_1, r_1, of_student_1 = slopes(
                0.0, p_of_likeliest - top_p, models, mixture, alpha, beta, power, share, OBJECTIVE
            )
            of_likeliest_q = of_student_1 * (slope_1 - of_likeliest_r * r_1 - mean_r * r_1) * total_q
            for start in range(0, V, BLOCK):
                ids = start + tl.arange(0, BLOCK)
                z_q, q = softmax(load_logits(student, row, ids, V), top_q, total_q)
                z_p = load_logits(teacher, row, ids, V) - top_p
                _, slope, r, of_student = slopes(z_q, z_p, models, mixture, alpha, beta, power, share, OBJECTIVE)
                sum_q += of_student * (slope - of_likeliest_r * r - mean_r * r) - of_likeliest_q * q
        mean_q = tl.sum(sum_q)
        for start in range(0, V, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            logits_q = load_logits(student, row, ids, V)
            z_q, q = softmax(logits_q, top_q, total_q)
            z_p = load_logits(teacher, row, ids, V) - top_p
            _, slope, r, of_student = slopes(z_q, z_p, models, mixture, alpha, beta, power, share, OBJECTIVE)
            if OBJECTIVE == "amid":
                slope = of_student * (slope - of_likeliest_r * r - mean_r * r)
            g = slope - of_likeliest_q * q - mean_q * q
            store_gradient(gradient, student, row, ids, label, g, q, logits_q, kd_ratio, V)
    return tl.sum(objective), tl.sum(kl), tl.sum(mean_z)


@triton.jit
def _mixture(student, teacher, row, models, power, share, V, BLOCK: tl.constexpr):
    """Maximum and sum of the mean's logits, and how far its likeliest id lies above log p."""
    top_q, total_q, top_p, total_p = models
    lowest = tl.full([BLOCK], _LOG_ZERO, tl.float32)
    top, total, from_p_of_likeliest = lowest, tl.zeros([BLOCK], tl.float32), lowest
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        z_q, z_p = load_logits(student, row, ids, V) - top_q, load_logits(teacher, row, ids, V) - top_p
        z_r, _, from_p, _ = mixed(z_q, z_p, tl.log(total_q / total_p), power, share)
        # One NaN makes all of a row NaN, by q or p; there is no need for it here.
        z_r = tl.where(z_r > _LOG_ZERO, z_r, _LOG_ZERO)
        from_p_of_likeliest = tl.where(z_r > top, from_p, from_p_of_likeliest)
        top, total = take_in(z_r, top, total, 1.0)
    from_p_of_likeliest = tl.max(tl.where(top == tl.max(top), from_p_of_likeliest, lowest))
    top, total = meet(top, total, 1.0)
    return top, total, from_p_of_likeliest


@triton.jit
def _below_head(teacher, row, top_p, total_p, head_mass, V, BLOCK: tl.constexpr):
    """A value just below the teacher's logits of the head, to 36 bits of the range in which exp() is not 0."""
    WAYS: tl.constexpr = 16  # thresholds that one sweep tries
    STEP: tl.constexpr = (BLOCK + 1) // 2  # with so many sums an id, registers hold half a block
    low, width = -104.0, 104.0
    for _ in range(9):
        thresholds = low + width / WAYS * tl.arange(0, WAYS)
        masses = tl.zeros([WAYS, STEP], tl.float32)
        for start in range(0, V, STEP):
            z_p, p = softmax(load_logits(teacher, row, start + tl.arange(0, STEP), V), top_p, total_p)
            masses += tl.where(z_p[None, :] > thresholds[:, None], p[None, :], 0.0)
        low = tl.max(tl.where(tl.sum(masses, axis=1) >= head_mass, thresholds, low))
        width /= WAYS
    return low
