"""One battery for all objectives, held against the papers' formulas in float64 and in log space."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from taid.losses.objectives import (
    abkd,
    adaptive_kl,
    amid,
    ctkd,
    dkd,
    forward_kl,
    interpolated_log_probs,
    jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    taid,
    tvd,
)

INF = math.inf
MASKED = [1, 4, 11]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On tensors as small as these, waking a second thread takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def reference_kl(log_a, log_b):
    return torch.where(log_a == -INF, 0.0, log_a.exp() * (log_a - log_b)).sum(-1)


def reference_mixture(log_a, log_b, share_of_a):
    return torch.logaddexp(log_a + math.log(share_of_a), log_b + math.log(1 - share_of_a))


def reference_alpha_mixture(log_q, log_p, mixture, share):
    """AMiD, eq. of the alpha-mixture: f(u) = u^((1 - alpha) / 2), f^-1 of the mean of f(p) and f(q), normalised."""
    a = (1 - mixture) / 2
    if a == 0:
        return torch.log_softmax(share * log_p + (1 - share) * log_q, -1)
    mean = torch.logaddexp(math.log(share) + a * log_p, math.log(1 - share) + a * log_q) / a
    is_nothing = log_q.isneginf() | log_p.isneginf() if a < 0 else log_q.isneginf() & log_p.isneginf()
    return torch.log_softmax(mean.masked_fill(is_nothing, -INF), -1)


def reference_target(log_q, log_p, t, mixture=1.0):
    return reference_alpha_mixture(log_q.detach(), log_p, mixture, t)


def reference_taid(log_q, log_p, t, mixture=1.0):
    return reference_kl(reference_target(log_q, log_p, t, mixture), log_q)


def reference_abkd(log_p, log_q, alpha, beta):
    """ABKD, eq. 3, with its limits (Cichocki et al. 2011, eq. 10)."""
    if alpha == 0 or beta == 0:
        power, log_a, log_b = (beta, log_q, log_p) if alpha == 0 else (alpha, log_p, log_q)
        ratio = torch.where(log_a == -INF, 0.0, power * (log_a - log_b))
        return ((power * log_a).exp() * (ratio - 1) + (power * log_b).exp()).sum(-1) / power**2
    both = alpha + beta
    own = alpha / both * (both * log_p).exp() + beta / both * (both * log_q).exp()
    return (own - (alpha * log_p + beta * log_q).exp()).sum(-1) / (alpha * beta)


def reference_amid(log_q, log_p, mixture, share, alpha, beta):
    return reference_abkd(log_p, reference_alpha_mixture(log_q, log_p, mixture, share), alpha, beta)


def reference_jsd(log_q, log_p, beta):
    log_m = reference_mixture(log_p, log_q, beta)
    return beta * reference_kl(log_p, log_m) + (1 - beta) * reference_kl(log_q, log_m)


def reference_adaptive_kl(log_q, log_p, head_mass):
    q, p = log_q.detach().exp(), log_p.exp()
    rising = p.sort(-1).values
    mass_of_likelier = rising.flip(-1).cumsum(-1).flip(-1)
    mass_of_likelier = torch.cat([mass_of_likelier, torch.zeros_like(p[..., :1])], -1)
    head = mass_of_likelier.gather(-1, torch.searchsorted(rising, p.contiguous(), right=True)) < head_mass
    gap = (p - q).abs()
    head_weight = torch.where(gap.sum(-1) > 0, (gap * head).sum(-1) / gap.sum(-1), 0.5)
    return head_weight * reference_kl(log_p, log_q) + (1 - head_weight) * reference_kl(log_q, log_p)


def at_temperature(log_probs, temperature):
    return torch.log_softmax(log_probs / temperature, -1)


def reference_dkd(log_q, log_p, labels, alpha, beta, temperature):
    log_q, log_p = at_temperature(log_q, temperature), at_temperature(log_p, temperature)
    is_label = torch.arange(log_q.shape[-1]) == labels[..., None]

    def binary_and_others(log_probs):
        others = log_probs.masked_fill(is_label, -INF)
        binary = torch.stack([log_probs.gather(-1, labels[..., None])[..., 0], others.logsumexp(-1)], -1)
        return binary, torch.log_softmax(others, -1)

    binary_q, others_q = binary_and_others(log_q)
    binary_p, others_p = binary_and_others(log_p)
    label_part = reference_kl(binary_p, binary_q)
    # -inf - -inf is NaN also in the branch that `where` leaves out, and its gradient with it.
    others_part = reference_kl(others_p.masked_fill(is_label, -INF), others_q.masked_fill(is_label, 0.0))
    return temperature**2 * (alpha * label_part + beta * others_part)


def reference_ctkd(log_q, log_p, temperature):
    return temperature**2 * reference_kl(at_temperature(log_p, temperature), at_temperature(log_q, temperature))


def dkd_on_the_teachers_favourite(student_logits, teacher_logits, **parameters):
    return dkd(student_logits, teacher_logits, teacher_logits.argmax(-1), **parameters)


def dkd_on_the_students_favourite(student_logits, teacher_logits, **parameters):
    return dkd(student_logits, teacher_logits, student_logits.argmax(-1), **parameters)


@dataclass(frozen=True)
class Case:
    """An objective of student and teacher logits, its formula on log q and log p, and its largest possible value."""

    objective: Callable
    reference: Callable
    upper: float = INF
    amplifies: float = 1.0  # the rounding of a log-probability


def entropy(share):
    return -share * math.log(share) - (1 - share) * math.log(1 - share)


CASES = {
    **{f"taid({t})": Case(partial(taid, t=t), partial(reference_taid, t=t)) for t in (0.1, 0.4, 0.9, 1.5)},
    "forward_kl": Case(forward_kl, lambda log_q, log_p: reference_kl(log_p, log_q)),
    "reverse_kl": Case(reverse_kl, lambda log_q, log_p: reference_kl(log_q, log_p)),
    **{f"jsd({b})": Case(partial(jsd, beta=b), partial(reference_jsd, beta=b), entropy(b)) for b in (0.1, 0.5)},
    "tvd": Case(tvd, lambda log_q, log_p: 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1), 1.0),
    "skew_forward_kl(0.1)": Case(
        partial(skew_forward_kl, skew=0.1),
        lambda log_q, log_p: reference_kl(log_p, reference_mixture(log_p, log_q, 0.1)),
        -math.log(0.1),
    ),
    "skew_reverse_kl(0.1)": Case(
        partial(skew_reverse_kl, skew=0.1),
        lambda log_q, log_p: reference_kl(log_q, reference_mixture(log_q, log_p, 0.1)),
        -math.log(0.1),
    ),
    **{
        f"adaptive_kl({mass})": Case(
            partial(adaptive_kl, head_mass=mass), partial(reference_adaptive_kl, head_mass=mass)
        )
        for mass in (0.5, 0.9)
    },
    "dkd": Case(
        dkd_on_the_teachers_favourite,
        lambda log_q, log_p: reference_dkd(log_q, log_p, log_p.argmax(-1), alpha=1.0, beta=8.0, temperature=4.0),
    ),
    "dkd(2, 0.5, 1.5)": Case(
        partial(dkd_on_the_students_favourite, alpha=2.0, beta=0.5, temperature=1.5),
        lambda log_q, log_p: reference_dkd(log_q, log_p, log_q.argmax(-1), alpha=2.0, beta=0.5, temperature=1.5),
    ),
    **{f"ctkd({T})": Case(partial(ctkd, temperature=T), partial(reference_ctkd, temperature=T)) for T in (0.7, 15.6)},
    **{
        f"taid({t}, mixture={m})": Case(
            partial(taid, t=t, mixture=m),
            partial(reference_taid, t=t, mixture=m),
        )
        for t, m in ((0.4, -1.0), (0.4, 0.5), (0.9, -5.0))
    },
    **{
        f"abkd({a}, {b})": Case(
            partial(abkd, alpha=a, beta=b),
            lambda log_q, log_p, a=a, b=b: reference_abkd(log_p, log_q, a, b),
            amplifies=1 / a if a else 1.0,
        )
        for a, b in ((0.2, 0.7), (0.5, 0.5), (0.0, 0.8), (0.6, 0.0), (1.0, 1.0))
    },
    **{
        f"amid({', '.join(map(str, given))})": Case(
            partial(amid, **dict(zip(("mixture", "share", "alpha", "beta"), given, strict=True))),
            lambda log_q, log_p, given=given: reference_amid(log_q, log_p, *given),
            amplifies=1 / given[2] if given[2] else 1.0,
        )
        for given in ((0.5, 0.5, 0.2, 0.7), (1.0, 0.1, 1.0, 0.0), (-1.0, 0.1, 0.0, 1.0), (-5.0, 0.5, 0.2, 0.7))
    },
}

# Beside forward and reverse KL, on which there are tests of their own.
INFINITE_WHERE_THE_STUDENT_IS_ZERO = [name for name in CASES if "mixture=" in name] + [
    "taid(1.5)",
    "abkd(0.6, 0.0)",
    "amid(1.0, 0.1, 1.0, 0.0)",
]
INFINITE_WHERE_THE_TEACHER_IS_ZERO = ["abkd(0.0, 0.8)", "amid(-1.0, 0.1, 0.0, 1.0)"]

every_objective = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def only(*names):
    return pytest.mark.parametrize("case", [CASES[name] for name in names], ids=names)


def without(*names):
    return only(*(name for name in CASES if name not in names))


def random_logits(*shape, scale=3.0, noise=None, seed=0):
    """A student's and a teacher's logits, independent of each other or, given `noise`, as near as that."""
    generator = torch.Generator().manual_seed(seed)
    teacher_logits = scale * torch.randn(shape, generator=generator)
    student_logits = torch.randn(shape, generator=generator)
    student_logits = scale * student_logits if noise is None else teacher_logits + noise * student_logits
    return student_logits, teacher_logits


def value_and_gradient(objective, student_logits, teacher_logits):
    student_logits = student_logits.clone().requires_grad_()
    loss = objective(student_logits, teacher_logits)
    loss.sum().backward()
    return loss.detach(), student_logits.grad


def truth(case, student_logits, teacher_logits):
    """Value and gradient in float64; columns where the student has -inf are probability zero and constant."""
    kept = (student_logits > -INF).flatten(0, -2).all(0).nonzero().flatten()
    log_p = torch.log_softmax(teacher_logits.double(), -1)
    student_logits = student_logits.double().requires_grad_()
    log_q = torch.full_like(log_p, -INF).index_copy(-1, kept, torch.log_softmax(student_logits[..., kept], -1))
    value = case.reference(log_q, log_p)
    value.sum().backward()
    return value.detach(), student_logits.grad


def relative_error(actual, expected):
    return ((actual.double() - expected) / expected).abs().max().item()


def relative_error_of_tokens(actual, expected):
    """The largest error of a token's vector, by the Euclidean norm."""
    return ((actual.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


# On few entries a token can be all but certain, and its loss or gradient far smaller than the terms it is made of.
@pytest.mark.parametrize(("tokens", "V", "bound"), [(24, 7, 5e-6), (6, 507, 2e-6), (4, 2_051, 2e-6), (1, 32_003, 2e-6)])
@every_objective
def test_the_value_equals_the_float64_formula_on_ordinary_logits(case, tokens, V, bound):
    student_logits, teacher_logits = random_logits(tokens, V)

    value = case.objective(student_logits, teacher_logits)

    assert value.dtype == torch.float32
    assert relative_error(value, truth(case, student_logits, teacher_logits)[0]) <= bound


@pytest.mark.parametrize(("tokens", "V", "bound"), [(24, 7, 5e-4), (6, 507, 5e-5), (4, 2_051, 2e-5), (1, 32_003, 2e-5)])
@without("tvd")
def test_the_gradient_equals_that_of_the_float64_formula_on_ordinary_logits(case, tokens, V, bound):
    student_logits, teacher_logits = random_logits(tokens, V)

    _, gradient = value_and_gradient(case.objective, student_logits, teacher_logits)

    assert relative_error_of_tokens(gradient, truth(case, student_logits, teacher_logits)[1]) <= bound


@pytest.mark.parametrize("noise", [None, 0.01])
@pytest.mark.parametrize(("tokens", "V"), [(24, 7), (6, 507), (4, 2_051), (1, 32_003)])
@only("tvd")
def test_the_gradient_of_tvd_equals_that_of_the_float64_formula_wherever_p_and_q_differ_by_more_than_rounding(
    case, tokens, V, noise
):
    student_logits, teacher_logits = random_logits(tokens, V, noise=noise)
    log_q, log_p = (torch.log_softmax(logits.double(), -1) for logits in (student_logits, teacher_logits))

    _, gradient = value_and_gradient(case.objective, student_logits, teacher_logits)

    _, expected_gradient = truth(case, student_logits, teacher_logits)
    differ = (log_p - log_q).abs() > 4e-6
    assert differ.float().mean() > 0.99
    # An entry inside a tie gets the other sign of q / 2, and shifts the rest by q times that.
    shift = log_q.exp() * (log_q.exp() * ~differ).sum(-1, keepdim=True)
    error = (gradient.double() - expected_gradient).abs()
    assert (error <= 1e-5 * expected_gradient.abs() + 1e-6 * log_q.exp() + shift)[differ].all()


@pytest.mark.parametrize(("tokens", "V"), [(24, 507), (8, 2_051), (2, 32_003)])
@without("tvd")
def test_a_kl_keeps_a_relative_error_below_1e_4_on_a_student_very_near_to_the_teacher(case, tokens, V):
    student_logits, teacher_logits = random_logits(tokens, V, noise=0.01)

    value = case.objective(student_logits, teacher_logits)

    assert relative_error(value, truth(case, student_logits, teacher_logits)[0]) <= 1e-4


@pytest.mark.parametrize(("tokens", "V"), [(24, 7), (6, 507), (4, 2_051), (1, 32_003)])
@only("tvd")
def test_tvd_has_an_absolute_error_below_5e_7_on_a_student_very_near_to_the_teacher(case, tokens, V):
    # exp(log p) carries the rounding of log p, half a unit in the last place of 8 to 16: 4.8e-7 of p.
    student_logits, teacher_logits = random_logits(tokens, V, noise=0.01)

    value = case.objective(student_logits, teacher_logits)

    assert_close(value.double(), truth(case, student_logits, teacher_logits)[0], rtol=0, atol=5e-7)


@pytest.mark.parametrize(("tokens", "V"), [(24, 507), (8, 2_051)])
@without("tvd")
def test_the_gradient_is_right_to_0_17_percent_on_a_student_very_near_to_the_teacher(case, tokens, V):
    # What mixing float32 logits in float32 costs.
    student_logits, teacher_logits = random_logits(tokens, V, noise=0.01)

    _, gradient = value_and_gradient(case.objective, student_logits, teacher_logits)

    assert relative_error_of_tokens(gradient, truth(case, student_logits, teacher_logits)[1]) <= 1.7e-3


@pytest.mark.parametrize("scale", [3.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_objective
def test_half_precision_logits_give_the_float32_result_of_the_same_rounded_logits(case, dtype, scale):
    student_logits, teacher_logits = (logits.to(dtype) for logits in random_logits(4, 507, scale=scale))

    value, gradient = value_and_gradient(case.objective, student_logits, teacher_logits)

    expected_value, expected_gradient = value_and_gradient(
        case.objective, student_logits.float(), teacher_logits.float()
    )
    assert value.isfinite().all()
    assert torch.equal(value, expected_value)
    assert torch.equal(gradient, expected_gradient.to(dtype))


@every_objective
def test_the_teacher_gets_no_gradient(case):
    student_logits, teacher_logits = random_logits(4, 33)

    value_and_gradient(case.objective, student_logits, teacher_logits.requires_grad_())

    assert teacher_logits.grad is None
    assert not case.objective(student_logits, teacher_logits).requires_grad


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9, 1.5, 2.0])
def test_the_gradient_of_taid_is_that_of_the_renyi_divergence_of_order_t(t):
    z_q, z_p = random_logits(5, 507)

    def renyi(student_logits, teacher_logits):
        log_q, log_p = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
        return torch.logsumexp(t * log_p + (1 - t) * log_q, -1) / (t - 1)

    _, expected = value_and_gradient(renyi, z_q.double(), z_p.double())
    _, gradient = value_and_gradient(partial(taid, t=t), z_q, z_p)
    assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.4, 0.9, 1.0, 1.5, 2.0])
def test_the_gradient_of_taid_is_q_minus_p_t_and_its_target_is_the_mixture_of_logits(t):
    student_logits, teacher_logits = random_logits(5, 507)
    z_q, z_p = student_logits.double(), teacher_logits.double()
    p_t = torch.softmax((1 - t) * z_q + t * z_p, -1)

    _, gradient = value_and_gradient(partial(taid, t=t), student_logits, teacher_logits)
    log_p_t = interpolated_log_probs(student_logits.requires_grad_(), teacher_logits, t=t)

    assert_close(gradient.double(), torch.softmax(z_q, -1) - p_t, rtol=1e-5, atol=1e-7)
    assert_close(log_p_t.double(), p_t.log(), rtol=1e-6, atol=1e-6)
    assert not log_p_t.requires_grad


@pytest.mark.parametrize("scale", [3.0, 100.0, 1e4])
@pytest.mark.parametrize("t", [0.0, 0.1, 0.4, 0.9, 1.0])
def test_the_probabilities_of_the_target_of_taid_add_up_to_one(t, scale):
    p_t = interpolated_log_probs(*random_logits(64, 33, scale=scale), t=t).double().exp()

    assert_close(p_t.sum(-1), torch.ones(64, dtype=torch.float64), rtol=0, atol=1e-6)


LOG_2, LOG_3 = math.log(2), math.log(3)
ROOT_3 = math.sqrt(3)
COIN, BIASED = (0.5, 0.5), (0.25, 0.75)
FRONT, BACK = (0.5, 0.25, 0.25), (0.25, 0.25, 0.5)
HEADS, TAILS = (1.0, 0.0), (0.0, 1.0)
STEEP = (0.125, 0.125, 0.75)


def dkd_on_the_first(student_logits, teacher_logits, **parameters):
    return dkd(student_logits, teacher_logits, torch.tensor(0), **parameters)


@pytest.mark.parametrize(
    ("objective", "teacher_probs", "student_probs", "expected"),
    [
        (forward_kl, COIN, BIASED, LOG_2 - LOG_3 / 2),
        (reverse_kl, COIN, BIASED, 0.75 * LOG_3 - LOG_2),
        (
            partial(jsd, beta=0.5),
            COIN,
            BIASED,
            (math.log(4 / 3) + math.log(4 / 5)) / 4 + (math.log(2 / 3) + 3 * math.log(6 / 5)) / 8,
        ),
        (tvd, COIN, BIASED, 0.25),
        (partial(skew_forward_kl, skew=0.1), COIN, BIASED, (math.log(20 / 11) + math.log(20 / 29)) / 2),
        (partial(skew_reverse_kl, skew=0.1), COIN, BIASED, (math.log(10 / 19) + 3 * math.log(10 / 7)) / 4),
        # p_t is the normalised sqrt(p q): 1 to sqrt(3).
        (
            partial(taid, t=0.5),
            COIN,
            BIASED,
            (math.log(4 / (1 + ROOT_3)) + ROOT_3 * math.log(4 * ROOT_3 / (3 * (1 + ROOT_3)))) / (1 + ROOT_3),
        ),
        (forward_kl, FRONT, BACK, LOG_2 / 4),
        (reverse_kl, FRONT, BACK, LOG_2 / 4),
        (partial(jsd, beta=0.5), FRONT, BACK, math.log(4 / 3) / 2 + math.log(2 / 3) / 4),
        (tvd, FRONT, BACK, 0.25),
        (forward_kl, HEADS, COIN, LOG_2),
        (reverse_kl, COIN, HEADS, LOG_2),
        (tvd, HEADS, COIN, 0.5),
        (partial(skew_forward_kl, skew=0.1), HEADS, COIN, math.log(1 / 0.55)),
        (partial(skew_reverse_kl, skew=0.1), COIN, HEADS, math.log(1 / 0.55)),
        (tvd, HEADS, TAILS, 1.0),
        (partial(jsd, beta=0.1), HEADS, TAILS, 0.1 * math.log(10) + 0.9 * math.log(10 / 9)),
        (partial(skew_forward_kl, skew=0.1), HEADS, TAILS, math.log(10)),
        (partial(skew_reverse_kl, skew=0.25), HEADS, TAILS, math.log(4)),
        # The head is the first token: gaps of 3/8 there and 5/8 in the tail.
        (
            partial(adaptive_kl, head_mass=0.4),
            FRONT,
            STEEP,
            (3 * (1.25 * LOG_2 - LOG_3 / 4) + 5 * (0.75 * LOG_3 - 0.375 * LOG_2)) / 8,
        ),
        # The second token reaches the mass, and the third is as likely: the head is all of them.
        (partial(adaptive_kl, head_mass=0.6), FRONT, STEEP, 1.25 * LOG_2 - LOG_3 / 4),
        (partial(adaptive_kl, head_mass=0.1), COIN, BIASED, LOG_2 - LOG_3 / 2),
        # Label against the rest: (1/2, 1/2) and (1/4, 3/4). The rest: (1/2, 1/2) and (1/3, 2/3).
        (
            partial(dkd_on_the_first, alpha=2.0, beta=3.0, temperature=1.0),
            FRONT,
            BACK,
            2 * (LOG_2 - LOG_3 / 2) + 3 * (LOG_3 - 1.5 * LOG_2),
        ),
        # At T = 1/2 the probabilities are as 4 to 1 to 1 and 1 to 1 to 4.
        (
            partial(dkd_on_the_first, alpha=2.0, beta=3.0, temperature=0.5),
            FRONT,
            BACK,
            ((4 * math.log(4) + 2 * math.log(2 / 5)) / 3 + 1.5 * (math.log(5 / 2) + math.log(5 / 8))) / 4,
        ),
        (partial(dkd_on_the_first, alpha=1.0, beta=1.0, temperature=1.0), HEADS, COIN, LOG_2),
        # At T = 1/2 the student's are as 1 to 9.
        (partial(ctkd, temperature=0.5), COIN, BIASED, (math.log(5) - LOG_3) / 4),
        (partial(ctkd, temperature=torch.tensor(0.5)), COIN, BIASED, (math.log(5) - LOG_3) / 4),
    ],
)
def test_tiny_distributions_have_the_values_computed_by_hand(objective, teacher_probs, student_probs, expected):
    loss = objective(torch.tensor(student_probs).log(), torch.tensor(teacher_probs).log())

    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=0)


@pytest.mark.parametrize("scale", [3.0, 1e4])
@every_objective
def test_equal_logits_have_neither_loss_nor_gradient(case, scale):
    _, logits = random_logits(6, 507, scale=scale)

    value, gradient = value_and_gradient(case.objective, logits, logits)

    assert_close(value, torch.zeros(6), rtol=0, atol=1e-12)
    assert_close(gradient, torch.zeros(6, 507), rtol=0, atol=2e-7)


def masked(logits):
    return logits.index_fill(-1, torch.tensor(MASKED), -INF)


FAR = random_logits(5, 33)
EXTREME = random_logits(5, 33, scale=1e4, seed=1)
KINDS_OF_LOGITS = {
    "ordinary": FAR,
    "near": random_logits(5, 33, noise=0.01),
    "extreme": EXTREME,
    "masked on both sides": (masked(FAR[0]), masked(FAR[1])),
    "masked by the teacher": (FAR[0], masked(FAR[1])),
    "masked by the student": (masked(FAR[0]), FAR[1]),
    "extreme and masked on both sides": (masked(EXTREME[0]), masked(EXTREME[1])),
    "extreme and masked by the teacher": (EXTREME[0], masked(EXTREME[1])),
    "extreme and masked by the student": (masked(EXTREME[0]), EXTREME[1]),
}
every_kind_of_logits = pytest.mark.parametrize(
    ("student_logits", "teacher_logits"), KINDS_OF_LOGITS.values(), ids=KINDS_OF_LOGITS
)


@pytest.mark.parametrize("t", [1, 1.0, torch.tensor(1.0)], ids=repr)
@every_kind_of_logits
def test_taid_at_t_1_is_forward_kl_bit_for_bit(student_logits, teacher_logits, t):
    value, gradient = value_and_gradient(partial(taid, t=t), student_logits, teacher_logits)

    expected_value, expected_gradient = value_and_gradient(forward_kl, student_logits, teacher_logits)
    assert torch.equal(value, expected_value)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("t", [0, 0.0, torch.tensor(0.0)], ids=repr)
@every_kind_of_logits
def test_taid_at_t_0_has_exactly_zero_loss_and_gradient(student_logits, teacher_logits, t):
    value, gradient = value_and_gradient(partial(taid, t=t), student_logits, teacher_logits)

    assert torch.equal(value, torch.zeros_like(value))
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("t", [0.0, 0.1, 0.25, 0.4, 0.5, 0.9, 1.0])
def test_t_as_a_tensor_is_t_as_a_number(t):
    value, gradient = value_and_gradient(partial(taid, t=t), *FAR)

    exact = value_and_gradient(partial(taid, t=torch.tensor(t, dtype=torch.float64)), *FAR)
    rounded = value_and_gradient(partial(taid, t=torch.tensor(t)), *FAR)
    assert torch.equal(exact[0], value)
    assert torch.equal(exact[1], gradient)
    assert_close(rounded[0], value, rtol=5e-6, atol=0)
    assert_close(rounded[1], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("head_mass", [0.1, 0.5, 0.9])
@every_kind_of_logits
def test_adaptive_kl_lies_between_forward_and_reverse_kl(student_logits, teacher_logits, head_mass):
    value = adaptive_kl(student_logits, teacher_logits, head_mass=head_mass)

    both = torch.stack([forward_kl(student_logits, teacher_logits), reverse_kl(student_logits, teacher_logits)])
    assert (value >= both.amin(0) * (1 - 1e-6)).all()
    assert (value <= both.amax(0) * (1 + 1e-6)).all()


@pytest.mark.parametrize("head_mass", [0.1, 0.5, 0.9])
def test_tokens_that_the_teacher_holds_equally_likely_are_all_in_the_head_or_all_in_the_tail(head_mass):
    student_logits, teacher_logits = random_logits(64, 33, scale=1.5)
    teacher_logits = teacher_logits.round()
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0))

    value = adaptive_kl(student_logits, teacher_logits, head_mass=head_mass)
    reordered = adaptive_kl(student_logits[:, order], teacher_logits[:, order], head_mass=head_mass)

    log_q, log_p = (torch.log_softmax(logits.double(), -1) for logits in (student_logits, teacher_logits))
    p, gap = log_p.exp(), (log_p.exp() - log_q.exp()).abs()
    likelier = log_p[:, None, :] > log_p[:, :, None]
    head_weight = (gap * ((p[:, None, :] * likelier).sum(-1) < head_mass)).sum(-1) / gap.sum(-1)
    expected = head_weight * reference_kl(log_p, log_q) + (1 - head_weight) * reference_kl(log_q, log_p)
    assert relative_error(value, expected) <= 2e-6
    assert_close(reordered, value, rtol=1e-6, atol=0)


LABELS = torch.tensor([0, 32, 7, 1, 20])


@pytest.mark.parametrize("noise", [None, 0.01])
def test_forward_kl_is_the_labels_part_of_dkd_and_1_minus_p_of_the_label_times_that_of_the_others(noise):
    student_logits, teacher_logits = random_logits(5, 33, noise=noise)
    rest = 1 - torch.softmax(teacher_logits.double(), -1).gather(-1, LABELS[:, None])[:, 0]

    label_part, others_part = (
        dkd(student_logits, teacher_logits, LABELS, alpha=alpha, beta=1 - alpha, temperature=1.0) for alpha in (1, 0)
    )

    expected = forward_kl(student_logits, teacher_logits)
    assert_close(label_part + rest * others_part, expected.double(), rtol=2e-5, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 1.5, 4.0])
def test_dkd_equals_its_float64_formula_on_labels_of_any_probability(temperature):
    student_logits, teacher_logits = random_logits(5, 33)
    parameters = {"alpha": 1.0, "beta": 8.0, "temperature": temperature}
    case = Case(
        lambda *logits: dkd(*logits, LABELS, **parameters), lambda *logits: reference_dkd(*logits, LABELS, **parameters)
    )

    value, gradient = value_and_gradient(case.objective, student_logits, teacher_logits)

    expected_value, expected_gradient = truth(case, student_logits, teacher_logits)
    assert relative_error(value, expected_value) <= 2e-6
    assert relative_error_of_tokens(gradient, expected_gradient) <= 2e-6


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_teacher_sure_of_the_label_to_1e_30_still_teaches_how_the_rest_is_shared_out(alpha, temperature):
    student_logits, teacher_logits = random_logits(5, 33, scale=1.0)
    label = torch.zeros(33).index_fill(0, torch.tensor(0), 1.0)
    teacher_logits = teacher_logits + 74 * temperature * label
    # A student that guesses, one as sure as the teacher, and one as sure of another token.
    sides = torch.tensor([[0.0], [0.0], [1.0], [1.0], [-1.0]])
    student_logits = student_logits + 74 * temperature * sides * label
    labels = torch.zeros(5, dtype=torch.long)
    parameters = {"alpha": alpha, "beta": 8.0, "temperature": temperature}
    case = Case(
        lambda *logits: dkd(*logits, labels, **parameters), lambda *logits: reference_dkd(*logits, labels, **parameters)
    )

    value, gradient = value_and_gradient(case.objective, student_logits, teacher_logits)

    left = 1 - torch.softmax(teacher_logits.double() / temperature, -1)[:, 0]
    assert (left < 1e-15).all()  # below what 1 - p keeps in float64
    expected_value, expected_gradient = truth(case, student_logits, teacher_logits)
    assert (gradient[:, 1:].norm(dim=-1) > 0.1).all()
    assert relative_error(value, expected_value) <= 2e-6
    assert relative_error_of_tokens(gradient, expected_gradient) <= 2e-6


@pytest.mark.parametrize("label_is_masked", [False, True])
def test_dkd_has_neither_loss_nor_gradient_in_what_a_mask_leaves_no_choice_of(label_is_masked):
    only = torch.full((1, 9), -INF).index_fill(-1, torch.tensor([4]), 2.0)
    labels = torch.tensor([0 if label_is_masked else 4])

    value, gradient = value_and_gradient(lambda *logits: dkd(*logits, labels), only - 1.0, only)

    assert torch.equal(value, torch.zeros(1))
    assert torch.equal(gradient, torch.zeros(1, 9))


@pytest.mark.parametrize("shape", [(), (5, 1), (4,), (5, 33)])
def test_labels_that_are_not_one_a_token_are_refused_with_both_shapes(shape):
    labels = torch.zeros(shape, dtype=torch.long)

    with pytest.raises(ValueError, match=re.escape(f"labels {shape} are not one for each of the logits (5, 33)")):
        dkd(*FAR, labels)


@pytest.mark.parametrize("temperature", [1, 1.0, torch.tensor(1.0)], ids=repr)
@every_kind_of_logits
def test_ctkd_at_temperature_1_is_forward_kl_bit_for_bit(student_logits, teacher_logits, temperature):
    value, gradient = value_and_gradient(partial(ctkd, temperature=temperature), student_logits, teacher_logits)

    expected_value, expected_gradient = value_and_gradient(forward_kl, student_logits, teacher_logits)
    assert torch.equal(value, expected_value)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 15.6])
def test_temperature_as_a_tensor_is_temperature_as_a_number(temperature):
    value, gradient = value_and_gradient(partial(ctkd, temperature=temperature), *FAR)

    exact = value_and_gradient(partial(ctkd, temperature=torch.tensor(temperature, dtype=torch.float64)), *FAR)
    rounded = value_and_gradient(partial(ctkd, temperature=torch.tensor(temperature)), *FAR)
    assert torch.equal(exact[0], value)
    assert torch.equal(exact[1], gradient)
    assert_close(rounded[0], value, rtol=1e-6, atol=0)
    assert_close(rounded[1], gradient, rtol=1e-5, atol=1e-7)


def gradient_for_temperature(student_logits, teacher_logits, temperature):
    temperature = torch.tensor(temperature, requires_grad=True)
    ctkd(student_logits, teacher_logits, temperature=temperature).sum().backward()
    return temperature.grad.item()


@pytest.mark.parametrize("noise", [None, 0.01])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0, 15.6])
@pytest.mark.parametrize(("tokens", "V"), [(24, 7), (6, 507), (4, 2_051), (1, 32_003)])
def test_the_gradient_for_the_temperature_is_that_of_the_float64_formula(tokens, V, temperature, noise):
    student_logits, teacher_logits = random_logits(tokens, V, noise=noise)
    log_q, log_p = (torch.log_softmax(logits.double(), -1) for logits in (student_logits, teacher_logits))

    gradient = gradient_for_temperature(student_logits, teacher_logits, temperature)

    exact = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    loss = reference_ctkd(log_q, log_p, exact).sum()
    loss.backward()
    # At a high temperature T^2 and the KL all but cancel: what is left is as exact as 2 T KL, the part of T^2.
    part = 2 * loss.item() / temperature
    assert abs(gradient - exact.grad.item()) <= (1e-6 if noise is None else 1e-4) * max(part, abs(gradient))


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 15.6])
@every_kind_of_logits
def test_the_gradient_for_the_temperature_is_finite(student_logits, teacher_logits, temperature):
    assert math.isfinite(gradient_for_temperature(student_logits, teacher_logits, temperature))


def test_the_gradient_for_the_temperature_sees_neither_a_mask_on_both_sides_nor_equal_logits():
    kept = [entry for entry in range(33) if entry not in MASKED]

    gradient = gradient_for_temperature(masked(FAR[0]), masked(FAR[1]), 2.0)

    assert gradient == pytest.approx(gradient_for_temperature(FAR[0][:, kept], FAR[1][:, kept], 2.0), rel=1e-6)
    assert gradient_for_temperature(FAR[1], FAR[1], 2.0) == 0


@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-4])
def test_scaled_jsd_nears_forward_kl_as_beta_goes_to_0_and_reverse_kl_as_it_goes_to_1(distance):
    # To first order, jsd / beta = KL(p || q) - beta / 2 * sum (p - q)^2 / q; the same in p and q at the other end.
    student_logits, teacher_logits = random_logits(6, 51, scale=1.0)
    q, p = torch.softmax(student_logits.double(), -1), torch.softmax(teacher_logits.double(), -1)

    near_0 = jsd(student_logits, teacher_logits, beta=distance) / distance
    near_1 = jsd(student_logits, teacher_logits, beta=1 - distance) / distance

    slack = 1e-6
    gap_0 = (forward_kl(student_logits, teacher_logits) - near_0).double()
    gap_1 = (reverse_kl(student_logits, teacher_logits) - near_1).double()
    assert (gap_0 <= distance / 2 * ((p - q) ** 2 / q).sum(-1) + slack).all()
    assert (gap_1 <= distance / 2 * ((p - q) ** 2 / p).sum(-1) + slack).all()
    assert (torch.minimum(gap_0, gap_1) >= -slack).all()


@every_kind_of_logits
@pytest.mark.parametrize(("skewed", "plain"), [(skew_forward_kl, forward_kl), (skew_reverse_kl, reverse_kl)])
def test_skew_0_is_the_plain_kl_bit_for_bit(skewed, plain, student_logits, teacher_logits):
    value, gradient = value_and_gradient(partial(skewed, skew=0.0), student_logits, teacher_logits)

    expected_value, expected_gradient = value_and_gradient(plain, student_logits, teacher_logits)
    assert torch.equal(value, expected_value)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("skew", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("skewed", [skew_forward_kl, skew_reverse_kl])
@every_kind_of_logits
def test_a_skewed_kl_is_at_most_minus_log_skew(student_logits, teacher_logits, skewed, skew):
    assert (skewed(student_logits, teacher_logits, skew=skew) <= -math.log(skew) * (1 + 1e-6)).all()


@every_kind_of_logits
@every_objective
def test_the_loss_is_finite_and_within_its_bounds_and_the_gradient_is_finite_and_zero_on_the_students_masked_entries(
    case, student_logits, teacher_logits
):
    value, gradient = value_and_gradient(case.objective, student_logits, teacher_logits)

    assert value.isfinite().all()
    assert (value >= 0).all()
    assert (value <= case.upper * (1 + 1e-6)).all()
    assert gradient.isfinite().all()
    assert (gradient[student_logits == -INF] == 0).all()


# Of float32 between 2**15 and 2**16, where the differences between logits of 1e4 lie.
UNIT_IN_THE_LAST_PLACE = 2.0**-8


@without("taid(0.1)", "taid(0.4)", "taid(0.9)")
def test_logits_of_1e4_give_the_float64_value_and_gradient_up_to_the_rounding_of_a_logit(case):
    student_logits, teacher_logits = random_logits(64, 33, scale=1e4)

    value, gradient = value_and_gradient(case.objective, student_logits, teacher_logits)

    expected_value, expected_gradient = truth(case, student_logits, teacher_logits)
    assert_close(value.double(), expected_value, rtol=1e-6, atol=UNIT_IN_THE_LAST_PLACE)
    assert_close(gradient.double(), expected_gradient, rtol=1e-6, atol=UNIT_IN_THE_LAST_PLACE)


@pytest.mark.parametrize("t", [0.1, 0.4, 0.9])
def test_logits_of_1e4_give_taid_its_float64_value_and_gradient_up_to_the_rounding_of_the_mixed_logits(t):
    # An error e_i of log p_t moves KL(p_t || q) by sum p_t (log p_t - log q - KL) e_i: where the mixture puts on one
    # level two entries that student and teacher hold thousands of nats apart, by thousands of times the rounding.
    case = CASES[f"taid({t})"]
    student_logits, teacher_logits = random_logits(64, 33, scale=1e4)
    log_q, log_p = (torch.log_softmax(logits.double(), -1) for logits in (student_logits, teacher_logits))
    log_p_t = reference_target(log_q, log_p, t)

    value, gradient = value_and_gradient(case.objective, student_logits, teacher_logits)

    expected_value, expected_gradient = truth(case, student_logits, teacher_logits)
    sensitivity = (log_p_t.exp() * (log_p_t - log_q - expected_value[:, None]).abs()).sum(-1)
    assert ((value - expected_value).abs() <= 1e-6 * expected_value + UNIT_IN_THE_LAST_PLACE * (1 + sensitivity)).all()
    assert_close(gradient.double(), expected_gradient, rtol=1e-6, atol=UNIT_IN_THE_LAST_PLACE)


@pytest.mark.parametrize("scale", [3.0, 1e4])
@every_objective
def test_a_mask_on_both_sides_is_a_deletion(case, scale):
    student_logits, teacher_logits = random_logits(5, 33, scale=scale, seed=2)
    kept = [entry for entry in range(33) if entry not in MASKED]

    value, gradient = value_and_gradient(case.objective, masked(student_logits), masked(teacher_logits))

    expected_value, expected_gradient = value_and_gradient(
        case.objective, student_logits[:, kept], teacher_logits[:, kept]
    )
    assert_close(value, expected_value, rtol=1e-6, atol=0)
    assert_close(gradient[:, kept], expected_gradient, rtol=1e-6 * case.amplifies, atol=1e-7 * case.amplifies)
    assert (gradient[:, MASKED] == 0).all()


@without("reverse_kl", "adaptive_kl(0.5)", "adaptive_kl(0.9)", *INFINITE_WHERE_THE_TEACHER_IS_ZERO)
def test_a_mask_of_the_teacher_alone_is_probability_zero(case):
    student_logits, teacher_logits = FAR[0], masked(FAR[1])

    value, gradient = value_and_gradient(case.objective, student_logits, teacher_logits)

    expected_value, expected_gradient = truth(case, student_logits, teacher_logits)
    assert relative_error(value, expected_value) <= 5e-6
    assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-6)


@without(
    "forward_kl",
    *(name for name in CASES if name.startswith(("adaptive_kl", "dkd", "ctkd"))),
    *INFINITE_WHERE_THE_STUDENT_IS_ZERO,
)
def test_a_mask_of_the_student_alone_is_probability_zero(case):
    student_logits, teacher_logits = masked(FAR[0]), FAR[1]

    value, gradient = value_and_gradient(case.objective, student_logits, teacher_logits)

    expected_value, expected_gradient = truth(case, student_logits, teacher_logits)
    assert relative_error(value, expected_value) <= 5e-6
    assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-6)


@only(*INFINITE_WHERE_THE_STUDENT_IS_ZERO)
def test_what_is_infinite_where_the_student_masks_is_huge_and_leaves_the_masked_ids_alone(case):
    value, gradient = value_and_gradient(case.objective, masked(FAR[0]), FAR[1])

    assert (value > 1e20).all()
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert (gradient[:, MASKED] == 0).all()


@only(*INFINITE_WHERE_THE_TEACHER_IS_ZERO)
def test_what_is_infinite_where_the_teacher_masks_is_huge_and_pushes_the_student_off_it(case):
    value, gradient = value_and_gradient(case.objective, FAR[0], masked(FAR[1]))

    assert (value > 1e20).all()
    assert value.isfinite().all()
    assert (gradient[:, MASKED] > 0).all()


def test_forward_kl_to_a_student_that_masks_what_the_teacher_allows_is_huge_and_still_pulls_on_the_rest():
    student_logits, teacher_logits = masked(FAR[0]), FAR[1]

    value, gradient = value_and_gradient(forward_kl, student_logits, teacher_logits)

    difference = torch.softmax(student_logits.double(), -1) - torch.softmax(teacher_logits.double(), -1)
    assert (value > 1e20).all()
    assert_close(gradient.double(), difference.index_fill(-1, torch.tensor(MASKED), 0.0), rtol=1e-5, atol=1e-7)


def test_reverse_kl_to_a_teacher_that_masks_what_the_student_allows_is_huge_and_pushes_the_student_off_it():
    value, gradient = value_and_gradient(reverse_kl, FAR[0], masked(FAR[1]))

    assert (value > 1e20).all()
    assert (gradient[:, MASKED] > 0).all()


# Multiples of 1/64 below 16: adding a small integer to them, or taking it off again, is exact in float32.
GRID = tuple((64 * logits).round().clamp(-1_000, 1_000) / 64 for logits in FAR)


@pytest.mark.parametrize("side", ["student", "teacher"])
@every_objective
def test_adding_a_constant_to_all_logits_of_a_token_changes_nothing(case, side):
    student_logits, teacher_logits = GRID
    constants = torch.tensor([[1.0], [-7.0], [64.0], [1_000.0], [-4_096.0]])
    moved = (
        (student_logits + constants, teacher_logits)
        if side == "student"
        else (student_logits, teacher_logits + constants)
    )

    value, gradient = value_and_gradient(case.objective, *moved)

    expected_value, expected_gradient = value_and_gradient(case.objective, student_logits, teacher_logits)
    assert torch.equal(value, expected_value)
    assert torch.equal(gradient, expected_gradient)


@every_objective
def test_a_batch_is_its_rows_one_by_one(case):
    student_logits, teacher_logits = random_logits(2, 3, 507)

    value, gradient = value_and_gradient(case.objective, student_logits, teacher_logits)

    for batch in range(2):
        for position in range(3):
            row_value, row_gradient = value_and_gradient(
                case.objective, student_logits[batch, position], teacher_logits[batch, position]
            )
            assert_close(value[batch, position], row_value, rtol=1e-6, atol=0)
            assert_close(gradient[batch, position], row_gradient, rtol=1e-6, atol=1e-8)


@every_objective
def test_log_probabilities_in_the_place_of_logits_give_the_same_value(case):
    student_logits, teacher_logits = random_logits(6, 507)
    log_q, log_p = (torch.log_softmax(logits.double(), -1).float() for logits in (student_logits, teacher_logits))

    value = case.objective(student_logits, teacher_logits)

    assert_close(case.objective(log_q, teacher_logits), value, rtol=2e-6, atol=0)
    assert_close(case.objective(student_logits, log_p), value, rtol=2e-6, atol=0)
    assert_close(case.objective(log_q, log_p), value, rtol=2e-6, atol=0)


LOGIT = st.one_of(st.floats(-1e4, 1e4, width=32), st.floats(-10.0, 10.0, width=32))
PAIRS = st.lists(st.tuples(LOGIT, LOGIT), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(PAIRS)
def test_on_any_finite_logits_the_loss_is_finite_and_within_bounds_and_the_gradient_adds_up_to_zero(pairs):
    student_logits, teacher_logits = torch.tensor(pairs).T

    for case in CASES.values():
        value, gradient = value_and_gradient(case.objective, student_logits, teacher_logits)
        assert value.isfinite()
        assert 0 <= value <= case.upper * (1 + 1e-6)
        assert gradient.isfinite().all()
        # The softmax's gradient takes a sum as large as the loss off terms as large as the loss.
        assert abs(gradient.double().sum()) <= 1e-6 * (1 + value)


@pytest.mark.parametrize(
    ("objective", "named"),
    [
        *((partial(taid, t=t), f"t must lie in [0, 2], got {t}") for t in (-0.1, 2.5, math.nan)),
        *((partial(taid, t=t, mixture=-1.0), f"t must lie in [0, 1], got {t}") for t in (-0.1, 1.5)),
        *((partial(interpolated_log_probs, t=t), f"t must lie in [0, 2], got {t}") for t in (-0.1, 2.5)),
        *(
            (partial(jsd, beta=beta), f"beta must lie strictly between 0 and 1, got {beta}")
            for beta in (0.0, 1.0, -0.5)
        ),
        *((partial(skew_forward_kl, skew=skew), f"skew must lie in [0, 1), got {skew}") for skew in (1.0, -0.1)),
        *((partial(skew_reverse_kl, skew=skew), f"skew must lie in [0, 1), got {skew}") for skew in (1.0, -0.1)),
        *(
            (partial(adaptive_kl, head_mass=mass), f"head_mass must lie strictly between 0 and 1, got {mass}")
            for mass in (0.0, 1.0, -0.5, math.nan)
        ),
        *(
            (
                partial(dkd_on_the_teachers_favourite, **{name: value}),
                f"dkd's {name} must be 0 or a positive number, got {value}",
            )
            for name in ("alpha", "beta")
            for value in (-0.1, INF, math.nan)
        ),
        *(
            (partial(objective, temperature=T), f"temperature must be a positive number, got {T}")
            for objective in (ctkd, dkd_on_the_teachers_favourite)
            for T in (0.0, -1.0, INF, math.nan)
        ),
    ],
)
def test_a_parameter_out_of_range_is_refused_with_its_value(objective, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        objective(*FAR)


@every_objective
def test_logits_of_different_shapes_are_refused_with_both_shapes(case):
    with pytest.raises(ValueError, match=re.escape("student logits (2, 5) and teacher logits (2, 6) differ in shape")):
        case.objective(torch.zeros(2, 5), torch.zeros(2, 6))


def test_the_alpha_beta_divergence_is_forward_and_reverse_kl_at_its_corners():
    logits = random_logits(8, 507)

    for powers, other in (((1.0, 0.0), forward_kl), ((0.0, 1.0), reverse_kl)):
        value, gradient = value_and_gradient(partial(abkd, alpha=powers[0], beta=powers[1]), *logits)
        expected, expected_gradient = value_and_gradient(other, *logits)
        assert_close(value, expected, rtol=1e-6, atol=0)
        assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-8)


def test_the_alpha_beta_divergence_is_the_squared_euclidean_and_hellinger_distance_within():
    student_logits, teacher_logits = random_logits(8, 507)
    q, p = (logits.double().softmax(-1) for logits in (student_logits, teacher_logits))

    euclidean = abkd(student_logits, teacher_logits, alpha=1.0, beta=1.0)
    hellinger = abkd(student_logits, teacher_logits, alpha=0.5, beta=0.5)

    assert_close(euclidean.double(), ((p - q) ** 2).sum(-1) / 2, rtol=1e-5, atol=0)
    assert_close(hellinger.double(), 2 * ((p.sqrt() - q.sqrt()) ** 2).sum(-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("powers", [(1.0, 0.0), (0.0, 1.0), (0.5, 0.0), (0.0, 0.5)])
def test_the_alpha_beta_divergence_is_continuous_where_a_power_is_zero(powers):
    student_logits, teacher_logits = random_logits(8, 507)
    alpha, beta = powers

    at, near = (
        abkd(student_logits, teacher_logits, alpha=alpha + (alpha == 0) * step, beta=beta + (beta == 0) * step)
        for step in (0.0, 1e-3)
    )

    assert_close(near, at, rtol=1e-2, atol=0)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.4, 0.9, 1.0])
def test_amids_mixture_at_alpha_1_is_taids_target_and_trains_as_taid_at_that_t(t):
    """Also in the limit: the mean of powers that go to 0 is that of logarithms."""
    logits = random_logits(8, 507)
    expected, expected_gradient = value_and_gradient(partial(taid, t=t), *logits)
    target = interpolated_log_probs(*logits, t=t)

    for mixture, bound in ((1.0, 0.0), (1.0 - 1e-4, 1e-3), (1.0 + 1e-4, 1e-3)):
        value, gradient = value_and_gradient(partial(taid, t=t, mixture=mixture), *logits)
        assert_close(value, expected, rtol=bound, atol=bound * 1e-2)
        assert_close(gradient, expected_gradient, rtol=bound, atol=bound * 1e-2)
        assert_close(interpolated_log_probs(*logits, t=t, mixture=mixture), target, rtol=bound, atol=0)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_amid_compares_the_teacher_with_taids_target_at_alpha_1(share):
    logits = random_logits(8, 507)
    target = interpolated_log_probs(*logits, t=share).double()
    log_p = logits[1].double().log_softmax(-1)

    value, gradient = value_and_gradient(partial(amid, mixture=1.0, share=share, alpha=1.0, beta=0.0), *logits)

    assert_close(value.double(), reference_kl(log_p, target), rtol=1e-5, atol=0)
    assert_close(gradient.double(), (1 - share) * (target.exp() - log_p.exp()), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("mixture", [-1.0, 0.0, 0.5, 3.0])
@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("masks", [(False, False), (False, True), (True, False)], ids=str)
def test_a_target_at_the_ends_is_the_student_or_the_teacher_whatever_the_mixture(masks, share, mixture):
    logits = [masked(z) if mask else z for z, mask in zip(random_logits(8, 507), masks, strict=True)]

    value, gradient = value_and_gradient(partial(taid, t=share, mixture=mixture), *logits)

    expected, expected_gradient = value_and_gradient(partial(taid, t=share), *logits)
    assert_close(value, expected, rtol=1e-6, atol=1e-12)
    assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_amids_mixture_at_alpha_minus_1_makes_it_the_skewed_kl(share):
    logits = random_logits(8, 507)

    value, gradient = value_and_gradient(partial(amid, mixture=-1.0, share=share, alpha=1.0, beta=0.0), *logits)

    expected, expected_gradient = value_and_gradient(partial(skew_forward_kl, skew=share), *logits)
    assert_close(value, expected, rtol=1e-5, atol=0)
    assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-7)


def test_amid_without_a_share_of_the_teacher_is_abkd():
    logits = random_logits(8, 507)

    value, gradient = value_and_gradient(partial(amid, share=0.0, alpha=0.3, beta=0.4), *logits)

    expected, expected_gradient = value_and_gradient(partial(abkd, alpha=0.3, beta=0.4), *logits)
    assert torch.equal(value, expected)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (partial(abkd, alpha=-0.1), "alpha and beta must be 0 or at least 0.001, and not both 0, got -0.1 and 0.7"),
        (partial(abkd, alpha=0.0, beta=0.0), "not both 0, got 0.0 and 0.0"),
        (partial(abkd, beta=1e-6), "at least 0.001, and not both 0, got 0.2 and 1e-06"),
        (partial(abkd, beta=INF), "not both 0, got 0.2 and inf"),
        (partial(amid, share=1.0), r"share must lie in \[0, 1\), got 1.0: at 1 the mixture is the teacher"),
        (partial(amid, mixture=math.nan), "mixture must be a finite number, got nan"),
        (partial(taid, t=0.4, mixture=-INF), "mixture must be a finite number, got -inf"),
    ],
)
def test_parameters_that_no_divergence_has_are_refused(objective, words):
    with pytest.raises(ValueError, match=words):
        objective(*random_logits(2, 5))
