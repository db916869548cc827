r"""The objectives, pure functions of two sets of logits: the readable truth that every fast path is tested against.

    objective(student_logits, teacher_logits, **its_own_parameters) -> per-token loss

Logits are ``[..., V]`` of any float dtype; the result is ``[...]``, float32, in nats. Nothing is averaged here: who
calls sums over the trained tokens and divides once by their number. The teacher's logits receive no gradient.

Below, ``q`` is the student's distribution, ``p`` the teacher's, ``z_q`` and ``z_p`` their logits. ``-inf`` marks an
entry that is no token. Masked on both sides, it has probability zero and contributes nothing; masked by the student
alone, a divergence that is infinite comes out as a huge finite number.

**Rounding.** ``sum p (log p - log q)`` is off by the rounding of the two normalisers, about 1e-6 nats whatever the
divergence is, so a small KL is mostly noise. The same sum with ``q - p`` (which adds up to zero) under it,
``sum p (exp(d) - 1 - d)`` with ``d = log q - log p``, has terms that are never negative and is insensitive to the
normalisers to first order. On 151,936 entries and a KL of 5e-5 nats the relative error falls from 4e-2 to 2e-6.
For the same reason ``d`` itself is taken from the gap of the logits, not from two rounded log-probabilities.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

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

# Stands for -inf: exp() of it is 0, and unlike -inf it survives `0 * x` and `x - x` without becoming NaN.
_LOG_ZERO = -1e30


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
            z_q, z_p = _centred(student_logits), _centred(teacher_logits)
            difference = t * (z_q - z_p) + (_normaliser(_mixed(z_q, z_p, t)) - _normaliser(z_q))
        else:
            difference = _mixture_of_logits(student_logits, teacher_logits, mixture, t)[1]
    return _kl(log_p_t, _log_probs(student_logits), difference)


def interpolated_log_probs(
    student_logits: Tensor, teacher_logits: Tensor, *, t: float | Tensor, mixture: float = 1.0
) -> Tensor:
    """Return ``log p_t``, the log-probabilities of TAID's target: ``[..., V]``, float32, without a gradient.

    See :func:`taid` for the arguments and the formula.
    """
    _check_mixture(mixture)
    last = 2 if mixture == 1.0 else 1
    if not isinstance(t, Tensor) and not 0.0 <= t <= last:
        raise ValueError(f"t must lie in [0, {last}], got {t}")
    _require_same_shape(student_logits, teacher_logits)
    if mixture != 1.0:
        return _mixture_of_logits(student_logits.detach(), teacher_logits, mixture, t)[0]
    return _log_probs(_mixed(_centred(student_logits.detach()), _centred(teacher_logits.detach()), t))


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Forward KL, ``KL(p || q)``: the classic of knowledge distillation; the student covers all of the teacher's modes.

    Args and result as in the module's docstring. The gradient on ``z_q`` is ``q - p``.

    Reference: Hinton, Vinyals and Dean, 2015, arXiv 1503.02531.
    """
    log_q, log_p = _log_probs_pair(student_logits, teacher_logits)
    return _kl(log_p, log_q, -_log_ratio(teacher_logits, student_logits))


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Reverse KL, ``KL(q || p)``: the student seeks few of the teacher's modes.

    Args and result as in the module's docstring.

    Reference: Gu et al., "MiniLLM", arXiv 2306.08543.
    """
    log_q, log_p = _log_probs_pair(student_logits, teacher_logits)
    return _kl(log_q, log_p, _log_ratio(teacher_logits, student_logits))


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
    log_q, log_p = _log_probs_pair(student_logits, teacher_logits)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def tvd(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Total variation distance, ``0.5 sum |p - q|``, in [0, 1].

    Args and result as in the module's docstring.

    Reference: Wen et al., "f-distill", arXiv 2307.15190.
    """
    log_q, log_p = _log_probs_pair(student_logits, teacher_logits)
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
    _check_skew(skew)
    if skew == 0.0:
        return forward_kl(student_logits, teacher_logits)
    log_q, log_p = _log_probs_pair(student_logits, teacher_logits)
    return _kl(log_p, torch.logaddexp(log_q + math.log1p(-skew), log_p + math.log(skew)))


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
    _check_skew(skew)
    if skew == 0.0:
        return reverse_kl(student_logits, teacher_logits)
    log_q, log_p = _log_probs_pair(student_logits, teacher_logits)
    return _kl(log_q, torch.logaddexp(log_p + math.log1p(-skew), log_q + math.log(skew)))


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
    _check_powers(alpha, beta)
    log_q, log_p = _log_probs_pair(student_logits, teacher_logits)
    return _with_slope(ab_divergence(log_p, log_q, _log_ratio(teacher_logits, student_logits), alpha, beta), log_q)


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
    _check_mixture(mixture)
    if not 0.0 <= share < 1.0:
        raise ValueError(f"share must lie in [0, 1), got {share}: at 1 the mixture is the teacher, whatever q is")
    _check_powers(alpha, beta)
    _require_same_shape(student_logits, teacher_logits)
    if share == 0.0:
        return abkd(student_logits, teacher_logits, alpha=alpha, beta=beta)
    log_r, _, log_ratio = _mixture_of_logits(student_logits, teacher_logits, mixture, share)
    return _with_slope(ab_divergence(_log_probs(teacher_logits.detach()), log_r, log_ratio, alpha, beta), log_r)


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
    log_q, log_p = _log_probs_pair(student_logits, teacher_logits)
    with torch.no_grad():
        log_ratio = _log_ratio(teacher_logits, student_logits)
        # max(p, q) (1 - exp(-|log p - log q|)) is |p - q| to the last digit where the two are close.
        gap = torch.maximum(log_p, log_q).exp() * -torch.expm1(-log_ratio.abs())
        head_gap, total_gap = (gap * _head(log_p.exp(), head_mass)).sum(-1), gap.sum(-1)
        head_weight = torch.where(total_gap > 0, head_gap / total_gap, 0.5)
    return head_weight * _kl(log_p, log_q, -log_ratio) + (1 - head_weight) * _kl(log_q, log_p, log_ratio)


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
    _check_temperature(temperature)
    _require_same_shape(student_logits, teacher_logits)
    if labels.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"labels {tuple(labels.shape)} are not one for each of the logits {tuple(student_logits.shape)}"
        )
    label_q, others_q, _ = _split_off(student_logits, labels)
    label_p, others_p, has_others = _split_off(teacher_logits.detach(), labels)
    log_odds_q, log_odds_p = (
        torch.cat([label / temperature, _normaliser(others / temperature)], -1)
        for label, others in ((label_q, others_q), (label_p, others_p))
    )
    label_part = forward_kl(log_odds_q, log_odds_p)
    others_part = torch.where(has_others, _softened_kl(others_q, others_p, temperature), 0.0)
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
        _check_temperature(temperature)
    _require_same_shape(student_logits, teacher_logits)
    return temperature**2 * _softened_kl(student_logits, teacher_logits.detach(), temperature)


def _check_skew(skew: float) -> None:
    if not 0.0 <= skew < 1.0:
        raise ValueError(f"skew must lie in [0, 1), got {skew}: at 1 the two arguments of the divergence are equal")


def _check_mixture(mixture: float) -> None:
    if not math.isfinite(mixture):
        raise ValueError(f"mixture must be a finite number, got {mixture}")


def _check_powers(alpha: float, beta: float) -> None:
    if not all(power == 0.0 or 1e-3 <= power < math.inf for power in (alpha, beta)) or alpha == beta == 0.0:
        # A smaller one would be divided by, and leave no digit.
        raise ValueError(f"alpha and beta must be 0 or at least 0.001, and not both 0, got {alpha} and {beta}")


def _check_temperature(temperature: float) -> None:
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive number, got {temperature}")


def _head(probs: Tensor, head_mass: float) -> Tensor:
    """Where the entries are such that all likelier ones together have less than `head_mass`."""
    falling = probs.sort(-1, descending=True).values
    last = (falling.cumsum(-1) < head_mass).sum(-1, keepdim=True).clamp(max=probs.shape[-1] - 1)
    return probs >= falling.gather(-1, last)


def _split_off(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The label's logit, the others' in float32 with their maximum at 0, and whether there is another token at all."""
    index = labels.unsqueeze(-1)
    logits = logits.float().clamp(min=_LOG_ZERO)
    others = logits.scatter(-1, index, _LOG_ZERO)
    top = others.detach().amax(-1, keepdim=True)
    return logits.gather(-1, index) - top, others - top, (top > _LOG_ZERO / 2).squeeze(-1)


def _softened_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor) -> Tensor:
    """``KL(p_T || q_T)``, with a gradient for all three."""
    # Times T, so that an entry that is no token is not -inf after the division where T is tiny.
    floor = _LOG_ZERO * (temperature.detach() if isinstance(temperature, Tensor) else temperature)
    z_q, z_p = (_centred(logits).clamp(min=floor) for logits in (student_logits, teacher_logits))
    normaliser_q, normaliser_p = _normaliser(z_q / temperature), _normaliser(z_p / temperature)
    with torch.no_grad():
        difference = (z_q - z_p) / temperature - (normaliser_q - normaliser_p)
    return _kl(z_p / temperature - normaliser_p, z_q / temperature - normaliser_q, difference)


def _kl(log_a: Tensor, log_b: Tensor, exact_difference: Tensor | None = None) -> Tensor:
    """``KL(a || b) = sum a (exp(d) - 1 - d)``, ``d = log b - log a``; see "Rounding" above.

    `exact_difference` is the value of d where it is known to more digits than ``log_b - log_a`` keeps.
    """
    a, difference = log_a.exp(), log_b - log_a
    if exact_difference is not None:
        difference = exact_difference + (difference - difference.detach())
    # Where b is far larger than a, exp(d) overflows: there the terms are summed as b - a - a d.
    near = difference.clamp(max=1.0)
    terms = torch.where(
        difference <= 1.0,
        a * (torch.expm1(near) - near),
        log_b.exp() - a - a * difference,
    )
    return terms.sum(-1)


@torch.no_grad()
def ab_divergence(log_p: Tensor, log_r: Tensor, difference: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """:func:`abkd` of p and r ``[..., V]``, ``[...]``, and its derivatives on ``log r``, ``[..., V]``.

    `difference` is ``d = log p - log r``, known to more digits than theirs keeps. A term is the larger one's power
    alpha + beta times a function of ``x = -|d|``, in which nothing overflows. Where that is p, the powers are
    exchanged, because the divergence of p from r is that of r from p with them exchanged. With ``h(u) = (exp(u x) - 1)
    / u``, x for u = 0, the function is ``(exp(alpha x) h(beta) - h(alpha)) / (alpha + beta)``; near each other, both h
    have x taken off, as in "Rounding" above. Terms are never negative.
    """
    x, p_is_larger, small = -difference.abs(), difference > 0, 0.25 if log_p.dtype == torch.float32 else 0.005

    def power(u: float) -> tuple[Tensor, Tensor, Tensor]:  # u x; h(u); h(u) - x
        y = u * x
        if u == 0.0:
            return y, x, y
        series = y * y / 2 * (1 + y / 3 * (1 + y / 4 * (1 + y / 5 * (1 + y / 6))))
        return y, torch.expm1(y) / u, torch.where(y > -small, series, torch.expm1(y) - y) / u

    def exchanged(of_alpha: Tensor, of_beta: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(p_is_larger, of_beta, of_alpha), torch.where(p_is_larger, of_alpha, of_beta)

    (y, _), (h_a, h_b), (less_a, less_b) = map(exchanged, power(alpha), power(beta))
    h_b_then = y.exp() * h_b
    is_near = x * max(alpha, beta) > -1.0
    terms = torch.where(is_near, less_b - less_a + torch.expm1(y) * h_b, h_b_then - h_a)
    larger = ((alpha + beta) * torch.maximum(log_p, log_r)).exp()
    return (larger * terms).sum(-1) / (alpha + beta), larger * torch.where(p_is_larger, h_b_then, -h_a)


def _with_slope(value_and_slope: tuple[Tensor, Tensor], log_r: Tensor) -> Tensor:
    """The value ``[...]``, with that derivative on ``log r``."""
    value, slope = value_and_slope
    return value + (slope * (log_r - log_r.detach())).sum(-1)


def alpha_mixture(
    log_q: Tensor, log_p: Tensor, gap: Tensor, mixture: float, share: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``log r`` of :func:`amid`, and ``log q - log r`` and ``log p - log r`` to the last digit where they are close.

    `gap` is ``log p - log q``. With ``a = (1 - mixture) / 2``, and the larger of ``p^a`` and ``q^a`` taken out, nothing
    overflows.
    """
    a = (1 - mixture) / 2
    if a == 0.0:
        log_mean, from_q, from_p = share * log_p + (1 - share) * log_q, share * gap, (share - 1) * gap
    else:
        p_is_larger, x, share = a * gap > 0, (a * gap).abs(), torch.as_tensor(share, dtype=gap.dtype, device=gap.device)
        larger, smaller = torch.where(p_is_larger, share, 1 - share), torch.where(p_is_larger, 1 - share, share)
        near = torch.log1p(smaller * torch.expm1(-x.clamp(max=1.0)))
        less = torch.where(x <= 1.0, near, torch.logaddexp(larger.log(), smaller.log() - x)) / a
        from_q, from_p = torch.where(p_is_larger, gap + less, less), torch.where(p_is_larger, less, less - gap)
        # On top of the smaller step: where one side masks an entry, its logarithm only stands in for -inf.
        log_mean = torch.where(from_q.abs() < from_p.abs(), log_q + from_q, log_p + from_p)
    normaliser = log_mean.logsumexp(-1, keepdim=True)
    return log_mean - normaliser, normaliser - from_q, normaliser - from_p


def _mixture_of_logits(
    student_logits: Tensor, teacher_logits: Tensor, mixture: float, share: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    log_q, log_p = _log_probs_pair(student_logits, teacher_logits)
    gap = log_p - log_q
    return alpha_mixture(
        log_q, log_p, _log_ratio(teacher_logits, student_logits) + (gap - gap.detach()), mixture, share
    )


@torch.no_grad()
def _log_ratio(numerator_logits: Tensor, denominator_logits: Tensor) -> Tensor:
    """``log a - log b`` from the gap of the logits, to the last digit where they are close."""
    z_a, z_b = _centred(numerator_logits), _centred(denominator_logits)
    return (z_a - z_b) - (_normaliser(z_a) - _normaliser(z_b))


def _mixed(z_q: Tensor, z_p: Tensor, t: float | Tensor) -> Tensor:
    return (1 - t) * z_q + t * z_p


def _log_probs_pair(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    _require_same_shape(student_logits, teacher_logits)
    return _log_probs(student_logits), _log_probs(teacher_logits.detach())


def _log_probs(logits: Tensor) -> Tensor:
    centred = _centred(logits)
    return centred - _normaliser(centred)


def _normaliser(centred: Tensor) -> Tensor:
    # logsumexp sums pairwise where log_softmax adds up 151,936 terms in a row: ten times less rounding on CPU.
    return centred.logsumexp(-1, keepdim=True)


def _centred(logits: Tensor) -> Tensor:
    """Logits in float32 with their maximum at 0, so that mixing loses no digits to a common offset."""
    logits = logits.float().clamp(min=_LOG_ZERO)
    return logits - logits.detach().amax(-1, keepdim=True)


def _require_same_shape(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} differ in "
            "shape; where only the padding of the vocabulary differs, take the shared ids of both "
            "(taid.models.vocabulary)"
        )
