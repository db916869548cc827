"""The tail rule: k + 1 outcomes, in closed form, against the dense formula that they stand for."""

import pytest
import torch

from taid import Head, distillation_loss, fused_distillation_loss, objectives
from taid.losses.objective_table import OBJECTIVES
from taid.losses.sparse_logits import TopK

DIVERGENCES = {
    "taid": {"t": 0.4},
    "forward_kl": {},
    "reverse_kl": {},
    "jsd": {"beta": 0.3},
    "tvd": {},
    "skew_forward_kl": {"skew": 0.1},
    "skew_reverse_kl": {"skew": 0.1},
}


def pair(N=7, V=37, D=11, E=5, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    hidden, weight = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((N, D), (V, D)))
    teacher_NV = 2 * torch.randn(N, V, dtype=dtype)
    return hidden, weight, teacher_NV, torch.randint(V, (N,))


def exact(teacher_NV, labels, k):
    """TopK.from_logits rounds to float32; the tests want its formula in float64."""
    log_p = teacher_NV.log_softmax(-1)
    log_probs, ids = log_p.topk(k)
    rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return TopK(ids, log_probs, rest, log_p.gather(-1, labels[:, None])[:, 0])


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-300)).item()


def dense(student_NV, top):
    """log p-hat: what is not listed is shared out as the student does, without a gradient."""
    log_q = student_NV.detach().log_softmax(-1)
    rest_q = log_q.scatter(-1, top.ids, -torch.inf).logsumexp(-1, keepdim=True)
    return (log_q - rest_q + top.log_rest[:, None]).scatter(-1, top.ids, top.log_probs)


def test_every_objective_is_a_divergence_here_or_is_refused():
    assert set(DIVERGENCES) | {"sft"} == set(TopK.OBJECTIVES)
    hidden, weight, teacher_NV, labels = pair()
    for objective in [name for name in OBJECTIVES if name not in TopK.OBJECTIVES]:
        top, given = exact(teacher_NV, labels, 3), {"temperature": 2.0} if objective == "ctkd" else {}
        with pytest.raises(ValueError, match=f"{objective}.*whole distribution"):
            fused_distillation_loss(hidden, weight, top, None, labels, objective, **given)
        with pytest.raises(ValueError, match=f"{objective}.*whole distribution"):
            distillation_loss(hidden @ weight.t(), top, labels, objective, **given)


@pytest.mark.parametrize("k", [1, 5, 36])
@pytest.mark.parametrize("objective", DIVERGENCES)
def test_k_plus_one_outcomes_are_the_dense_formula(objective, k):
    hidden, weight, teacher_NV, labels = pair()
    top = exact(teacher_NV, labels, k)
    student_NV = (hidden @ weight.t()).detach().requires_grad_()
    formula = getattr(objectives, objective)
    of_outcomes = formula(*top.outcomes(student_NV), **DIVERGENCES[objective])
    of_all = formula(student_NV, dense(student_NV, top), **DIVERGENCES[objective])
    torch.testing.assert_close(of_outcomes, of_all, rtol=2e-6, atol=1e-9)  # objectives compute in float32
    ours, theirs = (torch.autograd.grad(loss.sum(), student_NV)[0] for loss in (of_outcomes, of_all))
    assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("kd_ratio", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("k", [1, 5, 37])
@pytest.mark.parametrize("objective", DIVERGENCES)
def test_the_fused_form_is_the_plain_one(objective, k, kd_ratio):
    hidden, weight, teacher_NV, labels = pair()
    bias = torch.randn(37, dtype=torch.float64, requires_grad=True)
    head = Head(weight, bias, scale=0.7, softcap=5.0)
    top, given = exact(teacher_NV, labels, k), {"kd_ratio": kd_ratio, **DIVERGENCES[objective]}
    fused = fused_distillation_loss(hidden, head, top, None, labels, objective, **given)
    plain = distillation_loss(head.logits(hidden).float(), top, labels, objective, **given)
    assert abs(fused.loss - plain.loss) < 2e-6 * abs(plain.loss) + 1e-6
    for name, value in plain.sums.items():
        if not (kd_ratio == 0 and name in ("objective", "target_cross_entropy")):
            assert abs(fused.sums[name] - value) < 1e-5 * abs(value) + 1e-6, name
    wanted = (hidden, weight, bias)
    for ours, theirs in zip(
        torch.autograd.grad(fused.loss, wanted), torch.autograd.grad(plain.loss, wanted), strict=True
    ):
        assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("objective", ["taid", "forward_kl", "reverse_kl", "jsd", "tvd"])
@pytest.mark.parametrize("k", [1, 8, 36])
def test_the_closed_form_gradient_is_autograds_in_float64(objective, k):
    hidden, weight, teacher_NV, labels = pair()
    top, given = exact(teacher_NV, labels, k), DIVERGENCES[objective]
    found = fused_distillation_loss(hidden, weight, top, None, labels, objective, **given)
    log_q, log_p = top.outcomes(hidden @ weight.t())
    q, p = log_q.exp(), log_p.exp()
    if objective == "taid":
        p = (0.6 * log_q.detach() + 0.4 * log_p).softmax(-1)
    mixture = 0.3 * p + 0.7 * q
    expected = {
        "taid": lambda: (p * (p.log() - log_q)).sum(),
        "forward_kl": lambda: (p * (log_p - log_q)).sum(),
        "reverse_kl": lambda: (q * (log_q - log_p)).sum(),
        "jsd": lambda: (0.3 * p * (log_p - mixture.log()) + 0.7 * q * (log_q - mixture.log())).sum(),
        "tvd": lambda: 0.5 * (p - q).abs().sum(),
    }[objective]()
    assert abs(found.loss - expected) < 1e-12 * abs(expected)
    for ours, theirs in zip(
        torch.autograd.grad(found.loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        assert relative(ours, theirs) < 1e-12


@pytest.mark.parametrize("objective", DIVERGENCES)
def test_all_ids_listed_is_the_full_teacher(objective):
    hidden, weight, teacher_NV, labels = pair()
    teacher_weight = torch.linalg.pinv(torch.eye(7, dtype=torch.float64)) @ teacher_NV  # [N, V]: hidden = identity
    full = fused_distillation_loss(
        hidden, weight, torch.eye(7, dtype=torch.float64), teacher_weight.t().contiguous(), labels, objective,
        **DIVERGENCES[objective],
    )  # fmt: skip
    listed = fused_distillation_loss(
        hidden, weight, exact(teacher_NV, labels, 37), None, labels, objective, **DIVERGENCES[objective]
    )
    assert abs(full.loss - listed.loss) < 1e-12 * abs(full.loss)
    for ours, theirs in zip(
        torch.autograd.grad(listed.loss, (hidden, weight)), torch.autograd.grad(full.loss, (hidden, weight)),
        strict=True,
    ):  # fmt: skip
        assert relative(ours, theirs) < 1e-12


@pytest.mark.parametrize("objective", ["taid", "forward_kl", "reverse_kl"])
def test_the_loss_of_fewer_ids_is_never_larger(objective):
    hidden, weight, teacher_NV, labels = pair(V=500)
    losses = [
        fused_distillation_loss(
            hidden, weight, exact(teacher_NV, labels, k), None, labels, objective, **DIVERGENCES[objective]
        ).loss.item()
        for k in (1, 4, 16, 64, 256, 500)
    ]
    assert losses == sorted(losses)
    assert losses[0] < losses[-1]


def test_taid_at_t_0_has_no_gradient_and_at_t_1_is_forward_kl():
    hidden, weight, teacher_NV, labels = pair()
    top = exact(teacher_NV, labels, 5)
    at_0, at_1 = (fused_distillation_loss(hidden, weight, top, None, labels, "taid", t=t) for t in (0.0, 1.0))
    assert at_0.loss == 0
    assert torch.autograd.grad(at_0.loss, hidden)[0].abs().max() < 1e-15
    forward = fused_distillation_loss(hidden, weight, top, None, labels, "forward_kl")
    assert abs(at_1.loss - forward.loss) < 1e-12
    assert relative(*(torch.autograd.grad(x.loss, hidden)[0] for x in (at_1, forward))) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(dtype):
    hidden, weight, teacher_NV, labels = pair(dtype=torch.float32)
    top = TopK.from_logits(1e4 * teacher_NV, labels, 5)
    assert torch.isfinite(top.log_rest).all()
    hidden = (1e3 * hidden).detach().to(dtype).requires_grad_()
    loss = fused_distillation_loss(hidden, weight.detach().to(dtype), top, None, labels, "taid", t=0.4).loss
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, hidden)[0]).all()


def test_top_k_of_another_number_of_tokens_or_an_id_too_large_is_refused():
    hidden, weight, teacher_NV, labels = pair()
    top = exact(teacher_NV, labels, 5)
    with pytest.raises(ValueError, match="of 3 tokens, but 7 are trained"):
        fused_distillation_loss(hidden, weight, top[:3], None, labels, "taid", t=0.4)
    with pytest.raises(ValueError, match=r"name id \d+, but the ids are 0 \.\. 19"):
        fused_distillation_loss(hidden, weight, top, None, labels % 20, "taid", t=0.4, vocabulary_size=20)


@pytest.mark.parametrize("gap", [80.0, 90.0, 100.0, 110.0, 1000.0])
@pytest.mark.parametrize("objective", ["forward_kl", "taid", "tvd"])
def test_a_rest_that_is_less_likely_than_a_float_can_say(objective, gap):
    identity, label = torch.eye(2), torch.tensor([0])
    top = TopK.from_logits(torch.tensor([[1.0, 0.0]]), label, 1)
    given = {"t": 0.99} if objective == "taid" else {}
    hidden = torch.tensor([[gap, 0.0]], requires_grad=True)
    fused = fused_distillation_loss(hidden, identity, top, None, label, objective, **given)
    plain = distillation_loss(hidden @ identity, top, label, objective, **given)
    for name in ("objective", "kl"):
        assert fused.sums[name].item() == pytest.approx(plain.sums[name].item(), rel=1e-5), name
    ours, theirs = (torch.autograd.grad(x.loss, hidden)[0] for x in (fused, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_top_k_of_wrong_shapes_are_refused():
    hidden, weight, teacher_NV, labels = pair()
    top = exact(teacher_NV, labels, 5)
    for wrong in (
        TopK(top.ids, top.log_probs[:1], top.log_rest, top.label_log_probs),
        TopK(top.ids, top.log_probs, top.log_rest[:1], top.label_log_probs),
    ):
        with pytest.raises(ValueError, match=r"top k need two tensors \[N, ids of a token\]"):
            fused_distillation_loss(hidden, weight, wrong, None, labels, "taid", t=0.4)
    negative = TopK(torch.full_like(top.ids, -1), top.log_probs, top.log_rest, top.label_log_probs)
    with pytest.raises(ValueError, match=r"name id -1, but the ids are 0 \.\. 36"):
        fused_distillation_loss(hidden, weight, negative, None, labels, "taid", t=0.4)


def test_a_teacher_without_a_share_leaves_no_trace_in_the_gradient():
    hidden, weight, teacher_NV, labels = pair()
    top = exact(teacher_NV, labels, 5)
    broken = TopK(top.ids, top.log_probs * torch.nan, top.log_rest, top.label_log_probs)
    loss = fused_distillation_loss(hidden, weight, broken, None, labels, "taid", t=0.4, kd_ratio=0.0).loss
    assert torch.isfinite(torch.autograd.grad(loss, hidden)[0]).all()
