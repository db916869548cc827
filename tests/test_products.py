"""Products of MKL, against float64."""

import pytest
import torch

from taid.kernels import products

M, V, D = 37, 130, 48


@pytest.fixture
def factors():
    torch.manual_seed(0)
    tile = torch.randn(M, V + 6).bfloat16()  # rows farther apart than they are long, as in a padded tile
    return tile[:, :V], torch.randn(M, D).bfloat16()


@pytest.mark.skipif(
    products._mkl("cblas_gemm_bf16bf16f32") is None or not products._is_intel(),
    reason="this PyTorch or processor has no bfloat16 product in float32",
)
@pytest.mark.parametrize("beta", [0, 1])
def test_the_product_adds_up_in_float32_what_it_is_given_in_bfloat16(factors, beta):
    a_MV, b_MD = factors
    total_VD = torch.full((V, D), 0.5 if beta else float("nan"))  # with beta 0, what lay there does not matter

    assert products.add_product(total_VD, a_MV, b_MD, beta)

    expected = a_MV.double().t() @ b_MD.double() + 0.5 * beta
    assert (total_VD - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_without_such_a_product_nothing_is_touched(factors, monkeypatch):
    monkeypatch.setattr(products, "_mkl", lambda name: None)
    total_VD = torch.full((V, D), 0.5)

    assert not products.add_product(total_VD, *factors, 1)

    assert (total_VD == 0.5).all()


@pytest.mark.skipif(products._mkl("cblas_sgemm_batch") is None, reason="this PyTorch has no batch of products")
@pytest.mark.parametrize(("M", "V", "D"), [(1, 1, 1), (7, 2047, 48), (5, 2049, 33), (123, 5000, 64)])
def test_the_logits_by_slabs_are_the_product(M, V, D):
    torch.manual_seed(0)
    hidden_MD, weight_VD = torch.randn(M, D + 3)[:, :D], torch.randn(V + 2, D + 5)[:V, :D]
    tile = torch.full((M, V + 6), float("nan"))

    assert products.project(hidden_MD, weight_VD, tile[:, :V])

    expected = hidden_MD.double() @ weight_VD.double().t()
    assert (tile[:, :V] - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert tile[:, V:].isnan().all()


def test_without_a_batch_of_products_nothing_is_touched(monkeypatch):
    monkeypatch.setattr(products, "_mkl", lambda name: None)
    out_MV = torch.full((3, 5), 0.5)

    assert not products.project(torch.randn(3, 4), torch.randn(5, 4), out_MV)

    assert (out_MV == 0.5).all()
