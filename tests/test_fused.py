"""The fused loss held against its contract, the plain formula of its docstring, in float64."""

import math
import re
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from taid import objectives
from taid.losses import fused
from taid.losses.distillation import distillation_loss
from taid.losses.fused import Head, fused_distillation_loss
from taid.losses.kernels import c_rows, head_matmul
from test_kernels import CASES, INF, REFERENCES, Case, every_case, only, without
from test_objectives import reference_target


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On tensors as small as these, waking a second thread takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Inputs:
    """The arguments of the fused loss."""

    student_hidden: torch.Tensor
    student_head: Head
    teacher_hidden: torch.Tensor | None
    teacher_head: Head | None
    labels: torch.Tensor

    def __iter__(self):
        return iter((self.student_hidden, self.student_head, self.teacher_hidden, self.teacher_head, self.labels))


def inputs(N, V, D=48, E=40, *, dtype=torch.float32, teacher_dtype=None, padding=(0, 0), bias=False, scale=1.0,
           softcap=None, trained=0.7, seed=0):  # fmt: skip
    """Logits of a standard deviation of 3; about a third of the tokens are not trained."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, of=torch.float64):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(of)

    sides = []
    for width, extra, of in ((D, padding[0], dtype), (E, padding[1], teacher_dtype or dtype)):
        weight = (3 / width**0.5 * random(V + extra, width)).to(of)
        head = Head(weight, random(V + extra, of=of) if bias else None, scale, softcap)
        sides += [random(N, width, of=of), head]
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[torch.rand(N, generator=generator) >= trained] = -100
    return Inputs(*sides, labels)


def as_float64(given_):
    return replace(
        given_,
        student_hidden=given_.student_hidden.double(),
        student_head=head_in_float64(given_.student_head),
        teacher_hidden=given_.teacher_hidden.double(),
        teacher_head=head_in_float64(given_.teacher_head),
    )


def head_in_float64(head):
    return replace(head, weight=head.weight.double(), bias=None if head.bias is None else head.bias.double())


@dataclass(frozen=True)
class Result:
    """A loss and its gradients, by the names hidden, weight, bias and temperature."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


def leaves(given_, parameters):
    """Copies that require a gradient, and the inputs with them in place."""
    hidden, head = given_.student_hidden.clone().requires_grad_(), given_.student_head
    weight = head.weight.clone().requires_grad_()
    bias = None if head.bias is None else head.bias.clone().requires_grad_()
    named = {"hidden": hidden, "weight": weight, "bias": bias, "temperature": parameters.get("temperature")}
    named = {name: leaf for name, leaf in named.items() if isinstance(leaf, torch.Tensor) and leaf.requires_grad}
    return named, replace(given_, student_hidden=hidden, student_head=replace(head, weight=weight, bias=bias))


def run(given_, case, kd_ratio=1.0, **others):
    named, given_ = leaves(given_, case.parameters)
    loss = fused_distillation_loss(*given_, case.objective, kd_ratio=kd_ratio, **case.parameters, **others).loss
    loss.backward()
    return Result(loss.detach(), {name: leaf.grad for name, leaf in named.items()})


def plain_loss(given_, case, kd_ratio, vocabulary_size=None):
    """The contract: in the dtype of the inputs as far as the logits, then by the formulas in float64."""
    trained = given_.labels != -100
    labels = given_.labels[trained]
    student = given_.student_head.logits(given_.student_hidden[trained])[:, :vocabulary_size]
    teacher = given_.teacher_head.logits(given_.teacher_hidden[trained])[:, :vocabulary_size]
    log_q, log_p = (torch.log_softmax(logits.double(), -1) for logits in (student, teacher))
    loss = REFERENCES[case.objective](log_q, log_p.detach(), labels, **case.parameters)
    kd_ratio = 0.0 if case.objective == "sft" else kd_ratio
    return (kd_ratio * loss - (1 - kd_ratio) * log_q.gather(-1, labels[:, None])[:, 0]).sum()


def truth(given_, case, kd_ratio=1.0, vocabulary_size=None):
    named, given_ = leaves(as_float64(given_), case.parameters)
    loss = plain_loss(given_, case, kd_ratio, vocabulary_size)
    loss.backward()
    return Result(loss.detach(), {name: leaf.grad for name, leaf in named.items()})


def error(actual, expected):
    """Return the relative error of a whole tensor, by the Euclidean norm."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


def assert_near(result, expected, bound):
    assert result.gradients.keys() == expected.gradients.keys()
    assert error(result.loss, expected.loss) <= bound
    for name, gradient in expected.gradients.items():
        assert error(result.gradients[name], gradient) <= bound, name


def many_chunks(monkeypatch, rows=5):
    monkeypatch.setattr(fused, "chunk_rows", lambda *_: rows)


TAID = CASES["taid(0.4)"]


# --- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kd_ratio", [1.0, 0.7])
@every_case
def test_loss_and_gradients_equal_the_plain_formula_to_1e_12_in_float64(case, kd_ratio):
    for N, V in ((1, 252), (7, 507), (123, 252)):
        given_ = inputs(N, V, dtype=torch.float64, bias=True, trained=0.7 if N > 1 else 1.0)

        assert_near(run(given_, case, kd_ratio), truth(given_, case, kd_ratio), 1e-12)


@pytest.mark.parametrize("kd_ratio", [1.0, 0.7])
@every_case
def test_loss_and_gradients_equal_the_plain_formula_to_2e_6_in_float32(case, kd_ratio):
    for N, V in ((1, 507), (7, 252), (123, 507)):
        given_ = inputs(N, V, bias=True, trained=0.7 if N > 1 else 1.0)

        assert_near(run(given_, case, kd_ratio), truth(given_, case, kd_ratio), 2e-6)


@pytest.mark.parametrize(("scale", "softcap"), [(0.25, None), (1.0, 5.0), (0.5, 2.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@only("taid", "jsd", "dkd", "sft")
def test_scale_and_softcap_of_a_head_are_part_of_the_formula(case, dtype, scale, softcap):
    given_ = inputs(23, 252, dtype=dtype, bias=True, scale=scale, softcap=softcap)

    assert_near(run(given_, case, 0.7), truth(given_, case, 0.7), 1e-12 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("kd_ratio", [1.0, 0.7])
@every_case
def test_the_plain_form_that_the_package_offers_gives_the_same_loss_gradients_and_sums(case, kd_ratio):
    named, given_ = leaves(inputs(23, 252, bias=True), {})
    trained = given_.labels != -100
    student = given_.student_head.logits(given_.student_hidden[trained])
    teacher = given_.teacher_head.logits(given_.teacher_hidden[trained])
    plain = distillation_loss(
        student, teacher, given_.labels[trained], case.objective, kd_ratio=kd_ratio, **case.parameters
    )
    plain.loss.backward()
    expected = {name: leaf.grad.clone() for name, leaf in named.items()}

    result = fused_distillation_loss(*given_, case.objective, kd_ratio=kd_ratio, **case.parameters)

    gradients = torch.autograd.grad(result.loss, list(named.values()))
    # tvd's gradient has steps, and the plain one's divergences their own rounding.
    assert error(result.loss, plain.loss.double()) <= 5e-6
    for (name, gradient), actual in zip(expected.items(), gradients, strict=True):
        assert error(actual, gradient.double()) <= 1e-5, name
    assert result.sums.keys() == plain.sums.keys()
    for name, value in plain.sums.items():
        assert_close(result.sums[name], value, rtol=1e-5, atol=1e-5, msg=name)


SIZES = st.integers(1, 8)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    case=st.sampled_from(list(CASES.values())),
    shape=st.tuples(SIZES, st.integers(2, 40), SIZES, SIZES),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    kd_ratio=st.sampled_from([0.0, 0.3, 1.0]),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.3]),
    softcap=st.sampled_from([None, 4.0]),
    rows=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_any_shapes_heads_parameters_and_chunks_give_the_plain_formula_in_float64(
    case, shape, padding, kd_ratio, bias, scale, softcap, rows, seed
):
    N, V, D, E = shape
    given_ = inputs(
        N,
        V,
        D,
        E,
        dtype=torch.float64,
        padding=padding,
        bias=bias,
        scale=scale,
        softcap=softcap,
        trained=0.8,
        seed=seed,
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        many_chunks(monkeypatch, rows)
        result = run(given_, case, kd_ratio, vocabulary_size=V)

    expected = truth(given_, case, kd_ratio, V)
    # Of one token, loss and gradient can be far smaller than the terms that they are made of.
    assert_close(result.loss, expected.loss, rtol=1e-10, atol=1e-12 * case.scale * N)
    for name, gradient in expected.gradients.items():
        assert_close(result.gradients[name], gradient, rtol=1e-10, atol=1e-11 * case.gradient_scale)


# --- chunks and memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 5, 16, 200])
@only("taid", "jsd", "ctkd")
def test_the_result_does_not_depend_on_the_chunks(monkeypatch, case, rows):
    given_ = inputs(123, 252, dtype=torch.float64, bias=True)
    expected = run(given_, case, 0.7)
    many_chunks(monkeypatch, rows)

    assert_near(run(given_, case, 0.7), expected, 1e-13)


@pytest.mark.parametrize(
    ("device", "itemsize", "most", "budget", "unit"),
    [("cpu", 4, 512, 400 * 2**20, 16), ("cpu", 2, 704, 240 * 2**20, 64), ("cuda", 4, 2**14, 2**31, 1)],
)
@pytest.mark.parametrize("V", [2, 32_000, 151_936, 10**9])
def test_chunks_are_of_equal_size_within_a_budget_and_no_more_than_the_tokens(V, device, itemsize, most, budget, unit):
    for N in (0, 1, 2, 511, 512, 513, 8_192, 100_000):
        rows = fused.chunk_rows(N, V, itemsize, device)

        assert 1 <= rows <= max(1, N)
        assert rows <= most
        assert rows == 1 or 2 * rows * V * itemsize <= budget
        chunks = -(-N // rows)
        # The last one lacks less than a row for each of the others, or less than a block of rows.
        assert chunks * rows - N < unit * max(1, chunks)
        assert rows % unit == 0 or rows == max(1, N) or 2 * unit * V * itemsize > budget


class Allocations(TorchDispatchMode):
    """The storages that operators return, by address: the number of elements of the largest tensor in each."""

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.sizes[storage.data_ptr()] = max(
                    self.sizes.get(storage.data_ptr(), 0), storage.nbytes() // tensor.itemsize
                )
        return result


@pytest.mark.parametrize("bfloat16", [None, False, True])
@pytest.mark.parametrize("N", [64, 512])
def test_whatever_the_number_of_tokens_there_are_two_tiles_and_nothing_as_large(monkeypatch, N, bfloat16):
    rows, V = 32, 1_000
    monkeypatch.setattr("taid.losses.kernels.cpu_matmul.has_bfloat16", lambda: bool(bfloat16))
    monkeypatch.setattr("taid.losses.kernels.cpu_matmul._SLAB", 100)
    many_chunks(monkeypatch, rows)
    given_ = inputs(N, V, 4, 4, trained=1.0, dtype=torch.float32 if bfloat16 is None else torch.bfloat16)
    _, given_ = leaves(given_, {})

    with Allocations() as allocations:
        fused_distillation_loss(*given_, "taid", t=0.4).loss.backward()

    tile = rows * 1_024
    # The plain form's scratch, of eight blocks, serves half-precision tiles too; it does not grow either.
    scratch = 8 * rows * V
    large = sorted(size for size in allocations.sizes.values() if size > tile / 2)
    assert all(size in (tile, scratch, rows * V) for size in large), large
    if bfloat16 is None and c_rows._library() is not None:
        assert large == [tile, tile]


@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_tiles_are_gone_when_a_half_precision_gradient_is_rounded(monkeypatch, bfloat16):
    monkeypatch.setattr("taid.losses.kernels.cpu_matmul.has_bfloat16", lambda: bfloat16)
    many_chunks(monkeypatch, 32)
    tiles, sizes = [], []
    tile, outer_sum = head_matmul.HeadProducts.tile, head_matmul.HeadProducts.outer_sum

    def seen(products, rows):
        tiles.append(tile(products, rows))
        return tiles[-1]

    def looked_at(products):
        sizes.extend(tile.untyped_storage().nbytes() for tile in tiles)
        return outer_sum(products)

    monkeypatch.setattr(head_matmul.HeadProducts, "tile", seen)
    monkeypatch.setattr(head_matmul.HeadProducts, "outer_sum", looked_at)
    _, given_ = leaves(inputs(64, 1_000, 4, 4, dtype=torch.bfloat16), {})

    fused_distillation_loss(*given_, "taid", t=0.4).loss.backward()

    assert sizes == [0, 0]


@pytest.mark.parametrize("bfloat16", [None, False, True])
@only("taid(0.4)", "jsd(0.1)", "adaptive_kl(0.5)", "dkd(1.0, 8.0, 4.0)", "ctkd(0.7)", "sft")
def test_what_memory_holds_before_it_is_written_does_not_matter(monkeypatch, case, bfloat16):
    monkeypatch.setattr("taid.losses.kernels.cpu_matmul.has_bfloat16", lambda: bool(bfloat16))
    monkeypatch.setattr(head_matmul, "_SLAB", 100)
    many_chunks(monkeypatch)
    dtype = torch.float32 if bfloat16 is None else torch.bfloat16
    given_ = inputs(23, 507, dtype=dtype, bias=True, padding=(5, 5))
    expected = run(given_, case, 0.7, vocabulary_size=507)

    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert torch.empty(1).isnan()
        result = run(given_, case, 0.7, vocabulary_size=507)
    finally:
        torch.use_deterministic_algorithms(False)

    assert torch.equal(result.loss, expected.loss)
    for name, gradient in expected.gradients.items():
        assert torch.equal(result.gradients[name], gradient), name


# --- tokens that are not trained -------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [0, 5])
@pytest.mark.parametrize("kd_ratio", [1.0, 0.7])
@every_case
def test_without_a_trained_token_loss_sums_and_gradients_are_zero(case, kd_ratio, N):
    given_ = inputs(N, 252, bias=True, trained=0.0)

    result = run(given_, case, kd_ratio)

    assert result.loss == 0
    assert set(result.gradients) == {"hidden", "weight", "bias"}
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in result.gradients.values())
    sums = fused_distillation_loss(*given_, case.objective, kd_ratio=kd_ratio, **case.parameters).sums
    assert all(value == 0 for value in sums.values())


@every_case
def test_untrained_tokens_are_as_if_they_were_not_there_even_where_they_are_nan(case):
    given_ = inputs(23, 252, bias=True)
    trained = given_.labels != -100
    assert 0 < trained.sum() < 23
    alone = run(
        replace(
            given_,
            student_hidden=given_.student_hidden[trained],
            teacher_hidden=given_.teacher_hidden[trained],
            labels=given_.labels[trained],
        ),
        case,
    )
    broken = [hidden.clone() for hidden in (given_.student_hidden, given_.teacher_hidden)]
    for hidden, what in zip(broken, (math.nan, INF), strict=True):
        hidden[~trained] = what

    result = run(replace(given_, student_hidden=broken[0], teacher_hidden=broken[1]), case)

    assert torch.equal(result.loss, alone.loss)
    assert torch.equal(result.gradients["hidden"][trained], alone.gradients["hidden"])
    assert (result.gradients["hidden"][~trained] == 0).all()
    assert torch.equal(result.gradients["weight"], alone.gradients["weight"])


def test_one_trained_token_among_many(monkeypatch):
    given_ = inputs(123, 507, bias=True)
    given_.labels[:] = -100
    given_.labels[77] = 506
    many_chunks(monkeypatch)

    assert_near(run(given_, TAID, 0.7), truth(given_, TAID, 0.7), 2e-6)


def test_a_nan_in_a_trained_token_reaches_the_loss():
    given_ = inputs(23, 252, trained=1.0)
    given_.student_hidden[4, 3] = math.nan

    assert fused_distillation_loss(*given_, "taid", t=0.4).loss.isnan()


@pytest.mark.parametrize("num_trained", [None, 0, 1])
def test_the_number_of_trained_tokens_may_be_given_and_has_to_be_right(num_trained):
    given_ = inputs(23, 252)
    number = int((given_.labels != -100).sum())

    assert torch.equal(run(given_, TAID, num_trained=number).loss, run(given_, TAID).loss)
    if num_trained is not None:
        with pytest.raises(ValueError, match=f"num_trained is {num_trained}, but {number} labels are not -100"):
            run(given_, TAID, num_trained=num_trained)


# --- shapes, dtypes and heads ----------------------------------------------------------------------------------------


def test_leading_shapes_are_those_of_the_labels():
    flat = inputs(24, 252)
    batched = replace(
        flat,
        student_hidden=flat.student_hidden.view(2, 3, 4, -1),
        teacher_hidden=flat.teacher_hidden.view(2, 3, 4, -1),
        labels=flat.labels.view(2, 3, 4),
    )

    result, expected = run(batched, TAID), run(flat, TAID)

    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(result.gradients["hidden"], expected.gradients["hidden"].view(2, 3, 4, -1))
    assert torch.equal(result.gradients["weight"], expected.gradients["weight"])


def test_hidden_states_may_be_views_of_something_longer():
    given_ = inputs(24, 252)
    shifted = {
        name: torch.stack([hidden, hidden + 1], 1)[:, 0]
        for name, hidden in (("student_hidden", given_.student_hidden), ("teacher_hidden", given_.teacher_hidden))
    }
    labels = torch.stack([given_.labels, given_.labels * 0], 1)[:, 0]

    assert torch.equal(run(replace(given_, labels=labels, **shifted), TAID).loss, run(given_, TAID).loss)


def test_a_weight_alone_is_a_head():
    given_ = inputs(23, 252)
    weights = replace(given_, student_head=given_.student_head.weight, teacher_head=given_.teacher_head.weight)

    assert torch.equal(
        fused_distillation_loss(*weights, "taid", t=0.4).loss, fused_distillation_loss(*given_, "taid", t=0.4).loss
    )


@pytest.mark.parametrize("padding", [(5, 0), (0, 5), (5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@only("taid", "adaptive_kl", "dkd")
def test_padded_rows_of_either_head_are_no_tokens_and_get_a_zero_gradient(case, padding, dtype):
    given_ = inputs(23, 507, padding=padding, bias=True, dtype=dtype)
    for head, extra in ((given_.student_head, padding[0]), (given_.teacher_head, padding[1])):
        head.weight[507:] = math.nan if extra else 0.0

    result = run(given_, case, 0.7, vocabulary_size=507)

    expected = run(
        replace(given_, **{f"{role}_head": cut(getattr(given_, f"{role}_head")) for role in ("student", "teacher")}),
        case,
        0.7,
    )
    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(result.gradients["hidden"], expected.gradients["hidden"])
    for name in ("weight", "bias"):
        assert torch.equal(result.gradients[name][:507], expected.gradients[name])
        assert torch.equal(result.gradients[name][507:], torch.zeros_like(result.gradients[name][507:]))


def cut(head):
    return replace(head, weight=head.weight[:507].clone(), bias=head.bias[:507].clone())


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize(
    ("dtype", "teacher_dtype"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float16)],
)
def test_student_and_teacher_may_differ_in_width_and_dtype(monkeypatch, dtype, teacher_dtype, bfloat16):
    monkeypatch.setattr("taid.losses.kernels.cpu_matmul.has_bfloat16", lambda: bfloat16)
    given_ = inputs(23, 252, 48, 72, dtype=dtype, teacher_dtype=teacher_dtype, bias=True)

    result = run(given_, TAID, 0.7)

    # A bfloat16 tile holds rounded logits; its weight's and hidden states' gradients are rounded in any case.
    rounded = bfloat16 and torch.bfloat16 in (dtype, teacher_dtype)
    expected = truth(given_, TAID, 0.7)
    assert error(result.loss, expected.loss) <= (2e-3 if rounded else 2e-6)
    for name, gradient in expected.gradients.items():
        assert result.gradients[name].dtype == dtype
        assert error(result.gradients[name], gradient) <= (
            1e-2 if rounded else 2e-6 if dtype == torch.float32 else 2e-3
        )


def test_hidden_states_of_another_precision_than_the_heads_take_the_heads():
    given_ = inputs(23, 252)
    half = replace(
        given_, student_hidden=given_.student_hidden.bfloat16(), teacher_hidden=given_.teacher_hidden.double()
    )
    same = replace(half, student_hidden=half.student_hidden.float(), teacher_hidden=half.teacher_hidden.float())

    result, expected = run(half, TAID), run(same, TAID)

    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(result.gradients["hidden"], expected.gradients["hidden"].bfloat16())
    assert torch.equal(result.gradients["weight"], expected.gradients["weight"])
    double = replace(given_, student_hidden=given_.student_hidden.double())
    assert torch.equal(run(double, TAID).loss, run(given_, TAID).loss)


@pytest.mark.parametrize("frozen", [{"hidden"}, {"weight"}, {"bias"}, {"weight", "bias"}, {"hidden", "weight"}])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen):
    given_ = inputs(23, 252, bias=True)
    expected = run(given_, TAID)
    named, given_ = leaves(given_, {})
    for name in frozen:
        named[name].requires_grad_(False)

    fused_distillation_loss(*given_, "taid", t=0.4).loss.backward()

    for name, leaf in named.items():
        assert leaf.grad is None if name in frozen else torch.equal(leaf.grad, expected.gradients[name])


@pytest.mark.parametrize("how", ["nothing requires a gradient", "no_grad", "inference_mode"])
def test_without_a_gradient_the_loss_is_the_same_and_no_gradient_is_formed(monkeypatch, how):
    given_ = inputs(23, 252, bias=True)
    expected = run(given_, TAID).loss
    asked_for = []

    def row_stage(*args, gradient):
        asked_for.append(gradient)
        return original(*args, gradient=gradient)

    original = fused.row_stage
    monkeypatch.setattr(fused, "row_stage", row_stage)
    if how == "nothing requires a gradient":
        loss = fused_distillation_loss(*given_, "taid", t=0.4).loss
    else:
        _, given_ = leaves(given_, {})
        with getattr(torch, how)():
            loss = fused_distillation_loss(*given_, "taid", t=0.4).loss

    assert torch.equal(loss, expected)
    assert not loss.requires_grad
    assert asked_for == [None]


def test_a_weight_that_is_also_the_embedding_gets_both_gradients():
    given_ = inputs(23, 252, dtype=torch.float64)
    ids = torch.arange(23)

    def gradient(loss_of):
        weight = given_.student_head.weight.clone().requires_grad_()
        hidden = torch.tanh(F.embedding(ids, weight)) + given_.student_hidden
        loss_of(replace(given_, student_hidden=hidden, student_head=Head(weight))).backward()
        return weight.grad

    actual = gradient(lambda tied: fused_distillation_loss(*tied, "taid", t=0.4).loss)

    assert error(actual, gradient(lambda tied: plain_loss(tied, TAID, 1.0))) <= 1e-12


# --- half precision --------------------------------------------------------------------------------------------------


def plain_in_its_own_dtype(given_, case):
    named, given_ = leaves(given_, {})
    trained = given_.labels != -100
    student, teacher = (
        head.logits(hidden[trained])
        for hidden, head in (
            (given_.student_hidden, given_.student_head),
            (given_.teacher_hidden, given_.teacher_head),
        )
    )
    labels = {"labels": given_.labels[trained]} if case.objective == "dkd" else {}
    loss = getattr(objectives, case.objective)(student, teacher, **labels, **case.parameters).sum()
    loss.backward()
    return Result(loss.detach(), {name: leaf.grad for name, leaf in named.items()})


@pytest.mark.parametrize("bfloat16", [False, True])
@without("sft")
def test_bfloat16_is_no_less_exact_than_the_plain_formula_in_bfloat16(monkeypatch, case, bfloat16):
    # In rounded logits, which of two near probabilities is the larger is chance, and all of tvd's error.
    chance = 10 if case.objective == "tvd" else 1.1
    monkeypatch.setattr("taid.losses.kernels.cpu_matmul.has_bfloat16", lambda: bfloat16)
    many_chunks(monkeypatch, 64)
    squares = {}
    for seed in range(3):
        given_ = inputs(160, 507, dtype=torch.bfloat16, bias=True, seed=seed)
        expected = truth(given_, case)
        for form, result in (("fused", run(given_, case)), ("plain", plain_in_its_own_dtype(given_, case))):
            for name, gradient in expected.gradients.items():
                assert result.gradients[name].dtype == torch.bfloat16
                square = error(result.gradients[name], gradient) ** 2
                squares[form, name] = squares.get((form, name), 0) + square

    for name in expected.gradients:
        if bfloat16:  # both forms round the logits alike, and chance decides; a chunk's product is rounded by 0.17 %
            assert squares["fused", name] <= chance * squares["plain", name] + 3 * 0.0017**2, name
        else:
            assert squares["fused", name] <= squares["plain", name], name
            assert squares["fused", name] <= 3 * 0.0025**2, name  # rounding the result costs 0.17 %


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_weight_gradient_adds_up_in_float32_over_many_chunks(monkeypatch, dtype, bfloat16):
    monkeypatch.setattr("taid.losses.kernels.cpu_matmul.has_bfloat16", lambda: bfloat16)
    given_ = inputs(512, 252, 16, 16, dtype=dtype, trained=1.0)
    at_once = run(given_, TAID).gradients["weight"]
    many_chunks(monkeypatch, 2)

    in_256_chunks = run(given_, TAID).gradients["weight"]

    # Added up in bfloat16, 256 chunks are off by 1.5 %; 0.24 % is what two roundings of one number differ by.
    assert error(in_256_chunks, at_once.double()) <= (3e-3 if dtype == torch.bfloat16 else 3e-4)


def test_slabs_of_a_half_precision_head_are_its_whole(monkeypatch):
    monkeypatch.setattr("taid.losses.kernels.cpu_matmul.has_bfloat16", lambda: False)
    given_ = inputs(23, 507, dtype=torch.bfloat16, bias=True, padding=(5, 5))
    expected = run(given_, TAID, 0.7, vocabulary_size=507)
    monkeypatch.setattr(head_matmul, "_SLAB", 100)

    result = run(given_, TAID, 0.7, vocabulary_size=507)

    assert_near(result, Result(expected.loss.double(), {n: g.double() for n, g in expected.gradients.items()}), 1e-3)
    assert error(result.loss, expected.loss.double()) <= 1e-6


@pytest.mark.parametrize("case", [TAID, CASES["jsd(0.1)"]], ids=["taid", "jsd"])
def test_autocast_changes_nothing_on_a_cpu_without_bfloat16(monkeypatch, case):
    monkeypatch.setattr("taid.losses.kernels.cpu_matmul.has_bfloat16", lambda: False)
    given_ = inputs(23, 252, bias=True)
    expected = run(given_, case, 0.7)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = run(given_, case, 0.7)

    assert torch.equal(result.loss, expected.loss)
    for name, gradient in expected.gradients.items():
        assert torch.equal(result.gradients[name], gradient)


def test_autocast_rounds_what_products_are_given_on_a_cpu_with_bfloat16_and_leaves_gradients_in_float32(monkeypatch):
    monkeypatch.setattr("taid.losses.kernels.cpu_matmul.has_bfloat16", lambda: True)
    many_chunks(monkeypatch, 8)
    given_ = inputs(23, 252, bias=True)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = run(given_, TAID, 0.7)

    assert result.loss.dtype == torch.float32
    expected = truth(given_, TAID, 0.7)
    assert 1e-5 < error(result.loss, expected.loss) <= 5e-3
    for name, gradient in expected.gradients.items():
        assert result.gradients[name].dtype == torch.float32
        assert error(result.gradients[name], gradient) <= 2e-2


# --- what comes from behind ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_loss", "derivative"),
    [
        (lambda loss: loss / 8, lambda loss: 1 / 8),
        (lambda loss: loss + loss, lambda loss: 2),
        (lambda loss: loss**2, lambda loss: 2 * loss),
        (lambda loss: 0 * loss, lambda loss: 0),
    ],
    ids=["loss / 8", "loss + loss", "loss ** 2", "0 * loss"],
)
def test_the_upstream_gradient_scales_all_gradients(of_loss, derivative):
    given_ = inputs(23, 252, bias=True)
    expected = run(given_, TAID, 0.7)
    named, given_ = leaves(given_, {})

    of_loss(fused_distillation_loss(*given_, "taid", kd_ratio=0.7, t=0.4).loss).backward()

    for name, leaf in named.items():
        assert_close(leaf.grad, derivative(expected.loss) * expected.gradients[name], rtol=1e-6, atol=0)


def test_gradients_of_two_calls_add_up():
    given_ = inputs(23, 252, bias=True)
    expected = run(given_, TAID)
    named, given_ = leaves(given_, {})
    first = fused_distillation_loss(*given_, "taid", t=0.4).loss
    second = fused_distillation_loss(*given_, "taid", t=0.4).loss

    (first + 2 * second).backward()

    for name, leaf in named.items():
        assert_close(leaf.grad, 3 * expected.gradients[name], rtol=1e-6, atol=0)


def test_the_loss_can_be_differentiated_only_once():
    _, given_ = leaves(inputs(23, 252), {})
    loss = fused_distillation_loss(*given_, "taid", t=0.4).loss
    loss.backward(retain_graph=True)

    with pytest.raises(RuntimeError, match="the fused loss can be differentiated only once"):
        loss.backward()


def test_a_gradient_of_the_gradient_is_refused():
    _, given_ = leaves(inputs(23, 252), {})
    loss = fused_distillation_loss(*given_, "taid", t=0.4).loss

    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(loss, given_.student_hidden, create_graph=True)


# --- parameters as tensors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kd_ratio", [1.0, 0.7])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_learned_temperature_gets_the_gradient_of_the_plain_formula(dtype, temperature, alone, kd_ratio):
    given_ = inputs(23, 252, dtype=dtype)
    case = Case("ctkd", {"temperature": torch.tensor(temperature, dtype=dtype, requires_grad=True)})
    exact = Case("ctkd", {"temperature": torch.tensor(temperature, dtype=torch.float64, requires_grad=True)})

    if alone:
        fused_distillation_loss(*given_, "ctkd", kd_ratio=kd_ratio, **case.parameters).loss.backward()
        actual = case.parameters["temperature"].grad
    else:
        result = run(given_, case, kd_ratio)
        actual = result.gradients["temperature"]
        assert error(result.gradients["hidden"], truth(given_, exact, kd_ratio).gradients["hidden"]) <= 2e-6

    expected = Case("ctkd", {"temperature": exact.parameters["temperature"].detach().clone().requires_grad_()})
    loss = plain_loss(as_float64(given_), expected, 1.0)
    loss.backward()
    # At a high temperature T^2 and the KL all but cancel: what is left is as exact as 2 T KL, the part of T^2.
    part = max(2 * loss.item() / temperature, abs(expected.parameters["temperature"].grad.item()))
    assert actual.dtype == dtype
    assert abs(actual.item() - kd_ratio * expected.parameters["temperature"].grad.item()) <= part * (
        1e-12 if dtype == torch.float64 else 2e-6
    )


def test_a_parameter_as_a_tensor_is_the_parameter_as_a_number():
    given_ = inputs(23, 252)

    for case in (TAID, CASES["ctkd(0.7)"]):
        tensors = Case(case.objective, {name: torch.tensor(value) for name, value in case.parameters.items()})
        assert_close(run(given_, tensors).loss, run(given_, case).loss, rtol=1e-6, atol=0)


# --- sums ------------------------------------------------------------------------------------------------------------


@every_case
def test_the_sums_are_those_of_the_trained_tokens_in_float64_without_a_gradient(monkeypatch, case):
    many_chunks(monkeypatch)
    _, given_ = leaves(inputs(24, 252, bias=True), {})
    trained = given_.labels != -100
    student = given_.student_head.logits(given_.student_hidden[trained]).detach()
    given_.labels[trained.nonzero()[::2, 0]] = student.argmax(-1)[::2]

    result = fused_distillation_loss(*given_, case.objective, kd_ratio=0.7, **case.parameters)

    exact = as_float64(given_)
    labels = given_.labels[trained]
    log_q, log_p = (
        torch.log_softmax(head.logits(hidden[trained]), -1).detach()
        for hidden, head in ((exact.student_hidden, exact.student_head), (exact.teacher_hidden, exact.teacher_head))
    )
    expected = {
        "trained": float(trained.sum()),
        "kl": (log_p.exp() * (log_p - log_q)).sum(),
        "cross_entropy": F.nll_loss(log_q, labels, reduction="sum"),
        "entropy": -(log_q.exp() * log_q).sum(),
        "correct": (log_q.argmax(-1) == labels).sum(),
        "teacher_cross_entropy": F.nll_loss(log_p, labels, reduction="sum"),
        "objective": REFERENCES[case.objective](log_q, log_p, labels, **case.parameters).sum(),
    }
    if case.objective == "sft":
        expected["objective"] = 0.0
    if case.objective == "taid":
        target = reference_target(log_q, log_p, **case.parameters).exp()
        expected["target_cross_entropy"] = -(target * log_q).sum()
    for name, value in result.sums.items():
        assert value.dtype == torch.float64
        assert value.shape == ()
        assert not value.requires_grad
        if name != "temperature_gradient" or case.objective != "ctkd":
            assert_close(value.item(), float(expected.get(name, 0.0)), rtol=5e-6, atol=1e-6)
    assert 0 < expected["correct"] < expected["trained"]


def test_cross_entropy_alone_needs_no_teacher():
    given_ = replace(inputs(23, 252, bias=True), teacher_hidden=None, teacher_head=None)

    for case, kd_ratio in ((CASES["sft"], 1.0), (TAID, 0.0)):
        named, new = leaves(given_, {})
        loss, sums = fused_distillation_loss(*new, case.objective, kd_ratio=kd_ratio, **case.parameters)
        loss.backward()

        expected, exact = leaves(given_, {})
        logits = exact.student_head.logits(exact.student_hidden)
        F.cross_entropy(logits, given_.labels, reduction="sum").backward()
        assert_close(loss, F.cross_entropy(logits, given_.labels, reduction="sum"), rtol=2e-6, atol=0)
        for name, leaf in named.items():
            assert error(leaf.grad, expected[name].grad.double()) <= 2e-6
        assert sums["kl"] == sums["teacher_cross_entropy"] == sums["objective"] == 0


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(message, objective="taid", changes=None, **parameters):
    return pytest.param(message, objective, changes or (lambda given_: {}), parameters, id=message[:60])


@pytest.mark.parametrize(
    ("message", "objective", "changes", "parameters"),
    [
        refused(
            "the teacher's hidden states and head go together: pass both or neither",
            changes=lambda given_: {"teacher_head": None},
            t=0.5,
        ),
        refused(
            "the teacher's hidden states and head go together: pass both or neither",
            changes=lambda given_: {"teacher_hidden": None},
            t=0.5,
        ),
        refused(
            "the student's head must be [V, 48] for hidden states of that width, got [252, 40]",
            changes=lambda given_: {"student_head": given_.teacher_head},
            t=0.5,
        ),
        refused(
            "the teacher's head must be [V, 40] for hidden states of that width, got [252]",
            changes=lambda given_: {"teacher_head": Head(given_.teacher_head.weight[:, 0])},
            t=0.5,
        ),
        refused(
            "the student's hidden states are [23] tokens and the labels [22]: each position needs one label, already "
            "shifted to the token that it predicts",
            changes=lambda given_: {"labels": given_.labels[1:]},
            t=0.5,
        ),
        refused(
            "the teacher's hidden states are [22] tokens and the labels [23]",
            changes=lambda given_: {"teacher_hidden": given_.teacher_hidden[1:]},
            t=0.5,
        ),
        *(
            refused(
                f"the {role}'s bias must be [252] as its head, got {shape}",
                changes=lambda given_, role=role, shape=shape: {
                    f"{role}_head": replace(getattr(given_, f"{role}_head"), bias=torch.zeros(shape))},
                t=0.5,
            )
            for role, shape in (("student", [7]), ("teacher", [252, 1]), ("teacher", [253]))
        ),
        refused(
            "labels must be int64, got torch.float32",
            changes=lambda given_: {"labels": given_.labels.float()},
            t=0.5,
        ),
        refused(
            "the teacher's hidden states must be floating-point numbers, got torch.int64",
            changes=lambda given_: {"teacher_hidden": given_.teacher_hidden.long()},
            t=0.5,
        ),
        refused(
            "the student's softcap must be a positive number or None, got nan",
            changes=lambda given_: {"student_head": replace(given_.student_head, softcap=math.nan)},
            t=0.5,
        ),
        refused(
            "the student's softcap must be a positive number or None, got 0.0",
            changes=lambda given_: {"student_head": replace(given_.student_head, softcap=0.0)},
            t=0.5,
        ),
        refused(
            "the teacher's softcap must be a positive number or None, got -30.0",
            changes=lambda given_: {"teacher_head": replace(given_.teacher_head, softcap=-30.0)},
            t=0.5,
        ),
        refused(
            "the student's head has 252 rows and the teacher's 251: pass vocabulary_size, the number of ids that mean "
            "the same token to both (taid.models.vocabulary)",
            changes=lambda given_: {"teacher_head": Head(given_.teacher_head.weight[:251])},
            t=0.5,
        ),
        *(
            refused(
                f"vocabulary_size must lie in 1 .. 251, got {size}",
                changes=lambda given_: {"teacher_head": Head(given_.teacher_head.weight[:251])},
                t=0.5,
                vocabulary_size=size,
            )
            for size in (252, 0, -1)
        ),
        *(
            refused(
                f"label {label} is no id of the 252 that student and teacher share, and not -100",
                changes=lambda given_, label=label: {"labels": given_.labels.index_fill(0, torch.tensor([3]), label)},
                t=0.5,
            )
            for label in (252, -1, -99)
        ),
        refused("label 251 is no id of the 251 that student and teacher share", changes=lambda given_: {
            "labels": given_.labels.index_fill(0, torch.tensor([3]), 251)}, t=0.5, vocabulary_size=251),
        refused(
            "objective 'taid' needs the teacher's hidden states and head",
            changes=lambda given_: {"teacher_hidden": None, "teacher_head": None},
            t=0.5,
        ),
        refused("objective 'kl' does not exist (choices: sft, taid, forward_kl", "kl"),
        refused("taid needs its parameter 't'"),
        refused("taid has no parameter 'beta' (it has: t, mixture)", t=0.5, beta=0.1),
        refused("kd_ratio must lie in [0, 1], got 1.5", t=0.5, kd_ratio=1.5),
        refused("t must lie in [0, 2], got -0.1", t=-0.1),
        refused("beta must lie strictly between 0 and 1, got 1.0", "jsd", beta=1.0),
        refused("temperature must be a positive number, got 0.0", "ctkd", temperature=0.0),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_value_and_the_remedy(message, objective, changes, parameters):
    given_ = inputs(23, 252)

    with pytest.raises(ValueError, match=re.escape(message)):
        fused_distillation_loss(*replace(given_, **changes(given_)), objective, **parameters)


# --- found by attack --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("overlapping", ["expanded", "unfolded"])
def test_a_weight_whose_rows_lie_over_each_other_is_what_its_copy_is(overlapping, side):
    """MKL refuses it with a message and no result."""
    torch.manual_seed(0)
    hidden, labels = torch.randn(5, 48), torch.zeros(5, dtype=torch.long)
    odd = torch.randn(48).expand(64, 48) if overlapping == "expanded" else torch.randn(112).unfold(0, 48, 1)[:64]
    other = torch.randn(64, 48)

    def loss(weight):
        pair = (weight, other) if side == "student" else (other, weight)
        return fused_distillation_loss(hidden, pair[0], hidden, pair[1], labels, "forward_kl").loss

    torch.testing.assert_close(loss(odd), loss(odd.contiguous()))


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("objective", ["sft", "forward_kl", "taid"])
def test_a_broken_teacher_without_a_share_leaves_no_trace_in_the_gradient(objective, broken):
    torch.manual_seed(0)
    hidden, teacher_hidden = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    teacher_hidden[0, 0] = broken
    given = {"t": 0.4} if objective == "taid" else {}
    loss = fused_distillation_loss(
        hidden, torch.randn(9, 4), teacher_hidden, torch.randn(9, 4), torch.tensor([1, 2, 3]), objective,
        kd_ratio=0.0, **given,
    ).loss  # fmt: skip
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, hidden)[0]).all()


def test_float16_gradients_are_rounded_after_the_upstream_factor():
    N, V, D = 4096, 64, 16
    torch.manual_seed(0)
    hidden = (torch.randn(N, D).abs() * 80).half()
    weight = (torch.randn(V, D) * 0.005).half().requires_grad_()
    teacher, labels = (torch.randn(N, D).half(), torch.randn(V, D).half()), torch.zeros(N, dtype=torch.long)
    loss = fused_distillation_loss(hidden, weight, *teacher, labels, "forward_kl", kd_ratio=0.1).loss
    (mean,) = torch.autograd.grad(loss / N, weight)
    assert mean.dtype == torch.float16
    assert torch.isfinite(mean).all()
    assert mean.float().abs().max() * N > torch.finfo(torch.float16).max  # the sum would have overflowed
    exact = [x.detach().double() for x in (hidden, weight, *teacher)]
    exact[1].requires_grad_()
    true = fused_distillation_loss(*exact, labels, "forward_kl", kd_ratio=0.1).loss / N
    torch.testing.assert_close(mean.double(), torch.autograd.grad(true, exact[1])[0], rtol=2e-3, atol=1e-3)


def test_the_plain_formula_says_that_it_wants_trained_tokens_only():
    with pytest.raises(ValueError, match=r"ids 0 \.\. 8 of trained tokens.*-100"):
        distillation_loss(torch.randn(2, 9), torch.randn(2, 9), torch.tensor([-100, 3]), "forward_kl")
