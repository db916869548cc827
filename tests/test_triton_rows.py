"""The Triton kernel held against the plain form in float64: interpreted on a CPU, compiled where there is a GPU."""

import math
import os
import re
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    if "triton" in sys.modules:
        pytest.skip("TRITON_INTERPRET=1 must be set before triton is imported", allow_module_level=True)
    os.environ["TRITON_INTERPRET"], INTERPRETED = "1", True
pytest.importorskip("triton", reason="there is no triton for this platform")

from taid.losses.kernels import triton_rows  # noqa: E402
from taid.losses.kernels.row_task import COLUMNS, Finish, RowTask  # noqa: E402
from taid.losses.kernels.torch_rows import rows  # noqa: E402
from taid.losses.objective_table import OBJECTIVES  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
PARAMETERS = {
    "taid": {"t": 0.4},
    "forward_kl": {},
    "reverse_kl": {},
    "jsd": {"beta": 0.1},
    "tvd": {},
    "skew_forward_kl": {"skew": 0.1},
    "skew_reverse_kl": {"skew": 0.1},
    "adaptive_kl": {"head_mass": 0.5},
    "dkd": {"alpha": 1.0, "beta": 8.0, "temperature": 4.0},
    "ctkd": {"temperature": 3.0},
    "abkd": {"alpha": 0.2, "beta": 0.7},
    "amid": {"mixture": 0.5, "share": 0.5, "alpha": 0.2, "beta": 0.7},
    "mixture_taid": {"t": 0.4, "mixture": -1.0},
    "sft": {},
}
assert {*OBJECTIVES, "mixture_taid"} == set(PARAMETERS)
every_objective = pytest.mark.parametrize("objective", PARAMETERS)


class Result(NamedTuple):
    columns: Tensor
    gradient: Tensor


class Problem(NamedTuple):
    """Two models' products for M rows of V ids, with labels and finishes."""

    student: Tensor
    teacher: Tensor | None
    labels: Tensor
    finishes: tuple[Finish, Finish] = (Finish(), Finish())

    @classmethod
    def random(cls, M, V, *, gap=1.0, offset=0.0, seed=0):
        generator = torch.Generator().manual_seed(seed)
        student, other = (torch.randn(M, V, generator=generator) * s for s in (3.0, gap))
        labels = torch.randint(V, (M,), generator=generator)
        return cls(*(z.to(DEVICE) for z in (student + offset, student + other + offset, labels)))

    def finished(self, seed=0):
        """With biases, scales and caps, such that the logits stay below 8."""
        generator = torch.Generator().manual_seed(seed)
        biases = [torch.randn(self.student.shape[1], generator=generator).to(DEVICE) for _ in range(2)]
        return self._replace(finishes=(Finish(biases[0], 1.2, 8.0), Finish(biases[1], 0.7, 6.0)))

    def task(self, objective, kd_ratio=1.0, *, exact=False, **parameters):
        finishes = [
            Finish(f.bias.double() if exact and f.bias is not None else f.bias, f.scale, f.softcap)
            for f in self.finishes
        ]
        parameters = PARAMETERS[objective] | parameters
        return RowTask.for_objective(objective.removeprefix("mixture_"), kd_ratio, parameters, *finishes)

    def plain(self, *arguments, dtype=torch.float64, **parameters):
        M, K = len(self.student), len(COLUMNS)
        columns = torch.empty(M, K, dtype=dtype, device=DEVICE)
        task = self.task(*arguments, exact=dtype == torch.float64, **parameters)
        teacher = None if self.teacher is None else self.teacher.to(dtype, copy=True)
        gradient = rows(self.student.to(dtype, copy=True), teacher, self.labels, task, columns, gradient=dtype)
        return Result(columns, gradient)

    def kernel(self, *arguments, gradient=torch.float32, **parameters):
        columns = torch.full((len(self.student), len(COLUMNS)), math.nan, device=DEVICE)
        student, teacher = in_tile(self.student), None if self.teacher is None else in_tile(self.teacher)
        out = triton_rows.rows(
            student, teacher, self.labels, self.task(*arguments, **parameters), columns, gradient=gradient
        )
        return Result(columns, out)

    def likeliest(self):
        """The student's largest probability in each row: what a gradient's rounding is to be measured by."""
        z = self.student.double()
        self.task("sft", exact=True).student.apply(z)
        return z.softmax(-1).amax(-1, keepdim=True)


def in_tile(values):
    """Rows at multiples of 64 numbers, NaN between them."""
    M, V = values.shape
    tile = torch.full((M, -(-V // 64) * 64), math.nan, device=values.device)[:, :V]
    return tile.copy_(values)


def assert_near(actual, exact, problem, tolerance=2e-6):
    scale = exact.gradient.abs().amax(-1, keepdim=True).clamp(min=problem.likeliest())
    assert ((actual.gradient - exact.gradient).abs() / scale).max() <= tolerance
    assert ((actual.columns - exact.columns).abs() / exact.columns.abs().clamp(min=1)).max() <= tolerance


@every_objective
@pytest.mark.parametrize("kd_ratio", [1.0, 0.7])
@pytest.mark.parametrize("finished", [False, True], ids=["bare", "finished"])
def test_columns_and_gradient(objective, kd_ratio, finished):
    problem = Problem.random(2, 252)
    problem = problem.finished() if finished else problem
    assert_near(problem.kernel(objective, kd_ratio), problem.plain(objective, kd_ratio), problem)


@every_objective
@pytest.mark.parametrize(("M", "V"), [(1, 1), (7, 48), (1, 5003)])
def test_shapes(objective, M, V):
    problem = Problem.random(M, V, seed=M)
    assert_near(problem.kernel(objective, 0.7), problem.plain(objective, 0.7), problem)


@pytest.mark.parametrize("kd_ratio", [1.0, 0.0])
def test_without_a_teacher(kd_ratio):
    problem = Problem.random(2, 507)._replace(teacher=None)
    assert_near(problem.kernel("sft"), problem.plain("sft"), problem)


def test_labels_alone_with_a_teacher_to_report_on():
    problem = Problem.random(2, 48)
    assert_near(problem.kernel("taid", 0.0), problem.plain("taid", 0.0), problem)


@pytest.mark.parametrize(
    ("objective", "dtype"), [*((name, torch.bfloat16) for name in PARAMETERS), ("taid", torch.float16)], ids=str
)
def test_half_precision_gradient_lies_in_the_tile(objective, dtype, monkeypatch):
    monkeypatch.setattr(triton_rows, "_BLOCK", 128)  # four blocks
    problem = Problem.random(2, 507)
    exact = problem.kernel(objective, 0.7)
    half = problem.kernel(objective, 0.7, gradient=dtype)
    assert half.gradient.dtype == dtype
    assert half.gradient.stride() == (2 * 512, 1)
    assert half.gradient.untyped_storage().nbytes() == 2 * 512 * 4
    assert_close(half.columns, exact.columns, rtol=0, atol=0)
    unit = torch.finfo(dtype).eps
    assert_close(half.gradient.float(), exact.gradient, rtol=unit, atol=2.0**-24)
    assert_near(exact, problem.plain(objective, 0.7), problem)


@every_objective
def test_without_a_gradient(objective):
    problem = Problem.random(2, 252)
    with_gradient, without = problem.kernel(objective), problem.kernel(objective, gradient=None)
    assert_close(without.columns, with_gradient.columns, rtol=0, atol=0)
    assert_close(without.gradient, problem.student, rtol=0, atol=0)


@every_objective
def test_ids_masked_by_both_are_no_ids(objective, monkeypatch):
    monkeypatch.setattr(triton_rows, "_BLOCK", 64)
    problem = Problem.random(2, 252)
    mask = torch.zeros(252, device=DEVICE)
    mask[100:] = -math.inf
    problem = problem._replace(labels=problem.labels % 100, finishes=(Finish(mask), Finish(mask)))
    fewer = problem._replace(
        student=problem.student[:, :100], teacher=problem.teacher[:, :100], finishes=(Finish(), Finish())
    )
    actual, exact = problem.kernel(objective, 0.7), fewer.plain(objective, 0.7)
    assert actual.gradient[:, 100:].eq(0).all()
    assert_near(Result(actual.columns, actual.gradient[:, :100]), exact, fewer)


@every_objective
def test_an_id_masked_by_the_teacher(objective):
    problem = Problem.random(2, 48)
    mask = torch.zeros(48, device=DEVICE)
    mask[problem.labels[0] - 1] = -math.inf
    problem = problem._replace(finishes=(Finish(), Finish(mask)))
    actual, exact = problem.kernel(objective, 0.7), problem.plain(objective, 0.7)
    finite = exact.columns.abs() < 1e20  # the others are 1e30 times a probability
    assert_close(actual.columns[finite].double(), exact.columns[finite], rtol=1e-4, atol=1e-4)
    assert_close(actual.columns[~finite].double(), exact.columns[~finite], rtol=1e-4, atol=0)
    assert actual.gradient.isfinite().all()
    assert (actual.gradient - exact.gradient).abs().max() <= 1e-5 * exact.gradient.abs().max()


@every_objective
def test_an_id_masked_by_the_student_leaves_finite_numbers(objective):
    problem = Problem.random(2, 48)
    mask = torch.zeros(48, device=DEVICE)
    mask[problem.labels[0] - 1] = -math.inf
    actual = problem._replace(finishes=(Finish(mask), Finish())).kernel(objective, 0.7)
    assert actual.columns.isfinite().all()
    assert actual.gradient.isfinite().all()


def test_dkd_where_the_teacher_knows_the_label_alone():
    problem = Problem.random(1, 48)
    mask = torch.full((48,), -math.inf, device=DEVICE)
    mask[problem.labels[0]] = 0
    problem = problem._replace(finishes=(Finish(), Finish(mask)))
    assert_near(problem.kernel("dkd"), problem.plain("dkd"), problem)


@every_objective
def test_huge_logits(objective, monkeypatch):
    monkeypatch.setattr(triton_rows, "_BLOCK", 64)
    problem = Problem.random(1, 252, offset=-1e4)
    assert_near(problem.kernel(objective, 0.7), problem.plain(objective, 0.7), problem)


@every_objective
def test_logits_far_apart(objective, monkeypatch):
    monkeypatch.setattr(triton_rows, "_BLOCK", 64)
    problem = Problem.random(2, 252)
    problem = problem._replace(student=problem.student * 1e3, teacher=problem.teacher * 1e3)
    assert_near(problem.kernel(objective, 0.7), problem.plain(objective, 0.7), problem, 1e-5)


@every_objective
def test_close_models_keep_the_digits_that_the_plain_form_keeps(objective):
    problem = Problem.random(4, 252, gap=1e-3)
    exact, actual = problem.plain(objective), problem.kernel(objective)
    plain = problem.plain(objective, dtype=torch.float32)
    scale = exact.gradient.abs().amax(-1, keepdim=True)
    error, allowed = (((form.gradient - exact.gradient).abs() / scale).max() for form in (actual, plain))
    assert error <= max(3 * allowed, 2e-6)
    error, allowed = ((form.columns - exact.columns)[:, 0].abs().max() for form in (actual, plain))
    assert error <= max(3 * allowed, 1e-7 * exact.columns[:, 0].max())


def test_t_of_0_and_1():
    problem = Problem.random(2, 252)
    nothing = problem.kernel("taid", t=0.0)
    assert nothing.gradient.eq(0).all()
    assert nothing.columns[:, 0].eq(0).all()
    assert_close(problem.kernel("taid", t=1.0).gradient, problem.kernel("forward_kl").gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mixture", [-1.0, 3.0])
@pytest.mark.parametrize("t", [0.0, 1.0])
@pytest.mark.parametrize("masks", [(False, False), (False, True), (True, False)], ids=str)
def test_at_the_ends_every_mixture_is_one(masks, t, mixture):
    problem = Problem.random(2, 48)
    mask = torch.zeros(48, device=DEVICE)
    mask[problem.labels[0] - 1] = -math.inf
    problem = problem._replace(finishes=tuple(Finish(mask if masked else None) for masked in masks))
    actual, expected = problem.kernel("mixture_taid", t=t, mixture=mixture), problem.kernel("taid", t=t)
    assert_close(actual.columns, expected.columns, rtol=1e-6, atol=1e-6)
    assert_close(actual.gradient, expected.gradient, rtol=0, atol=1e-6)


MEANS = [("mixture_taid", {"mixture": m, "t": t}) for m, t in ((0.5, 0.1), (3.0, 0.9), (-5.0, 0.5), (0.9999, 0.4))]
MEANS += [("amid", {"mixture": m, "share": s}) for m, s in ((1.0, 0.1), (-1.0, 0.9), (3.0, 0.5), (0.9999, 0.4))]
POWERS = [
    (name, {"alpha": a, "beta": b}) for name in ("abkd", "amid") for a, b in ((0.0, 0.9), (0.6, 0.0), (1e-3, 2.0))
]


@pytest.mark.parametrize(("objective", "parameters"), MEANS + POWERS, ids=str)
def test_other_means_and_powers(objective, parameters):
    problem = Problem.random(4, 252)
    assert_near(problem.kernel(objective, **parameters), problem.plain(objective, **parameters), problem)


@pytest.mark.parametrize(("objective", "name"), [("taid", "t"), ("mixture_taid", "t"), ("ctkd", "temperature")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_moves_may_be_a_tensor(objective, name, dtype):
    problem, number = Problem.random(2, 48), PARAMETERS[objective][name]
    of_tensor = problem.kernel(objective, **{name: torch.tensor(number, dtype=dtype, device=DEVICE)})
    for a, b in zip(of_tensor, problem.kernel(objective), strict=True):
        assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("objective", ["skew_forward_kl", "skew_reverse_kl"])
def test_no_skew(objective):
    problem = Problem.random(2, 48)
    for a, b in zip(problem.kernel(objective, skew=0.0), problem.kernel(objective[5:]), strict=True):
        assert_close(a, b, rtol=0, atol=0)


def test_no_share():
    problem = Problem.random(2, 48)
    for a, b in zip(problem.kernel("amid", share=0.0), problem.kernel("abkd"), strict=True):
        assert_close(a, b, rtol=0, atol=0)


@every_objective
def test_nan_is_not_lost(objective):
    problem = Problem.random(2, 48)
    problem.student[0, 5] = math.nan
    actual = problem.kernel(objective, 0.7)
    assert actual.gradient[0].isnan().all()
    assert actual.columns[0, COLUMNS.index("cross_entropy")].isnan()
    assert actual.gradient[1].isfinite().all()


COMPILE = """
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from taid.losses.kernels.triton_rows import _TO_TARGET, _Gradient, _row_kernel, _Tile

names = _row_kernel.arg_names
tile = _Tile("*fp32", "i32", "constexpr", "fp32", "constexpr")
signature = dict.fromkeys(names, "fp32") | {
    "student": tile, "teacher": tile, "gradient": _Gradient("*bf16", "i32"), "labels": "*i64", "columns": "*fp32",
    "t_or_T": "*fp32", "V": "i32", "OBJECTIVE": "constexpr", "TO_TARGET": "constexpr", "BLOCK": "constexpr",
}
constants = {"OBJECTIVE": sys.argv[1], "TO_TARGET": sys.argv[1] in _TO_TARGET, "BLOCK": 2048}
constants |= {(names.index(name), i): None for name in ("student", "teacher") for i in (2, 4)}
divisible = {(i, j): [["tt.divisibility", 16]] for i in range(3) for j in range(2)}  # pointers and strides, not V
source = ASTSource(_row_kernel, signature, constants, divisible)
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"])
"""


def compiled(objective, cache):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, objective], env=environment, capture_output=True, text=True, check=True
    )
    return run.stdout


@pytest.mark.parametrize("objective", ["mixture_taid", "abkd", "amid"])
def test_what_the_interpreter_takes_the_compiler_takes(objective, tmp_path):
    # In a loop a name may not change its shape, of which the interpreter knows nothing.
    assert ".target sm_90" in compiled(objective, tmp_path)


def test_loads_are_16_bytes_wide_for_any_vocabulary(tmp_path):
    ptx = compiled("taid", tmp_path)
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == 2 * 2 * 2  # sweeps, models, halves of 8 ids a thread
    assert len(re.findall(r"ld\.global\.b", ptx)) == 4  # the label, t and two logits
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == 1  # 8 gradients


@pytest.mark.parametrize("bias", [torch.full((1,), 2.0).expand(300), torch.linspace(-1, 1, 600)[::2]])
def test_a_bias_that_is_not_contiguous_is_read_as_what_it_is(bias):
    torch.manual_seed(0)
    tile, labels = torch.randn(4, 304)[:, :300], torch.tensor([0, 7, 150, 299])
    found = []
    for form in (triton_rows.rows, rows):
        task = RowTask.for_objective("sft", 1.0, {}, Finish(bias), Finish())
        columns = torch.empty(4, len(COLUMNS))
        form(_padded(tile), None, labels, task, columns, gradient=None)
        found.append(columns)
    torch.testing.assert_close(*found)


def _padded(tile):
    wide = torch.zeros(len(tile), 304)
    wide[:, :300] = tile
    return wide[:, :300]
