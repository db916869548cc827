r"""The objectives: pure functions of two sets of logits, and the readable truth that every fast path is tested against.

    objective(student_logits, teacher_logits, **its_own_parameters) -> per-token loss

Logits are ``[..., V]`` of any float dtype; the result is ``[...]``, float32, in nats. Nothing is averaged here: the
caller sums over the trained tokens and divides once by their number. The teacher's logits receive no gradient.

Below, ``q`` is the student's distribution, ``p`` the teacher's, ``z_q`` and ``z_p`` their logits. ``-inf`` marks an
entry that is no token. Masked on both sides, it has probability zero and contributes nothing; masked by the student
alone, a divergence that is infinite comes out as a huge finite number.

:mod:`taid.losses.divergences` holds the arithmetic, and says how it keeps small divergences free of rounding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from taid.losses.divergences import (
    ab_divergence,
    centred,
    check_mixture,
    check_powers,
    check_skew,
    check_temperature,
    head_mask,
    interpolated_logits,
    kl_divergence,
    log_normaliser,
    log_probs,
    log_probs_pair,
    log_ratio_of_logits,
    mixture_of_logits,
    require_same_shape,
    softened_kl,
    split_off_label,
    with_slope,
)

__all__ = [
    "abkd",
    "adaptive_kl",
    "amid",
    "ctkd",
    "dkd",
    "forward_kl",
    "interpolated_log_probs",
    "jsd",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "taid",
    "tvd",
]


def taid(student_logits: Tensor, teacher_logits: Tensor, *, t: float | Tensor, mixture: float = 1.0) -> Tensor:
    r"""TAID: KL to a target interpolated, on logits, between the student itself and the teacher.

    .. math:: KL(p_t \,\|\, q), \qquad p_t = softmax((1 - t)\, z_q' + t\, z_p)

    with ``z_q'`` the student's logits held constant, so that the gradient on ``z_q`` is ``q - p_t``. At ``t = 0`` loss
    and gradient are exactly zero; at ``t = 1`` this is :func:`forward_kl`. Beyond 1 the target lies behind the teacher,
    as seen from the student. At every other t the gradient is that of the Renyi divergence of order t, ``log(sum p^t
    q^(1 - t)) / (t - 1)``, which divided by t is reverse KL in the limit 0, and infinite above 1 where q alone is 0.

    Args:
        student_logits: ``[..., V]``.
        teacher_logits: ``[..., V]``.
        t: where the target stands, from the student (0) over the teacher (1) to 2; a number or a 0-dim tensor. At most
            1 with another ``mixture``.
        mixture: which mean of the two the target is: alpha of AMiD's alpha-mixture, of which t is then the share
            (see :func:`amid`). 1 is TAID's, -1 the mean of the probabilities.

    Returns:
        The loss of each token, ``[...]``, float32, nats.

    Raises:
        ValueError: ``t`` is a number out of range, ``mixture`` is not finite, or the shapes differ.

    Reference: Shing et al., "TAID", ICLR 2025, arXiv 2501.16937, eq. 3 and 4. The official code minimises the
    cross-entropy of ``p_t``, which has the same gradient and another value; it mixes in the logits' own dtype.
    """
    log_p_t = interpolated_log_probs(student_logits, teacher_logits, t=t, mixture=mixture)
    with torch.no_grad():
        if mixture == 1.0:
            z_q, z_p = centred(student_logits), centred(teacher_logits)
            difference = t * (z_q - z_p) + (log_normaliser(interpolated_logits(z_q, z_p, t)) - log_normaliser(z_q))
        else:
            difference = mixture_of_logits(student_logits, teacher_logits, mixture, t)[1]
    return kl_divergence(log_p_t, log_probs(student_logits), difference)


def interpolated_log_probs(
    student_logits: Tensor, teacher_logits: Tensor, *, t: float | Tensor, mixture: float = 1.0
) -> Tensor:
    """Return ``log p_t``, the log-probabilities of TAID's target: ``[..., V]``, float32, without a gradient.

    See :func:`taid` for the arguments and the formula.
    """
    check_mixture(mixture)
    last = 2 if mixture == 1.0 else 1
    if not isinstance(t, Tensor) and not 0.0 <= t <= last:
        raise ValueError(f"t must lie in [0, {last}], got {t}")
    require_same_shape(student_logits, teacher_logits)
    if mixture != 1.0:
        return mixture_of_logits(student_logits.detach(), teacher_logits, mixture, t)[0]
    return log_probs(interpolated_logits(centred(student_logits.detach()), centred(teacher_logits.detach()), t))


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Forward KL, ``KL(p || q)``, the classic of knowledge distillation. The student covers all of the teacher's modes.

    Args and result as in the module's docstring. The gradient on ``z_q`` is ``q - p``.

    Reference: Hinton, Vinyals and Dean, 2015, arXiv 1503.02531.
    """
    log_q, log_p = log_probs_pair(student_logits, teacher_logits)
    return kl_divergence(log_p, log_q, -log_ratio_of_logits(teacher_logits, student_logits))


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Reverse KL, ``KL(q || p)``: the student seeks few of the teacher's modes.

    Args and result as in the module's docstring.

    Reference: Gu et al., "MiniLLM", arXiv 2306.08543.
    """
    log_q, log_p = log_probs_pair(student_logits, teacher_logits)
    return kl_divergence(log_q, log_p, log_ratio_of_logits(teacher_logits, student_logits))


def jsd(student_logits: Tensor, teacher_logits: Tensor, *, beta: float = 0.1) -> Tensor:
    """Generalised Jensen-Shannon divergence.

    ``beta KL(p || m) + (1 - beta) KL(q || m)`` with the mixture ``m = beta p + (1 - beta) q``.
    ``jsd / beta`` goes to forward KL as ``beta`` goes to 0, ``jsd / (1 - beta)`` to reverse KL as it goes to 1.

    Args:
        student_logits: ``[..., V]``.
        teacher_logits: ``[..., V]``.
        beta: weight of the teacher in the mixture, inside (0, 1); 0.1 is the TAID paper's GKD setting.

    Returns:
        The loss of each token, ``[...]``, float32, nats.

    Raises:
        ValueError: ``beta`` is not inside (0, 1), where the divergence is zero whatever the logits are.

    Reference: Agarwal et al., "GKD", arXiv 2306.13649.
    """
    if not 0.0 < beta < 1.0:
        raise ValueError(
            f"jsd's beta must lie strictly between 0 and 1, got {beta}: at the ends it is constantly zero. "
            "Its scaled limits are forward_kl (beta to 0) and reverse_kl (beta to 1)."
        )
    log_q, log_p = log_probs_pair(student_logits, teacher_logits)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * kl_divergence(log_p, log_m) + (1 - beta) * kl_divergence(log_q, log_m)


def tvd(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Total variation distance, ``0.5 sum |p - q|``, in [0, 1].

    Args and result as in the module's docstring.

    Reference: Wen et al., "f-distill", arXiv 2307.15190.
    """
    log_q, log_p = log_probs_pair(student_logits, teacher_logits)
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def skew_forward_kl(student_logits: Tensor, teacher_logits: Tensor, *, skew: float = 0.1) -> Tensor:
    """Skewed forward KL, ``KL(p || skew p + (1 - skew) q)``; ``skew = 0`` is :func:`forward_kl`.

    Args:
        student_logits: ``[..., V]``.
        teacher_logits: ``[..., V]``.
        skew: share of the teacher in the second argument, in [0, 1).

    Returns:
        The loss of each token, ``[...]``, float32, nats; at most ``-log(skew)``.

    Raises:
        ValueError: ``skew`` lies outside [0, 1).

    Reference: Ko et al., "DistiLLM", arXiv 2402.03898.
    """
    check_skew(skew)
    if skew == 0.0:
        return forward_kl(student_logits, teacher_logits)
    log_q, log_p = log_probs_pair(student_logits, teacher_logits)
    return kl_divergence(log_p, torch.logaddexp(log_q + math.log1p(-skew), log_p + math.log(skew)))


def skew_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, skew: float = 0.1) -> Tensor:
    """Skewed reverse KL, ``KL(q || (1 - skew) p + skew q)``; ``skew = 0`` is :func:`reverse_kl`.

    Args:
        student_logits: ``[..., V]``.
        teacher_logits: ``[..., V]``.
        skew: share of the student in the second argument, in [0, 1).

    Returns:
        The loss of each token, ``[...]``, float32, nats; at most ``-log(skew)``.

    Raises:
        ValueError: ``skew`` lies outside [0, 1).

    Reference: Ko et al., "DistiLLM", arXiv 2402.03898.
    """
    check_skew(skew)
    if skew == 0.0:
        return reverse_kl(student_logits, teacher_logits)
    log_q, log_p = log_probs_pair(student_logits, teacher_logits)
    return kl_divergence(log_q, torch.logaddexp(log_p + math.log1p(-skew), log_q + math.log(skew)))


def abkd(student_logits: Tensor, teacher_logits: Tensor, *, alpha: float = 0.2, beta: float = 0.7) -> Tensor:
    r"""ABKD: the alpha-beta divergence, between forward and reverse KL in two respects.

    .. math:: -\frac{1}{\alpha\beta} \sum_v \left[ p^\alpha q^\beta - \frac{\alpha}{\alpha + \beta} p^{\alpha + \beta}
              - \frac{\beta}{\alpha + \beta} q^{\alpha + \beta} \right]

    and its limits where alpha or beta is 0. (1, 0) is :func:`forward_kl`, (0, 1) :func:`reverse_kl`, (1, 1) half the
    sum of squared differences, (1/2, 1/2) twice the sum of ``(sqrt p - sqrt q)^2``. The gradient on ``log q`` is
    ``q^beta (q^alpha - p^alpha) / alpha``: a larger `beta` weighs what the student is sure of, a smaller `alpha` evens
    out large and small errors.

    Args:
        student_logits: ``[..., V]``.
        teacher_logits: ``[..., V]``.
        alpha: the teacher's power, 0 or at least 0.001.
        beta: the student's power, likewise; not both 0.

    Returns:
        The loss of each token, ``[...]``, float32, nats for (1, 0) and (0, 1).

    Raises:
        ValueError: a power is negative, tiny or not finite, both are 0, or the shapes differ. The divergence is defined
            for negative powers too, but where their sum is not positive it weighs most what is least likely.

    Reference: Wang et al., "ABKD", ICML 2025, arXiv 2505.04560; 0.2 and 0.7 are those of its authors' instruction
    tuning. The divergence is that of Cichocki, Cruces and Amari, Entropy 2011.
    """
    check_powers(alpha, beta)
    log_q, log_p = log_probs_pair(student_logits, teacher_logits)
    return with_slope(
        ab_divergence(log_p, log_q, log_ratio_of_logits(teacher_logits, student_logits), alpha, beta), log_q
    )


def amid(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    mixture: float = 0.5,
    share: float = 0.5,
    alpha: float = 0.2,
    beta: float = 0.7,
) -> Tensor:
    r"""AMiD: a divergence of the teacher from a mixture of itself and the student, in which the student moves.

    .. math:: D_{AB}^{(\alpha, \beta)}(p \,\|\, r), \qquad
              r \propto f^{-1}(\lambda f(p) + (1 - \lambda) f(q)), \qquad f(u) = u^{(1 - m) / 2}

    (log u for m = 1) with :math:`\lambda` the `share` and m the `mixture`, and the divergence of :func:`abkd`. The
    gradient goes through r. At ``mixture = 1`` r is TAID's target at ``t = share`` (:func:`interpolated_log_probs`); at
    -1 it is ``share p + (1 - share) q``, and (1, 0) makes this :func:`skew_forward_kl`. ``share = 0`` is :func:`abkd`.

    Args:
        student_logits: ``[..., V]``.
        teacher_logits: ``[..., V]``.
        mixture: which mean of p and q; alpha in the paper. The smaller, the nearer to the larger of the two.
        share: of the teacher in it, in [0, 1); lambda in the paper.
        alpha: of the divergence, as in :func:`abkd`.
        beta: likewise.

    Returns:
        The loss of each token, ``[...]``, float32.

    Raises:
        ValueError: a parameter is out of range, or the shapes differ.

    Reference: Shin et al., "AMiD", ICLR 2026, arXiv 2510.15982. The defaults are those of its authors' scripts, whose
    code takes every mixture above 1 for 1.
    """
    check_mixture(mixture)
    if not 0.0 <= share < 1.0:
        raise ValueError(f"share must lie in [0, 1), got {share}: at 1 the mixture is the teacher, whatever q is")
    check_powers(alpha, beta)
    require_same_shape(student_logits, teacher_logits)
    if share == 0.0:
        return abkd(student_logits, teacher_logits, alpha=alpha, beta=beta)
    log_r, _, log_ratio = mixture_of_logits(student_logits, teacher_logits, mixture, share)
    return with_slope(ab_divergence(log_probs(teacher_logits.detach()), log_r, log_ratio, alpha, beta), log_r)


def adaptive_kl(student_logits: Tensor, teacher_logits: Tensor, *, head_mass: float = 0.5) -> Tensor:
    r"""Adaptive KL: forward and reverse KL, each weighted by where student and teacher are apart.

    .. math:: w_{head} KL(p \,\|\, q) + w_{tail} KL(q \,\|\, p), \qquad w_{head} = g_{head} / (g_{head} + g_{tail})

    with ``g`` the sum of ``|p - q|`` over the head or the tail. The head is the smallest set of the teacher's likeliest
    tokens that holds `head_mass`, equally likely ones in it together: ``v`` is in the head if all tokens likelier than
    ``v`` hold less than `head_mass`. The weights are constants for the gradient; where ``p`` is ``q``, both are 0.5.

    Args:
        student_logits: ``[..., V]``.
        teacher_logits: ``[..., V]``.
        head_mass: the teacher's probability that the head has to hold, inside (0, 1); mu in the paper.

    Returns:
        The loss of each token, ``[...]``, float32, nats.

    Raises:
        ValueError: ``head_mass`` is not inside (0, 1), or the shapes differ.

    Reference: Wu et al., "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models",
    arXiv 2404.02657. Its authors' code leaves the token with which the head reaches its mass to the tail, unless it is
    the first. The official TAID code builds the mask in sorted order and applies it to the unsorted gap, lets the
    gradient through the weights, and takes the cross-entropy of ``p`` for the forward KL.
    """
    if not 0.0 < head_mass < 1.0:
        raise ValueError(
            f"head_mass must lie strictly between 0 and 1, got {head_mass}: at the ends there is no head or no tail"
        )
    log_q, log_p = log_probs_pair(student_logits, teacher_logits)
    with torch.no_grad():
        log_ratio = log_ratio_of_logits(teacher_logits, student_logits)
        # max(p, q) (1 - exp(-|log p - log q|)) is |p - q| to the last digit where the two are close.
        gap = torch.maximum(log_p, log_q).exp() * -torch.expm1(-log_ratio.abs())
        head_gap, total_gap = (gap * head_mask(log_p.exp(), head_mass)).sum(-1), gap.sum(-1)
        head_weight = torch.where(total_gap > 0, head_gap / total_gap, 0.5)
    return head_weight * kl_divergence(log_p, log_q, -log_ratio) + (1 - head_weight) * kl_divergence(
        log_q, log_p, log_ratio
    )


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    r"""Decoupled knowledge distillation: how likely the label is, and how the rest is shared out, weighted apart.

    .. math:: T^2 [\alpha KL(b_p \,\|\, b_q) + \beta KL(\hat p \,\|\, \hat q)]

    all of it at temperature T: ``b_p = (p_y, 1 - p_y)`` says whether the token is the label ``y``, ``p^`` is ``p``
    without the label, renormalised. At ``T = 1``, ``KL(p || q) = KL(b_p || b_q) + (1 - p_y) KL(p^ || q^)``: what
    `beta` replaces is ``1 - p_y``, small where the teacher is sure. ``1 - q_y`` is a log-sum-exp over the other tokens.
    Where the teacher masks all tokens but the label, the second part is 0.

    Args:
        student_logits: ``[..., V]``.
        teacher_logits: ``[..., V]``.
        labels: ``[...]``, int64, in [0, V); leave tokens without a label out before.
        alpha: weight of the label's part, 0 or larger.
        beta: weight of the other tokens' part, 0 or larger.
        temperature: T, larger than 0. The three defaults are the authors' code's for CIFAR-100.

    Returns:
        The loss of each token, ``[...]``, float32, nats.

    Raises:
        ValueError: a parameter is out of range, or the shapes do not fit.

    Reference: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679. The official TAID code
    divides by untrained tokens too and takes its softmax in the logits' dtype; its defaults are 1, 0.5 and 1.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"dkd's {name} must be 0 or a positive number, got {value}")
    check_temperature(temperature)
    require_same_shape(student_logits, teacher_logits)
    if labels.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"labels {tuple(labels.shape)} are not one for each of the logits {tuple(student_logits.shape)}"
        )
    label_q, others_q, _ = split_off_label(student_logits, labels)
    label_p, others_p, has_others = split_off_label(teacher_logits.detach(), labels)
    log_odds_q, log_odds_p = (
        torch.cat([label / temperature, log_normaliser(others / temperature)], -1)
        for label, others in ((label_q, others_q), (label_p, others_p))
    )
    label_part = forward_kl(log_odds_q, log_odds_p)
    others_part = torch.where(has_others, softened_kl(others_q, others_p, temperature), 0.0)
    return temperature**2 * (alpha * label_part + beta * others_part)


def ctkd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor) -> Tensor:
    r"""CTKD: forward KL at a temperature that is learned against the student.

    .. math:: T^2 KL(p_T \,\|\, q_T), \qquad q_T = softmax(z_q / T)

    and ``p_T`` likewise. At ``T = 1`` this is :func:`forward_kl`. A `temperature` that requires a gradient gets that of
    the loss, not reversed: :class:`taid.losses.schedules.CurriculumTemperature` climbs by it.

    Args:
        student_logits: ``[..., V]``.
        teacher_logits: ``[..., V]``.
        temperature: T, larger than 0; a number or a 0-dim tensor.

    Returns:
        The loss of each token, ``[...]``, float32, nats.

    Raises:
        ValueError: ``temperature`` is a number that is not positive, or the shapes differ.

    Reference: Li et al., "Curriculum Temperature for Knowledge Distillation", AAAI 2023, arXiv 2211.16231. The official
    TAID code never gives the temperature to an optimizer, so it stays at 15.6, and its reversal multiplies by
    +lambda; it takes the cross-entropy of ``p_T`` for the KL.
    """
    if not isinstance(temperature, Tensor):
        check_temperature(temperature)
    require_same_shape(student_logits, teacher_logits)
    return temperature**2 * softened_kl(student_logits, teacher_logits.detach(), temperature)
