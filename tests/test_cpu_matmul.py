"""Products on a CPU against float64, in every way that some processor takes."""

import pytest
import torch

from taid.losses.fused import fused_distillation_loss
from taid.losses.kernels import cpu_matmul

has_one_dnn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch brings no oneDNN"
)
WAYS = ["here", "intel", "plain", pytest.param("one_dnn", marks=has_one_dnn)]
SHAPES = [(1, 1, 1), (7, 2047, 48), (5, 2049, 33), (123, 5000, 64), (64, 4096, 520)]
DTYPES = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 8e-3}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """The processor's own way, or that of another one as far as it can be gone here."""
    if request.param != "here":
        monkeypatch.setattr(cpu_matmul, "_is_another_avx512", lambda: request.param == "one_dnn")
        if request.param != "intel":  # its bfloat16 product of MKL runs on every processor, only slower
            monkeypatch.setattr(cpu_matmul, "_mkl", lambda name: None)
        monkeypatch.setattr(cpu_matmul, "_is_intel", lambda: request.param == "intel")
    return request.param


@pytest.fixture(params=DTYPES)
def dtype(request):
    if request.param == "bfloat16" and not cpu_matmul.has_bfloat16():
        pytest.skip("this processor has no bfloat16: fused.py converts to float32 beforehand")
    return getattr(torch, request.param)


def factors(M, V, D, dtype):
    """A tile, hidden states and a head whose rows are farther apart than they are long."""
    torch.manual_seed(0)
    tile, hidden, weight = torch.randn(M, V + 6), torch.randn(M, D + 3), torch.randn(V + 2, D + 5)
    tile[:, V:] = 0  # as fused.py leaves it: oneDNN multiplies it by zero
    return tile.to(dtype)[:, :V], hidden.to(dtype)[:, :D], weight.to(dtype)[:V, :D].contiguous()


def error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(("M", "V", "D"), SHAPES)
def test_logits(way, dtype, M, V, D):
    _, hidden, weight = factors(M, V, D, dtype)
    tile = torch.full((M, V + 6), float("nan"), dtype=dtype)

    cpu_matmul.project(hidden, weight, tile[:, :V])

    assert error(tile[:, :V], hidden.double() @ weight.double().t()) <= DTYPES[str(dtype).split(".")[1]]
    assert tile[:, V:].isnan().all()


@pytest.mark.parametrize(("M", "V", "D"), SHAPES)
def test_gradient_of_hidden_states(way, dtype, M, V, D):
    gradient, _, weight = factors(M, V, D, dtype)

    found = cpu_matmul.project_back(gradient, weight)

    assert error(found, gradient.double() @ weight.double()) <= DTYPES[str(dtype).split(".")[1]]


@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.parametrize(("M", "V", "D"), SHAPES)
def test_gradient_of_the_head_adds_up(way, dtype, M, V, D, beta):
    gradient, hidden, _ = factors(M, V, D, dtype)
    hidden = hidden.contiguous()
    total_dtype = torch.promote_types(dtype, torch.float32)
    total = torch.full((V, D), 1000.0 if beta else float("nan"), dtype=total_dtype)  # beta 0: whatever lay there

    cpu_matmul.add_outer(total, gradient, hidden, beta)

    expected = gradient.double().t() @ hidden.double()
    # A sum in bfloat16 would lose all of the product beside 1,000.
    bound = DTYPES[str(dtype).split(".")[1]]
    assert error(total - 1000.0 * beta, expected) <= max(bound, 1e-4 * beta * (dtype != torch.float64), 1e-12 * beta)


@pytest.mark.skipif(
    cpu_matmul._mkl("cblas_gemm_bf16bf16f32") is None or not cpu_matmul._is_intel(),
    reason="this PyTorch or processor has no bfloat16 product in float32",
)
def test_on_intel_the_head_gradient_is_not_rounded_on_its_way():
    gradient, hidden, _ = factors(37, 130, 48, torch.bfloat16)
    total = torch.empty(130, 48)

    cpu_matmul.add_outer(total, gradient, hidden.contiguous(), 0)

    assert error(total, gradient.double().t() @ hidden.double()) <= 1e-6


@has_one_dnn
def test_one_dnn_meets_few_shapes_whatever_the_number_of_tokens(monkeypatch):
    """It keeps what it made for each: 240 MB in a long run, when each batch had its own."""
    met = set()
    by_one_dnn = cpu_matmul._by_one_dnn
    monkeypatch.setattr(cpu_matmul, "_by_one_dnn", lambda x, y: met.add((x.shape, y.shape)) or by_one_dnn(x, y))
    monkeypatch.setattr(cpu_matmul, "_is_another_avx512", lambda: True)
    student, teacher = torch.randn(70, 8, requires_grad=True), torch.randn(70, 12)

    for N in range(1200):
        hidden, labels = torch.randn(N, 8, requires_grad=True), torch.zeros(N, dtype=torch.long)
        loss = fused_distillation_loss(hidden, student, torch.randn(N, 12), teacher, labels, "forward_kl").loss
        loss.backward()

    assert len(met) <= 4 * (512 // 16 + 1)
