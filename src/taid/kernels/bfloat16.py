"""bfloat16 products added up in float32 on a CPU, which PyTorch has no operation for there.

Its builds with MKL carry one, ``cblas_gemm_bf16bf16f32``: the gradient of a head adds up over chunks in it without a
rounded product in between, and without two more passes over as many numbers as the head has.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_ROW_MAJOR, _NO_TRANS, _TRANS = 101, 111, 112


def add_product(total_VD: Tensor, a_MV: Tensor, b_MD: Tensor, beta: int) -> bool:
    """``total_VD = beta total_VD + a_MV.T @ b_MD`` of bfloat16 factors; False where there is nothing that does it.

    Args:
        total_VD: float32, contiguous.
        a_MV: bfloat16, with contiguous rows.
        b_MD: bfloat16, contiguous.
        beta: 0 or 1.
    """
    gemm = _gemm()
    if gemm is None:
        return False
    assert (total_VD.dtype, a_MV.dtype, b_MD.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert total_VD.stride(1) == a_MV.stride(1) == b_MD.stride(1) == 1
    (V, D), M = total_VD.shape, len(a_MV)
    gemm(
        _ROW_MAJOR, _TRANS, _NO_TRANS, V, D, M, ctypes.c_float(1.0),
        ctypes.c_void_p(a_MV.data_ptr()), a_MV.stride(0), ctypes.c_void_p(b_MD.data_ptr()), b_MD.stride(0),
        ctypes.c_float(beta), ctypes.c_void_p(total_VD.data_ptr()), total_VD.stride(0),
    )  # fmt: skip
    return True


@functools.cache
def _gemm() -> Any:
    """MKL's function, on the processors that it is made for."""
    try:
        is_intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
        gemm = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).cblas_gemm_bf16bf16f32
    except (OSError, AttributeError):  # no Linux, or PyTorch without MKL
        return None
    gemm.restype = None
    return gemm if is_intel else None


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself (AVX-512 BF16, AMX, recent Arm)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
