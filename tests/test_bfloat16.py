"""bfloat16 products that add up in float32, against float64."""

import pytest
import torch

from taid.kernels import bfloat16

M, V, D = 37, 130, 48


@pytest.fixture
def factors():
    torch.manual_seed(0)
    tile = torch.randn(M, V + 6).bfloat16()  # rows farther apart than they are long, as in a padded tile
    return tile[:, :V], torch.randn(M, D).bfloat16()


@pytest.mark.skipif(bfloat16._gemm() is None, reason="this PyTorch or processor has no bfloat16 product in float32")
@pytest.mark.parametrize("beta", [0, 1])
def test_the_product_adds_up_in_float32_what_it_is_given_in_bfloat16(factors, beta):
    a_MV, b_MD = factors
    total_VD = torch.full((V, D), 0.5 if beta else float("nan"))  # with beta 0, what lay there does not matter

    assert bfloat16.add_product(total_VD, a_MV, b_MD, beta)

    expected = a_MV.double().t() @ b_MD.double() + 0.5 * beta
    assert (total_VD - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_without_such_a_product_nothing_is_touched(factors, monkeypatch):
    monkeypatch.setattr(bfloat16, "_gemm", lambda: None)
    total_VD = torch.full((V, D), 0.5)

    assert not bfloat16.add_product(total_VD, *factors, 1)

    assert (total_VD == 0.5).all()
