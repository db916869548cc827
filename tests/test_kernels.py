"""Both row stages, plain torch and C, held against float64 autograd of the papers' formulas."""

import ctypes
import math
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from taid import objectives
from taid.losses.kernels import c_rows, row_stage
from taid.losses.kernels.c_rows import native_rows
from taid.losses.kernels.row_task import COLUMNS, Finish, RowTask
from taid.losses.kernels.torch_rows import rows
from test_objectives import (
    INF,
    LOGIT,
    MASKED,
    UNIT_IN_THE_LAST_PLACE,
    at_temperature,
    masked,
    random_logits,
    reference_abkd,
    reference_adaptive_kl,
    reference_amid,
    reference_ctkd,
    reference_dkd,
    reference_jsd,
    reference_kl,
    reference_mixture,
    reference_taid,
    reference_target,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On tensors as small as these, waking a second thread takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def mix(log_a, log_b, share_of_a):
    return log_b if share_of_a == 0 else reference_mixture(log_a, log_b, share_of_a)


# Of log q, log p and the labels.
REFERENCES = {
    "taid": lambda log_q, log_p, labels, **parameters: reference_taid(log_q, log_p, **parameters),
    "forward_kl": lambda log_q, log_p, labels: reference_kl(log_p, log_q),
    "reverse_kl": lambda log_q, log_p, labels: reference_kl(log_q, log_p),
    "jsd": lambda log_q, log_p, labels, beta: reference_jsd(log_q, log_p, beta),
    "tvd": lambda log_q, log_p, labels: 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1),
    "skew_forward_kl": lambda log_q, log_p, labels, skew: reference_kl(log_p, mix(log_p, log_q, skew)),
    "skew_reverse_kl": lambda log_q, log_p, labels, skew: reference_kl(log_q, mix(log_q, log_p, skew)),
    "adaptive_kl": lambda log_q, log_p, labels, head_mass: reference_adaptive_kl(log_q, log_p, head_mass),
    "dkd": reference_dkd,
    "ctkd": lambda log_q, log_p, labels, temperature: reference_ctkd(log_q, log_p, temperature),
    "abkd": lambda log_q, log_p, labels, alpha, beta: reference_abkd(log_p, log_q, alpha, beta),
    "amid": lambda log_q, log_p, labels, **parameters: reference_amid(log_q, log_p, **parameters),
    "sft": lambda log_q, log_p, labels: torch.zeros_like(log_q[..., 0]),
}


@dataclass(frozen=True)
class Case:
    """An objective with its parameters."""

    objective: str
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def scale(self):
        """Return the factor of the objective's divergence."""
        return self.parameters.get("temperature", 1.0) ** 2

    @property
    def is_mixture(self):
        return self.objective == "jsd" or self.parameters.get("skew", 0.0) > 0

    @property
    def floor(self):
        """Below this, an error is relative to it. Of a mixture, terms as large as 10 x the value cancel."""
        return (1e-2 if self.is_mixture else 1e-3) * self.scale

    @property
    def gradient_scale(self):
        """Return the factor of differences of probabilities in its gradient."""
        if self.objective in ("abkd", "amid"):
            return 1 / (self.parameters["alpha"] or 1.0)
        weight = max(1.0, self.parameters.get("alpha", 1.0), self.parameters.get("beta", 1.0))
        return self.parameters.get("temperature", 1.0) * weight

    def task(self, kd_ratio=1.0, student=None, teacher=None):
        return RowTask.for_objective(
            self.objective, kd_ratio, self.parameters, student or Finish(), teacher or Finish()
        )


CASES = {
    **{f"taid({t})": Case("taid", {"t": t}) for t in (0.1, 0.4, 0.9, 1.5)},
    "forward_kl": Case("forward_kl"),
    "reverse_kl": Case("reverse_kl"),
    **{f"jsd({beta})": Case("jsd", {"beta": beta}) for beta in (0.1, 0.5, 0.9)},
    "tvd": Case("tvd"),
    **{f"skew_forward_kl({s})": Case("skew_forward_kl", {"skew": s}) for s in (0.0, 0.1, 0.9)},
    **{f"skew_reverse_kl({s})": Case("skew_reverse_kl", {"skew": s}) for s in (0.0, 0.1, 0.9)},
    **{f"adaptive_kl({mass})": Case("adaptive_kl", {"head_mass": mass}) for mass in (0.5, 0.9)},
    **{
        f"dkd({alpha}, {beta}, {T})": Case("dkd", {"alpha": alpha, "beta": beta, "temperature": T})
        for alpha, beta, T in ((1.0, 8.0, 4.0), (2.0, 0.5, 1.0), (2.0, 0.5, 0.7))
    },
    **{f"ctkd({T})": Case("ctkd", {"temperature": T}) for T in (0.7, 1.0, 15.6)},
    **{f"taid(0.4, mixture={m})": Case("taid", {"t": 0.4, "mixture": m}) for m in (-1.0, 0.5)},
    **{f"abkd({a}, {b})": Case("abkd", {"alpha": a, "beta": b}) for a, b in ((0.2, 0.7), (0.0, 0.9), (0.6, 0.0))},
    **{
        f"amid({m}, {share}, {a}, {b})": Case("amid", {"mixture": m, "share": share, "alpha": a, "beta": b})
        for m, share, a, b in ((0.5, 0.5, 0.2, 0.7), (1.0, 0.1, 1.0, 0.0), (-5.0, 0.1, 0.0, 1.0))
    },
    "sft": Case("sft"),
}

# Beside forward and reverse KL.
INFINITE_WHERE_THE_STUDENT_IS_ZERO = [name for name in CASES if "mixture=" in name] + [
    "abkd(0.6, 0.0)",
    "amid(1.0, 0.1, 1.0, 0.0)",
]
INFINITE_WHERE_THE_TEACHER_IS_ZERO = ["abkd(0.0, 0.9)", "amid(-5.0, 0.1, 0.0, 1.0)"]

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def only(*names):
    """The cases of these names, or of these objectives."""
    chosen = [name for name, case in CASES.items() if {name, case.objective} & set(names)]
    return pytest.mark.parametrize("case", [CASES[name] for name in chosen], ids=chosen)


def without(*names):
    return only(*(name for name, case in CASES.items() if not {name, case.objective} & set(names)))


@pytest.fixture(params=[rows, native_rows], ids=["plain", "native"])
def form(request):
    if request.param is native_rows and c_rows._library() is None:
        pytest.skip("there is no C compiler, or TAID_NATIVE=0 asks for the plain form")
    return request.param


@dataclass(frozen=True)
class Result:
    """The columns by their names, and the gradient on the student's products."""

    columns: dict[str, torch.Tensor]
    gradient: torch.Tensor


def padded(matrix, stride):
    tile = torch.full((matrix.shape[0], stride), math.nan, dtype=matrix.dtype)[:, : matrix.shape[1]]
    return tile.copy_(matrix)


def run(form, task, student, teacher, labels, *, gradient=True, stride=None):
    tiles = [z if z is None else padded(z, stride or z.shape[1]) for z in (student, teacher)]
    exact = torch.promote_types(student.dtype, torch.float32)
    columns = torch.full((len(student), len(COLUMNS)), math.nan, dtype=exact)
    result = form(*tiles, labels, task, columns, gradient=student.dtype if gradient else None)
    return Result(dict(zip(COLUMNS, columns.unbind(-1), strict=True)), result)


def labels_for(logits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, logits.shape[-1], logits.shape[:-1], generator=generator)


def finished(finish, z):
    z = z if finish.bias is None else z + finish.bias.double()
    z = z * finish.scale
    return z if finish.softcap is None else finish.softcap * torch.tanh(z / finish.softcap)


def reference_log_probs(z):
    """Columns that are -inf for all rows are no token, and constant."""
    kept = (z > -INF).all(0).nonzero().flatten()
    return torch.full_like(z, -INF).index_copy(-1, kept, torch.log_softmax(z[..., kept], -1))


def truth(case, student, teacher, labels, kd_ratio=1.0, task=None):
    """The objective, and the gradient of the mix with the label's cross-entropy, in float64 by autograd."""
    task = task or case.task(kd_ratio)
    student = student.double().detach().clone().requires_grad_()
    log_q = reference_log_probs(finished(task.student, student))
    log_p = reference_log_probs(finished(task.teacher, teacher.double()))
    value = REFERENCES[case.objective](log_q, log_p, labels, **case.parameters)
    cross_entropy = -log_q.gather(-1, labels[:, None])[:, 0]
    mixed = task.kd_ratio * value + (1 - task.kd_ratio) * cross_entropy if task.kd_ratio < 1 else value
    mixed.sum().backward()
    return value.detach(), student.grad


def error_of_value(actual, expected, floor):
    """Relative to the value; where that is smaller, to `floor`."""
    return ((actual.double() - expected).abs() / expected.abs().clamp(min=floor)).max().item()


def error_of_gradient(actual, expected, floor=0.25):
    """Relative to the row's largest entry; where that is smaller, to `floor`: it is made of probabilities."""
    return ((actual.double() - expected).abs() / expected.abs().amax(-1, keepdim=True).clamp(min=floor)).max().item()


# --- against the formulas --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kd_ratio", [1.0, 0.7])
@every_case
def test_the_closed_forms_equal_float64_autograd_to_1e_12(case, kd_ratio):
    for M, V in ((7, 2), (7, 48), (1, 252), (7, 507), (2, 5_003)):
        student, teacher = (z.double() for z in random_logits(M, V))
        labels = labels_for(student)

        result = run(rows, case.task(kd_ratio), student, teacher, labels)

        value, gradient = truth(case, student, teacher, labels, kd_ratio)
        assert error_of_value(result.columns["objective"], value, case.floor) <= 1e-12
        assert error_of_gradient(result.gradient, gradient) <= 1e-12


@pytest.mark.parametrize("kd_ratio", [1.0, 0.7])
@every_case
def test_in_float32_value_and_gradient_are_within_2e_6_of_float64_on_odd_shapes(form, case, kd_ratio):
    for M, V in ((7, 2), (1, 48), (7, 252), (7, 507), (1, 507), (3, 5_003)):
        student, teacher = random_logits(M, V)
        labels = labels_for(student)

        result = run(form, case.task(kd_ratio), student, teacher, labels)

        value, gradient = truth(case, student, teacher, labels, kd_ratio)
        assert error_of_value(result.columns["objective"], value, case.floor) <= 2e-6
        assert error_of_gradient(result.gradient, gradient) <= 2e-6


@pytest.mark.parametrize(
    "case",
    [
        Case("jsd", {"beta": 1e-3}),
        Case("jsd", {"beta": 0.999}),
        Case("skew_forward_kl", {"skew": 1e-3}),
        Case("skew_reverse_kl", {"skew": 1e-3}),
        Case("taid", {"t": 1e-3, "mixture": -1.0}),
        Case("taid", {"t": 0.999, "mixture": 3.0}),
        Case("abkd", {"alpha": 1e-3, "beta": 0.7}),
        Case("abkd", {"alpha": 0.7, "beta": 1e-3}),
        Case("abkd", {"alpha": 1e-3, "beta": 1e-3}),
        Case("amid", {"mixture": 1.0 - 1e-3, "share": 1e-3, "alpha": 0.2, "beta": 0.7}),
    ],
    ids=str,
)
def test_a_small_share_costs_the_plain_form_digits_and_a_small_power_none(form, case):
    student, teacher = random_logits(7, 507)
    labels = labels_for(student)

    result = run(form, case.task(), student, teacher, labels)

    value, gradient = truth(case, student, teacher, labels)
    is_exact = form is native_rows or case.objective == "abkd"
    bound = 2e-6 if is_exact else 1e-7 / 1e-3
    assert error_of_value(result.columns["objective"], value, 1e-3) <= bound
    assert error_of_gradient(result.gradient, gradient) <= bound


def bound_near_the_teacher(form, case):
    """The bound is of the value's relative error at |d| = 0.01, where float32 keeps 6e-6 of d."""
    if case.is_mixture:  # terms of first order in d cancel to second order; with a share of 0.9, to a tenth of that
        return 1e-3 if 0.9 in case.parameters.values() else 1e-4
    if case.objective == "tvd":
        return 2e-5
    if form is native_rows:
        return 5e-6
    return 1e-3 if case.objective in ("dkd", "ctkd") else 2e-4


@without("sft")
def test_a_student_very_near_to_the_teacher_keeps_its_digits(form, case):
    student, teacher = random_logits(2, 32_003, noise=0.01)
    labels = labels_for(student)

    result = run(form, case.task(), student, teacher, labels)

    value, gradient = truth(case, student, teacher, labels)
    kl = reference_kl(*both_log_probs(teacher, student))
    assert (kl < 1e-4).all()
    assert error_of_value(result.columns["objective"], value, 0) <= bound_near_the_teacher(form, case)
    assert error_of_gradient(result.gradient, gradient, 0) <= 1e-3
    # As a metric beside another objective, the plain form's KL is good to 2e-7 nats.
    assert error_of_value(result.columns["kl"], kl, 0) <= (1e-6 if form is native_rows else 5e-3)


def both_log_probs(*logits):
    return tuple(reference_log_probs(z.double()) for z in logits)


@every_case
def test_one_id_alone_has_neither_loss_nor_gradient(form, case):
    student, teacher = torch.tensor([[3.0], [-1e4]]), torch.tensor([[1.0], [7.0]])

    result = run(form, case.task(0.7), student, teacher, torch.zeros(2, dtype=torch.long))

    for name in COLUMNS:
        assert torch.equal(result.columns[name], torch.full((2,), float(name == "correct")))
    assert torch.equal(result.gradient, torch.zeros(2, 1))


# --- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kd_ratio", [1.0, 0.7, 0.0])
@every_case
def test_each_column_is_what_its_name_says(form, case, kd_ratio):
    student, teacher = random_logits(24, 51, scale=1.5)
    labels = labels_for(student)
    labels[::3] = student[::3].argmax(-1)

    columns = run(form, case.task(kd_ratio), student, teacher, labels).columns

    log_q, log_p = both_log_probs(student, teacher)
    at_label = lambda log_probs: log_probs.gather(-1, labels[:, None])[:, 0]  # noqa: E731
    expected = dict.fromkeys(COLUMNS, torch.zeros(24, dtype=torch.float64)) | {
        "kl": reference_kl(log_p, log_q),
        "cross_entropy": -at_label(log_q),
        "entropy": -(log_q.exp() * log_q).sum(-1),
        "correct": (student.argmax(-1) == labels).double(),
        "teacher_cross_entropy": -at_label(log_p),
    }
    if kd_ratio > 0:
        expected["objective"] = REFERENCES[case.objective](log_q, log_p, labels, **case.parameters)
        if case.objective == "taid":
            expected["target_cross_entropy"] = -(reference_target(log_q, log_p, **case.parameters).exp() * log_q).sum(
                -1
            )
        if case.objective == "ctkd":
            expected["temperature_gradient"] = gradient_for_temperature(log_q, log_p, **case.parameters)
    for name in COLUMNS:
        floor = 2 * case.scale if name == "temperature_gradient" else 0.1
        assert error_of_value(columns[name], expected[name], floor) <= 2e-6, name
    assert 0 < expected["correct"].sum() < 24


def test_the_student_is_correct_where_the_label_is_as_likely_as_the_likeliest(form):
    student = torch.tensor([[1.0, 2.0, 2.0], [1.0, 2.0, 2.0], [1.0, 2.0, 2.0], [-INF, 0.0, -INF]])

    columns = run(form, Case("sft").task(), student, None, torch.tensor([0, 1, 2, 1])).columns

    assert columns["correct"].tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("teacher_is_there", [False, True])
def test_cross_entropy_alone_needs_no_teacher_and_has_the_gradient_q_minus_the_label(form, teacher_is_there):
    student, teacher = random_logits(7, 507)
    labels = labels_for(student)
    task = (Case("taid", {"t": 0.4}) if teacher_is_there else Case("sft")).task(0.0)

    result = run(form, task, student, teacher if teacher_is_there else None, labels)

    q = torch.softmax(student.double(), -1)
    assert_close(
        result.gradient.double(), q.scatter_add(-1, labels[:, None], -torch.ones(7, 1).double()), rtol=0, atol=2e-7
    )
    assert (result.columns["kl"] > 0).all() == teacher_is_there
    assert (result.columns["teacher_cross_entropy"] > 0).all() == teacher_is_there
    assert torch.equal(result.columns["objective"], torch.zeros(7))


@every_case
def test_without_a_gradient_the_columns_are_the_same_bit_for_bit(form, case):
    student, teacher = random_logits(7, 507)
    labels = labels_for(student)

    columns = run(form, case.task(0.7), student, teacher, labels, gradient=False).columns

    expected = run(form, case.task(0.7), student, teacher, labels).columns
    for name in COLUMNS:
        assert torch.equal(columns[name], expected[name]), name


# --- tiles -----------------------------------------------------------------------------------------------------------


@every_case
def test_rows_further_apart_than_v_give_the_same_bits_and_what_lies_between_them_is_left_alone(form, case):
    student, teacher = random_logits(7, 507)
    labels = labels_for(student)

    result = run(form, case.task(0.7), student, teacher, labels, stride=576)

    expected = run(form, case.task(0.7), student, teacher, labels)
    assert torch.equal(result.gradient, expected.gradient)
    assert all(torch.equal(result.columns[name], expected.columns[name]) for name in COLUMNS)
    assert result.gradient.stride() == (576, 1)
    assert result.gradient.as_strided((6, 69), (576, 1), 507).isnan().all()


@every_case
def test_a_tile_is_its_rows_one_by_one(form, case):
    # More rows than the plain form takes at a time.
    student, teacher = random_logits(70, 5_003)
    labels = labels_for(student)
    chosen = [0, 51, 52, 69]

    result = run(form, case.task(0.7), student, teacher, labels)

    for row in chosen:
        alone = run(form, case.task(0.7), student[row, None], teacher[row, None], labels[row, None])
        assert_close(result.gradient[row], alone.gradient[0], rtol=1e-6, atol=1e-9)
        for name in COLUMNS:
            assert_close(result.columns[name][row], alone.columns[name][0], rtol=1e-6, atol=1e-8)


@every_case
def test_the_number_of_threads_does_not_change_a_bit_of_the_native_form_and_only_rounding_of_the_plain_one(form, case):
    student, teacher = random_logits(7, 5_003)
    labels = labels_for(student)
    expected = run(form, case.task(0.7), student, teacher, labels)

    torch.set_num_threads(3)
    result = run(form, case.task(0.7), student, teacher, labels)
    torch.set_num_threads(1)

    if form is native_rows:
        assert torch.equal(result.gradient, expected.gradient)
        assert all(torch.equal(result.columns[name], expected.columns[name]) for name in COLUMNS)
    else:
        assert error_of_gradient(result.gradient, expected.gradient) <= 2e-6
        assert all(
            error_of_value(result.columns[name], expected.columns[name], 0.1 * case.scale) <= 2e-6 for name in COLUMNS
        )


@pytest.mark.parametrize("form", [rows, native_rows, row_stage])
@every_case
def test_bfloat16_tiles_are_computed_in_float32_and_only_the_gradient_is_rounded(form, case):
    student, teacher = (z.bfloat16() for z in random_logits(7, 1_507))
    labels = labels_for(student)
    student[3, 600:1_300] = teacher[3, 600:1_300] = -torch.inf  # among them a whole block of rows.c
    labels[3] = 5

    result = run(form, case.task(0.7), student, teacher, labels)

    expected = run(form, case.task(0.7), student.float(), teacher.float(), labels)
    assert torch.equal(result.gradient, expected.gradient.bfloat16())
    assert all(torch.equal(result.columns[name], expected.columns[name]) for name in COLUMNS)


def test_labels_may_be_a_view_and_int32(form):
    student, teacher = random_logits(7, 507)
    labels = labels_for(student)
    view = torch.stack([labels, 0 * labels - 10**12], -1)[:, 0]

    result = run(form, CASES["forward_kl"].task(0.7), student, teacher, view)

    expected = run(form, CASES["forward_kl"].task(0.7), student, teacher, labels)
    assert torch.equal(result.gradient, expected.gradient)


# --- from products to logits -----------------------------------------------------------------------------------------

FINISHES = {
    "bias": Finish(bias=torch.linspace(-3, 3, 507)),
    "scale": Finish(scale=0.25),
    "softcap": Finish(softcap=5.0),
    "all": Finish(bias=torch.linspace(3, -3, 507), scale=0.5, softcap=2.0),
}


@pytest.mark.parametrize("finish", FINISHES.values(), ids=FINISHES)
@only("taid", "reverse_kl", "dkd", "ctkd", "sft")
def test_the_gradient_goes_through_bias_scale_and_softcap_back_to_the_products(form, case, finish):
    for dtype, bound in ((torch.float32, 2e-6), (torch.float64, 1e-12))[: 2 if form is rows else 1]:
        student, teacher = (z.to(dtype) for z in random_logits(7, 507))
        labels = labels_for(student)
        for task in (case.task(0.7, student=finish), case.task(0.7, teacher=finish), case.task(1.0, finish, finish)):
            result = run(form, task, student, teacher, labels)

            value, gradient = truth(case, student, teacher, labels, task=task)
            assert error_of_value(result.columns["objective"], value, 2e-2 * case.scale) <= bound
            assert error_of_gradient(result.gradient, gradient) <= bound


def test_a_softcap_holds_products_of_1e4_and_more(form):
    student, teacher = random_logits(7, 507, scale=1e4)
    student[0, 3], teacher[1, 5] = INF, -INF
    case, cap = CASES["forward_kl"], Finish(softcap=30.0)
    labels = labels_for(student)

    result = run(form, case.task(1.0, cap, cap), student, teacher, labels)

    log_q, log_p = both_log_probs(*(30 * torch.tanh(z.double() / 30) for z in (student, teacher)))
    assert error_of_value(result.columns["objective"], reference_kl(log_p, log_q), 1e-3) <= 2e-6
    assert result.gradient.isfinite().all()


# --- extremes --------------------------------------------------------------------------------------------------------


@without("taid")
def test_logits_of_1e4_give_the_float64_value_and_gradient_up_to_the_rounding_of_a_logit(form, case):
    # Of the logits after division by the temperature, which the gradient is multiplied with.
    student, teacher = random_logits(64, 33, scale=1e4)
    labels = labels_for(student)

    result = run(form, case.task(), student, teacher, labels)

    value, gradient = truth(case, student, teacher, labels)
    unit = UNIT_IN_THE_LAST_PLACE * max(1.0, *(v for v in case.parameters.values()), 1.0)
    assert_close(result.columns["objective"].double(), value, rtol=1e-6, atol=unit)
    assert_close(result.gradient.double(), gradient, rtol=1e-6, atol=unit)


@only("taid")
def test_logits_of_1e4_give_taid_its_float64_value_up_to_the_rounding_of_the_mixed_logits(form, case):
    # The bound is derived in test_objectives.py, at the test of the same name.
    student, teacher = random_logits(64, 33, scale=1e4)
    labels = labels_for(student)
    log_q, log_p = both_log_probs(student, teacher)
    log_p_t = reference_target(log_q, log_p, **case.parameters)

    result = run(form, case.task(), student, teacher, labels)

    value, gradient = truth(case, student, teacher, labels)
    sensitivity = (log_p_t.exp() * (log_p_t - log_q - value[:, None]).abs()).sum(-1)
    error = (result.columns["objective"] - value).abs()
    assert (error <= 1e-6 * value + UNIT_IN_THE_LAST_PLACE * (1 + sensitivity)).all()
    assert_close(result.gradient.double(), gradient, rtol=1e-6, atol=UNIT_IN_THE_LAST_PLACE)


PAIRS = st.lists(st.tuples(LOGIT, LOGIT), min_size=1, max_size=9)
FORMS = [rows, native_rows]  # where there is no compiler, the native form is the plain one


@settings(max_examples=60, deadline=None, derandomize=True)
@given(PAIRS, st.integers(0, 8))
def test_on_any_finite_logits_the_loss_is_finite_and_not_negative_and_the_gradient_adds_up_to_zero(pairs, place):
    student, teacher = torch.tensor(pairs).T[:, None]
    labels = torch.tensor([place % len(pairs)])

    # The rounding of a logit relative to the likeliest.
    unit = 2.0**-22 * (1 + max(z.max() - z.min() for z in (student, teacher)))
    for case in CASES.values():
        for form in FORMS:
            result = run(form, case.task(0.7), student, teacher, labels)
            value = result.columns["objective"]
            assert value.isfinite()
            assert value >= -unit * case.scale
            assert result.gradient.isfinite().all()
            # J(x) takes a sum as large as the loss off terms as large as the loss.
            assert abs(result.gradient.double().sum()) <= unit * (case.gradient_scale + value)


@pytest.mark.parametrize("what", [math.nan, INF])
@every_case
def test_one_nan_or_infinity_makes_the_loss_of_its_row_nan_and_no_other(form, case, what):
    name = "cross_entropy" if case.objective == "sft" else "objective"
    for side in (0,) if case.objective == "sft" else (0, 1):
        logits = random_logits(5, 507)
        logits[side][2, 100] = what

        result = run(form, case.task(), *logits, torch.zeros(5, dtype=torch.long))

        assert result.columns[name].isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("certainty", [20.0, 80.0, 1e4])
@every_case
def test_a_label_of_probability_1_keeps_loss_and_gradient_exact(form, case, certainty):
    student, teacher = random_logits(6, 33, scale=1.0)
    labels = labels_for(student)
    on_label = torch.nn.functional.one_hot(labels, 33) * certainty
    # The student is sure, the teacher is, and both are.
    student = student + on_label * torch.tensor([1, 1, 0, 0, 1, 1])[:, None]
    teacher = teacher + on_label * torch.tensor([0, 0, 1, 1, 1, 1])[:, None]

    result = run(form, case.task(0.7), student, teacher, labels)

    value, gradient = truth(case, student, teacher, labels, 0.7)
    # Of the largest difference of logits.
    slack = 1e-6 * max(1.0, certainty / 10)
    assert error_of_value(result.columns["objective"], value, 0.1 * case.scale) <= slack
    assert error_of_gradient(result.gradient, gradient) <= slack


# --- -inf is no token ------------------------------------------------------------------------------------------------

LABELS = torch.tensor([0, 32, 7, 2, 20])  # none of them masked
KEPT = [entry for entry in range(33) if entry not in MASKED]


@pytest.mark.parametrize("kd_ratio", [1.0, 0.7])
@pytest.mark.parametrize("scale", [3.0, 1e4])
@every_case
def test_a_mask_on_both_sides_is_a_deletion(form, case, scale, kd_ratio):
    student, teacher = random_logits(5, 33, scale=scale, seed=2)

    result = run(form, case.task(kd_ratio), masked(student), masked(teacher), LABELS)

    labels = torch.tensor([KEPT.index(label) for label in LABELS])
    expected = run(form, case.task(kd_ratio), student[:, KEPT], teacher[:, KEPT], labels)
    for name in COLUMNS:
        assert_close(result.columns[name], expected.columns[name], rtol=2e-6, atol=1e-6 * case.scale)
    assert_close(
        result.gradient[:, KEPT], expected.gradient, rtol=1e-6, atol=1e-7 * case.gradient_scale * max(1.0, scale)
    )
    assert (result.gradient[:, MASKED] == 0).all()


@without("reverse_kl", "skew_reverse_kl(0.0)", "adaptive_kl", "sft", *INFINITE_WHERE_THE_TEACHER_IS_ZERO)
def test_a_mask_of_the_teacher_alone_is_probability_zero(form, case):
    student, teacher = random_logits(5, 33)

    result = run(form, case.task(), student, masked(teacher), LABELS)

    value, gradient = truth(case, student, masked(teacher), LABELS)
    assert error_of_value(result.columns["objective"], value, case.floor) <= 2e-6
    assert error_of_gradient(result.gradient, gradient) <= 2e-6
    if case.objective == "ctkd":
        expected = gradient_for_temperature(*both_log_probs(student, masked(teacher)), **case.parameters)
        assert error_of_value(result.columns["temperature_gradient"], expected, 2 * case.scale) <= 2e-5


@without(
    *INFINITE_WHERE_THE_STUDENT_IS_ZERO,
    "forward_kl",
    "taid(1.5)",
    "skew_forward_kl(0.0)",
    "adaptive_kl",
    "dkd",
    "ctkd",
    "sft",
)
def test_a_mask_of_the_student_alone_is_probability_zero(form, case):
    student, teacher = random_logits(5, 33)

    result = run(form, case.task(), masked(student), teacher, LABELS)

    value, gradient = truth(case, masked(student), teacher, LABELS)
    assert error_of_value(result.columns["objective"], value, 1e-3) <= 2e-6
    assert error_of_gradient(result.gradient, gradient) <= 2e-6


@pytest.mark.parametrize(
    ("name", "side"),
    [
        *(
            (name, "student")
            for name in ("forward_kl", "taid(1.5)", "adaptive_kl(0.5)", "dkd(2.0, 0.5, 1.0)", "ctkd(0.7)")
        ),
        *((name, "teacher") for name in ("reverse_kl", "adaptive_kl(0.5)")),
    ],
)
def test_an_infinite_divergence_comes_out_as_a_huge_finite_number_with_a_finite_gradient(form, name, side):
    student, teacher = random_logits(5, 33)
    student, teacher = (masked(student), teacher) if side == "student" else (student, masked(teacher))

    result = run(form, CASES[name].task(), student, teacher, LABELS)

    assert (result.columns["objective"] > 1e20).all()
    assert result.columns["objective"].isfinite().all()
    assert result.gradient.isfinite().all()
    if name == "forward_kl":
        difference = torch.softmax(student.double(), -1) - torch.softmax(teacher.double(), -1)
        assert_close(result.gradient[:, KEPT].double(), difference[:, KEPT], rtol=1e-5, atol=1e-7)


# --- limits and parts of single objectives ---------------------------------------------------------------------------

KINDS = {
    "ordinary": random_logits(5, 33),
    "near": random_logits(5, 33, noise=0.01),
    "extreme": random_logits(5, 33, scale=1e4),
    "masked on both sides": tuple(map(masked, random_logits(5, 33))),
    "masked by the teacher": (random_logits(5, 33)[0], masked(random_logits(5, 33)[1])),
    "masked by the student": (masked(random_logits(5, 33)[0]), random_logits(5, 33)[1]),
}
every_kind = pytest.mark.parametrize(("student", "teacher"), KINDS.values(), ids=KINDS)


@pytest.mark.parametrize("t", [0.0, torch.tensor(0.0)], ids=repr)
@every_kind
def test_taid_at_t_0_has_exactly_zero_loss_and_gradient(form, student, teacher, t):
    result = run(form, Case("taid", {"t": t}).task(), student, teacher, LABELS)

    assert torch.equal(result.columns["objective"], torch.zeros(5))
    assert torch.equal(result.gradient, torch.zeros(5, 33))


@pytest.mark.parametrize("t", [1.0, torch.tensor(1.0)], ids=repr)
@every_kind
def test_taid_at_t_1_is_forward_kl(form, student, teacher, t):
    result = run(form, Case("taid", {"t": t}).task(), student, teacher, LABELS)

    expected = run(form, Case("forward_kl").task(), student, teacher, LABELS)
    assert torch.equal(result.columns["objective"], expected.columns["objective"])
    assert torch.equal(result.gradient, expected.gradient)


@pytest.mark.parametrize("t", [0.0, 1.0, torch.tensor(1.0)], ids=repr)
@pytest.mark.parametrize("mixture", [-5.0, -1.0, 0.0, 3.0])
@every_kind
def test_taid_at_the_ends_is_the_same_whatever_the_mixture(form, student, teacher, mixture, t):
    result = run(form, Case("taid", {"t": t, "mixture": mixture}).task(), student, teacher, LABELS)

    expected = run(form, Case("taid", {"t": t}).task(), student, teacher, LABELS)
    for name in COLUMNS:
        assert_close(result.columns[name], expected.columns[name], rtol=1e-6, atol=1e-6), name
    assert_close(result.gradient, expected.gradient, rtol=1e-6, atol=2e-7)
    if form is native_rows:
        assert torch.equal(result.columns["objective"], expected.columns["objective"])
        assert torch.equal(result.gradient, expected.gradient)


@every_kind
def test_amid_without_a_share_of_the_teacher_is_abkd_bit_for_bit(form, student, teacher):
    powers = {"alpha": 0.3, "beta": 0.4}

    result = run(form, Case("amid", {"share": 0.0, **powers}).task(), student, teacher, LABELS)

    expected = run(form, Case("abkd", powers).task(), student, teacher, LABELS)
    assert torch.equal(result.columns["objective"], expected.columns["objective"])
    assert torch.equal(result.gradient, expected.gradient)


@pytest.mark.parametrize(("powers", "name"), [((1.0, 0.0), "forward_kl"), ((0.0, 1.0), "reverse_kl")])
@every_kind
def test_the_alpha_beta_divergence_of_a_power_of_0_is_a_kl(form, student, teacher, powers, name):
    result = run(form, Case("abkd", dict(zip(("alpha", "beta"), powers, strict=True))).task(), student, teacher, LABELS)

    expected = run(form, Case(name).task(), student, teacher, LABELS)
    assert_close(result.columns["objective"], expected.columns["objective"], rtol=2e-6, atol=1e-9)
    assert_close(result.gradient, expected.gradient, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(("skewed", "plain"), [("skew_forward_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")])
@every_kind
def test_skew_0_is_the_plain_kl_bit_for_bit(form, skewed, plain, student, teacher):
    result = run(form, Case(skewed, {"skew": 0.0}).task(), student, teacher, LABELS)

    expected = run(form, Case(plain).task(), student, teacher, LABELS)
    assert torch.equal(result.columns["objective"], expected.columns["objective"])
    assert torch.equal(result.gradient, expected.gradient)


@pytest.mark.parametrize("temperature", [1.0, torch.tensor(1.0)], ids=repr)
@every_kind
def test_ctkd_at_temperature_1_is_forward_kl(form, student, teacher, temperature):
    result = run(form, Case("ctkd", {"temperature": temperature}).task(), student, teacher, LABELS)

    expected = run(form, Case("forward_kl").task(), student, teacher, LABELS)
    assert_close(result.columns["objective"], expected.columns["objective"], rtol=1e-6, atol=0)
    assert_close(result.gradient, expected.gradient, rtol=1e-6, atol=1e-8)


@without("sft")
def test_equal_logits_have_neither_loss_nor_gradient(form, case):
    _, logits = random_logits(6, 507)

    result = run(form, case.task(), logits, logits, labels_for(logits))

    assert_close(result.columns["objective"], torch.zeros(6), rtol=0, atol=1e-12)
    assert_close(result.gradient, torch.zeros(6, 507), rtol=0, atol=1e-7 * case.gradient_scale)


@pytest.mark.parametrize("head_mass", [0.1, 0.5, 0.9])
def test_tokens_that_the_teacher_holds_equally_likely_are_all_in_the_head_or_all_in_the_tail(form, head_mass):
    student, teacher = random_logits(64, 33, scale=1.5)
    teacher = teacher.round()
    case, labels = Case("adaptive_kl", {"head_mass": head_mass}), torch.zeros(64, dtype=torch.long)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0))

    result = run(form, case.task(), student, teacher, labels)
    reordered = run(form, case.task(), student[:, order], teacher[:, order], labels)

    value, gradient = truth(case, student, teacher, labels)
    assert error_of_value(result.columns["objective"], value, 1e-3) <= 2e-6
    assert error_of_gradient(result.gradient, gradient) <= 2e-6
    assert_close(reordered.columns["objective"], result.columns["objective"], rtol=1e-6, atol=0)
    assert_close(reordered.gradient, result.gradient[:, order], rtol=1e-6, atol=1e-7)


def both_forms_of_dkd(form, student, teacher, labels, **parameters):
    student = student.clone().requires_grad_()
    expected = objectives.dkd(student, teacher, labels, **parameters)
    expected.sum().backward()
    result = run(form, Case("dkd", parameters).task(), student.detach(), teacher, labels)
    return result.columns["objective"], result.gradient, expected.detach(), student.grad


@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0])
@pytest.mark.parametrize("label_is_masked", [False, True])
@pytest.mark.parametrize("V", [1, 2, 9])
def test_dkd_has_neither_loss_nor_gradient_in_what_a_mask_leaves_no_choice_of(form, V, label_is_masked, temperature):
    open_, labels = V // 2, torch.tensor([0 if label_is_masked else V // 2])
    teacher = torch.full((1, V), -INF).index_fill(-1, torch.tensor([open_]), 2.0)

    value, gradient, *_ = both_forms_of_dkd(form, teacher - 1.0, teacher, labels, temperature=temperature)

    assert torch.equal(value, torch.zeros(1))
    assert torch.equal(gradient, torch.zeros(1, V))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0])
def test_dkd_has_no_part_of_the_others_where_the_teacher_masks_all_but_the_label(form, temperature):
    student, teacher = random_logits(5, 33)
    labels = labels_for(student)
    only_label = torch.nn.functional.one_hot(labels, 33).bool()
    teacher[1::2] = teacher[1::2].masked_fill(~only_label[1::2], -INF)

    value, gradient, expected, expected_gradient = both_forms_of_dkd(
        form, student, teacher, labels, temperature=temperature
    )

    assert_close(value, expected, rtol=2e-6, atol=0)
    assert_close(gradient, expected_gradient, rtol=5e-6, atol=2e-7 * 8 * temperature)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_teacher_sure_of_the_label_to_1e_30_still_teaches_how_the_rest_is_shared_out(form, alpha, temperature):
    student, teacher = random_logits(5, 33, scale=1.0)
    labels = torch.zeros(5, dtype=torch.long)
    on_label = torch.zeros(33).index_fill(0, torch.tensor(0), 74 * temperature)
    # A student that guesses, one as sure as the teacher, and one as sure of another token.
    sides = torch.tensor([[0.0], [0.0], [1.0], [1.0], [-1.0]])
    case = Case("dkd", {"alpha": alpha, "beta": 8.0, "temperature": temperature})

    result = run(form, case.task(), student + sides * on_label, teacher + on_label, labels)

    value, gradient = truth(case, student + sides * on_label, teacher + on_label, labels)
    # The plain form takes the others relative to the label: their rounding is that of 74 T, a relative 4e-6 of T.
    bound = 2e-6 if form is native_rows else 1e-5
    assert error_of_value(result.columns["objective"], value, 1e-3) <= bound
    assert ((result.gradient - gradient).norm(dim=-1) / gradient.norm(dim=-1)).max() <= bound
    assert (gradient[:, 1:].norm(dim=-1) > 0.1).all()


def gradient_for_temperature(log_q, log_p, temperature):
    T = torch.full(log_q.shape[:-1], temperature, dtype=torch.float64, requires_grad=True)
    kept = (log_p > -INF).all(0)  # the other terms are zero at every temperature, and NaN to autograd
    log_q_T, log_p_T = at_temperature(log_q, T[:, None])[:, kept], at_temperature(log_p[:, kept], T[:, None])
    (T**2 * (log_p_T.exp() * (log_p_T - log_q_T)).sum(-1)).sum().backward()
    return T.grad


@pytest.mark.parametrize("noise", [None, 0.01])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0, 15.6])
@pytest.mark.parametrize(("M", "V"), [(24, 7), (6, 507), (1, 32_003)])
def test_the_gradient_for_the_temperature_is_that_of_the_float64_formula(form, M, V, temperature, noise):
    student, teacher = random_logits(M, V, noise=noise)
    case = Case("ctkd", {"temperature": temperature})

    columns = run(form, case.task(), student, teacher, labels_for(student)).columns

    log_q, log_p = both_log_probs(student, teacher)
    expected = gradient_for_temperature(log_q, log_p, temperature)
    # At a high temperature T^2 and the KL all but cancel: what is left is as exact as 2 T KL, the part of T^2.
    part = 2 * reference_ctkd(log_q, log_p, temperature) / temperature
    error = (columns["temperature_gradient"] - expected).abs() / torch.maximum(part, expected.abs())
    assert error.max() <= (2e-6 if noise is None else 2e-3)


def test_in_float64_the_gradient_for_the_temperature_is_exact_to_1e_12():
    student, teacher = (z.double() for z in random_logits(6, 507))
    for temperature in (0.7, 1.0, 15.6):
        columns = run(
            rows, Case("ctkd", {"temperature": temperature}).task(), student, teacher, LABELS[[0] * 6]
        ).columns

        expected = gradient_for_temperature(*both_log_probs(student, teacher), temperature)
        assert error_of_value(columns["temperature_gradient"], expected, temperature) <= 1e-12


# --- tasks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "kd_ratio", "parameters", "message"),
    [
        ("taid", -0.1, {"t": 0.5}, "kd_ratio must lie in [0, 1], got -0.1"),
        ("taid", math.nan, {"t": 0.5}, "kd_ratio must lie in [0, 1], got nan"),
        ("kl", 1.0, {}, "objective 'kl' does not exist (choices: sft, taid, forward_kl,"),
        ("_kl", 1.0, {}, "objective '_kl' does not exist"),
        ("taid", 1.0, {}, "taid needs its parameter 't'"),
        ("ctkd", 1.0, {}, "ctkd needs its parameter 'temperature'"),
        ("taid", 1.0, {"t": 0.5, "beta": 0.1}, "taid has no parameter 'beta' (it has: t, mixture)"),
        ("tvd", 1.0, {"t": 0.5}, "tvd has no parameter 't' (it has: none)"),
        ("sft", 1.0, {"t": 0.5}, "sft has no parameter 't' (it has: none)"),
        ("taid", 1.0, {"t": 2.5}, "t must lie in [0, 2], got 2.5"),
        ("jsd", 1.0, {"beta": 0.0}, "beta must lie strictly between 0 and 1, got 0.0"),
        ("dkd", 1.0, {"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
    ],
)
def test_a_task_that_makes_no_sense_is_refused_with_what_is_wrong(objective, kd_ratio, parameters, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RowTask.for_objective(objective, kd_ratio, parameters, Finish(), Finish())


@pytest.mark.parametrize("objective", ["jsd", "skew_forward_kl", "skew_reverse_kl", "adaptive_kl", "dkd"])
def test_parameters_left_out_are_those_of_the_plain_objective(form, objective):
    student, teacher = random_logits(5, 33)

    result = run(form, Case(objective).task(), student, teacher, LABELS)

    labels = {"labels": LABELS} if objective == "dkd" else {}
    expected = getattr(objectives, objective)(student, teacher, **labels)
    assert_close(result.columns["objective"], expected, rtol=2e-6, atol=0)


# --- the compiled library --------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    shutil.which(os.environ.get("CC", "cc")) is None or os.environ.get("TAID_NATIVE") == "0", reason="no C compiler"
)
def test_where_there_is_a_compiler_float32_tiles_on_a_cpu_go_through_c(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the plain form was called")

    monkeypatch.setattr(c_rows, "rows", refuse)
    student, teacher = random_logits(7, 507)

    run(row_stage, CASES["taid(0.4)"].task(), student, teacher, labels_for(student))

    with pytest.raises(AssertionError, match="the plain form was called"):
        run(row_stage, CASES["taid(0.4)"].task(), student.double(), teacher.double(), labels_for(student))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a compiler that takes half a second."""
    if c_rows._library() is None:
        pytest.skip("there is no C compiler, or TAID_NATIVE=0 asks for the plain form")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(c_rows, "_FLAGS", ["-std=gnu11", "-O0", "-fPIC", "-fopenmp"])
    return tmp_path / "taid"


def test_the_library_is_built_once_and_leaves_nothing_else_in_the_cache(cache):
    library = c_rows._built()
    built_at = library.stat().st_mtime_ns

    assert c_rows._built() == library
    assert library.stat().st_mtime_ns == built_at
    assert list(cache.iterdir()) == [library]


@pytest.mark.parametrize("kept", [0, 5_000, -100])
def test_a_damaged_library_is_built_anew(cache, kept):
    library = c_rows._built()
    whole = library.read_bytes()
    library.write_bytes(whole[:kept])

    again = c_rows._built()

    ctypes.CDLL(str(again))
    assert len(again.read_bytes()) == len(whole)


def test_other_flags_or_another_source_are_another_library(cache, monkeypatch):
    first = c_rows._built()
    monkeypatch.setattr(c_rows, "_FLAGS", ["-std=gnu11", "-O1", "-fPIC", "-fopenmp"])

    assert c_rows._built() != first


SCRIPT = """
import torch
from taid.losses.kernels import c_rows
from taid.losses.kernels.row_task import COLUMNS, Finish, RowTask

c_rows._FLAGS = ["-std=gnu11", "-O0", "-fPIC", "-fopenmp"]
torch.manual_seed(0)
student, teacher = torch.randn(2, 3, 507)
columns = torch.empty(3, len(COLUMNS))
task = RowTask.for_objective("taid", 0.7, {"t": 0.4}, Finish(), Finish())
c_rows.native_rows(student, teacher, torch.tensor([1, 2, 3]), task, columns, gradient=torch.float32)
print(c_rows._library() is not None, *columns.flatten().tolist(), *student[:, ::100].flatten().tolist())
"""


def started(tmp_path, **environment):
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SCRIPT],
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path), **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def numbers(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    is_native, *values = out.split()
    return is_native == "True", torch.tensor([float(value) for value in values])


@pytest.mark.parametrize(
    "environment",
    [{"CC": "/bin/false"}, {"CC": "no-such-compiler"}, {"TAID_NATIVE": "0"}, {"XDG_CACHE_HOME": "/dev/null"}],
    ids=lambda environment: " ".join(f"{name}={value}" for name, value in environment.items()),
)
def test_where_the_library_cannot_be_built_the_plain_form_gives_the_same_values(tmp_path, monkeypatch, environment):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    student, teacher = random_logits(3, 507)
    labels = labels_for(student)
    here = run(rows, CASES["taid(0.4)"].task(0.7), student, teacher, labels)
    library = c_rows._library.__wrapped__

    assert library() is None

    monkeypatch.setattr(c_rows, "_library", library)
    result = run(native_rows, CASES["taid(0.4)"].task(0.7), student, teacher, labels)
    assert torch.equal(result.gradient, here.gradient)
    assert all(torch.equal(result.columns[name], here.columns[name]) for name in COLUMNS)


def test_without_a_home_directory_the_plain_form_takes_over(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)

    assert c_rows._library.__wrapped__() is None


def test_two_processes_that_build_at_once_both_get_a_whole_library(tmp_path):
    if c_rows._library() is None:
        pytest.skip("there is no C compiler, or TAID_NATIVE=0 asks for the plain form")
    processes = [started(tmp_path) for _ in range(2)]

    (first_is_native, first), (second_is_native, second) = map(numbers, processes)

    assert first_is_native
    assert second_is_native
    assert torch.equal(first, second)
    assert all(path.suffix == ".so" for path in (tmp_path / "taid").iterdir())


def compiler(folder, script):
    """A compiler of our own."""
    path = folder / "own-cc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_compiler_may_speak_in_any_encoding(cache, tmp_path, monkeypatch):
    script = '[ "$1" = --version ] && exec cc --version\nprintf "warnung: \\351\\n" >&2\nexec cc "$@"'
    monkeypatch.setenv("CC", compiler(tmp_path, script))
    assert c_rows._library.__wrapped__() is not None


def test_a_library_without_the_kernel_is_none(cache, tmp_path, monkeypatch):
    script = '[ "$1" = --version ] && exec cc --version\nfor last; do :; done\ncase "$*" in\n*-c*) eval "out=\\${$#}"; '
    script += 'echo "int nothing;" | exec cc -fPIC -x c -c - -o "$out" ;;\n*) exec cc "$@" ;;\nesac'
    monkeypatch.setenv("CC", compiler(tmp_path, script))
    assert c_rows._library.__wrapped__() is None


def test_a_link_that_leads_nowhere_is_replaced(cache):
    library = c_rows._built()
    library.unlink()
    library.symlink_to(cache / "gone")
    assert c_rows._built().is_file()


def test_a_killed_build_leaves_nothing_in_the_cache(tmp_path):
    if c_rows._library() is None:
        pytest.skip("there is no C compiler, or TAID_NATIVE=0 asks for the plain form")
    slow = compiler(tmp_path, '[ "$1" = --version ] || sleep 5\nexec cc "$@"')
    process = started(tmp_path, CC=slow, TMPDIR=str(tmp_path))
    deadline = time.time() + 60
    while not list(tmp_path.glob("tmp*")) and time.time() < deadline:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert list((tmp_path / "taid").iterdir()) == []
