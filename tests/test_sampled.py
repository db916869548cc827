"""Samples of a teacher: an estimate of forward KL without bias, and its gradient, against the full distribution."""

import pytest
import torch

from taid import Head, distillation_loss, fused_distillation_loss
from taid.losses.objective_table import OBJECTIVES
from taid.losses.sparse_logits import Sampled

SEED = 7


def pair(N=6, V=40, D=9, dtype=torch.float64, spread=2.0):
    torch.manual_seed(SEED)
    hidden, weight = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((N, D), (V, D)))
    return hidden, weight, spread * torch.randn(N, V, dtype=dtype), torch.randint(V, (N,))


def kl(student_NV, teacher_NV):
    log_q, log_p = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-300)).item()


def test_counts_are_the_expected_ones_rounded_up_or_down_and_add_up():
    _, _, teacher_NV, labels = pair(N=200, V=500)
    sampled = Sampled.from_logits(teacher_NV, labels, 50, torch.rand(200))
    p = teacher_NV.softmax(-1)
    counts = torch.zeros(200, 500).scatter_add(-1, sampled.ids, 50 * sampled.weights)
    assert torch.equal(counts.round(), counts.round().clamp(min=0))
    torch.testing.assert_close(counts.sum(-1), torch.full((200,), 50.0))
    assert ((counts - 50 * p).abs() < 1 + 1e-4).all()
    torch.testing.assert_close(sampled.entropy.double(), torch.special.entr(p).sum(-1), rtol=1e-6, atol=1e-6)
    expected = teacher_NV.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(sampled.label_log_probs.double(), expected, rtol=1e-6, atol=1e-6)


def test_loss_and_gradient_over_all_starts_are_the_full_ones():
    """The places (u + i) / n are a midpoint rule: over a fine grid of u the mean is the expectation."""
    hidden, weight, teacher_NV, labels = pair()
    steps, draws = 2000, 3
    losses, gradients = [], []
    for step in range(steps):
        sampled = Sampled.from_logits(
            teacher_NV, labels, draws, torch.full((6,), (step + 0.5) / steps, dtype=torch.float64)
        )
        loss = fused_distillation_loss(hidden, weight, sampled, None, labels, "forward_kl").loss
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, weight)[0])
    full = kl(hidden @ weight.t(), teacher_NV)
    assert torch.stack(losses).std() > 0.1 * full  # a single one is far off
    assert abs(torch.stack(losses).mean() - full) < 2e-3 * full
    assert relative(torch.stack(gradients).mean(0), torch.autograd.grad(full, weight)[0]) < 2e-3


def test_systematic_draws_vary_less_than_independent_ones():
    hidden, weight, teacher_NV, labels = pair(N=2000, V=200)
    student_NV = (hidden @ weight.t()).detach()
    systematic = Sampled.from_logits(teacher_NV, labels, 12, torch.rand(2000))
    counts = torch.distributions.Multinomial(12, logits=teacher_NV).sample()
    independent = Sampled(
        torch.arange(200).expand(2000, -1), counts / 12, systematic.entropy.double(), systematic.label_log_probs
    )
    log_q, p = student_NV.log_softmax(-1), teacher_NV.softmax(-1)
    exact = -(p * log_q).sum(-1) - torch.special.entr(p).sum(-1)
    errors = [(s.forward_kl(student_NV) - exact).square().mean() for s in (systematic, independent)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("kd_ratio", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("objective", ["forward_kl", "sft"])
def test_the_fused_form_is_the_plain_one_and_autograds(objective, kd_ratio):
    hidden, weight, teacher_NV, labels = pair()
    bias = torch.randn(40, dtype=torch.float64, requires_grad=True)
    head = Head(weight, bias, scale=0.7, softcap=5.0)
    sampled = Sampled.from_logits(teacher_NV, labels, 16, torch.rand(6))  # sixteenths add up to 1 in binary
    given = {} if objective == "sft" else {"kd_ratio": kd_ratio}
    fused = fused_distillation_loss(hidden, head, sampled, None, labels, objective, **given)
    plain = distillation_loss(head.logits(hidden), sampled, labels, objective, **given)
    for name, value in plain.sums.items():
        assert abs(fused.sums[name] - value) < 1e-5 * abs(value) + 1e-6, name
    log_q = head.logits(hidden).log_softmax(-1)
    share = 0.0 if objective == "sft" else kd_ratio
    estimate = -(sampled.weights.double() * log_q.gather(-1, sampled.ids)).sum() - sampled.entropy.double().sum()
    expected = share * estimate - (1 - share) * log_q.gather(-1, labels[:, None]).sum()
    assert abs(fused.loss - expected) < 1e-12 * abs(expected)
    wanted = (hidden, weight, bias)
    for ours, theirs in zip(
        torch.autograd.grad(fused.loss, wanted), torch.autograd.grad(expected, wanted), strict=True
    ):
        assert relative(ours, theirs) < 1e-12


def test_a_sure_teacher_is_one_id_and_the_exact_loss():
    hidden, weight, teacher_NV, labels = pair()
    teacher_NV = torch.zeros_like(teacher_NV).scatter(-1, labels[:, None], 1e4)
    sampled = Sampled.from_logits(teacher_NV, labels, 50, torch.rand(6))
    assert sampled.ids.shape == (6, 1)
    assert torch.equal(sampled.ids[:, 0], labels)
    loss = fused_distillation_loss(hidden, weight, sampled, None, labels, "forward_kl").loss
    sft = fused_distillation_loss(hidden, weight, None, None, labels, "sft").loss
    assert abs(loss - sft) < 1e-12 * sft


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name not in Sampled.OBJECTIVES])
def test_objectives_that_are_not_linear_in_the_teacher_are_refused_by_name(objective):
    hidden, weight, teacher_NV, labels = pair()
    sampled = Sampled.from_logits(teacher_NV, labels, 12, torch.rand(6))
    given = {"t": 0.4} if objective == "taid" else {"temperature": 2.0} if objective == "ctkd" else {}
    for loss, of in ((fused_distillation_loss, (hidden, weight, sampled, None)),
                     (distillation_loss, (hidden @ weight.t(), sampled))):  # fmt: skip
        with pytest.raises(ValueError, match=f"'{objective}' is not linear in the teacher's distribution"):
            loss(*of, labels, objective, **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(dtype):
    hidden, weight, teacher_NV, labels = pair(dtype=torch.float32)
    sampled = Sampled.from_logits(1e4 * teacher_NV, labels, 12, torch.rand(6))
    hidden = (1e3 * hidden).detach().to(dtype).requires_grad_()
    loss = fused_distillation_loss(hidden, weight.detach().to(dtype), sampled, None, labels, "forward_kl").loss
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, hidden)[0]).all()


def test_samples_of_other_tokens_or_ids_are_refused():
    hidden, weight, teacher_NV, labels = pair()
    sampled = Sampled.from_logits(teacher_NV, labels, 12, torch.rand(6))
    with pytest.raises(ValueError, match="samples are of 3 tokens, but 6 are trained"):
        fused_distillation_loss(hidden, weight, sampled[:3], None, labels, "forward_kl")
    with pytest.raises(ValueError, match=r"samples name id \d+, but the ids are 0 \.\. 9"):
        fused_distillation_loss(hidden, weight, sampled, None, labels % 10, "forward_kl", vocabulary_size=10)


def test_the_loss_leaves_the_samples_as_they_were():
    hidden, weight, teacher_NV, labels = pair(dtype=torch.float32)
    sampled = Sampled.from_logits(teacher_NV, labels, 12, torch.rand(6))
    losses = [fused_distillation_loss(hidden, weight, sampled, None, labels, "forward_kl").loss for _ in range(2)]
    assert losses[0] == losses[1]
