"""Products on a CPU for which PyTorch has no operation, although its builds with MKL carry them.

``cblas_sgemm_batch`` multiplies by slabs of a head, each on one thread, which is 5 to 10 % faster than all threads in
one product of that shape. In ``cblas_gemm_bf16bf16f32`` the gradient of a head adds up over chunks without a rounded
product in between, and without two more passes over as many numbers as the head has.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_ROW_MAJOR, _NO_TRANS, _TRANS = 101, 111, 112
_SLAB = 2048  # ids: few enough for all threads to end together, enough for a product at full speed


def project(hidden_MD: Tensor, weight_VD: Tensor, out_MV: Tensor) -> bool:
    """``out_MV = hidden_MD @ weight_VD.T`` in float32; False where there is nothing that does it.

    Args:
        hidden_MD: with contiguous rows.
        weight_VD: with contiguous rows.
        out_MV: with contiguous rows.
    """
    gemm = _mkl("cblas_sgemm_batch")
    tensors = hidden_MD, weight_VD, out_MV
    if gemm is None or any(x.dtype != torch.float32 or x.stride(1) != 1 or not x.numel() for x in tensors):
        return False
    (M, V), D = out_MV.shape, hidden_MD.shape[1]
    starts = range(0, V, _SLAB)
    each = len(starts)

    def all_of(kind: type[Any], *values: Any) -> Any:  # MKL wants an array of everything: each slab is a group
        return (kind * each)(*(values if len(values) == each else values * each))

    integers, floats, pointers = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    gemm(
        _ROW_MAJOR, all_of(integers, _NO_TRANS), all_of(integers, _TRANS),
        all_of(integers, M), all_of(integers, *(min(_SLAB, V - start) for start in starts)), all_of(integers, D),
        all_of(floats, 1.0),
        all_of(pointers, hidden_MD.data_ptr()), all_of(integers, hidden_MD.stride(0)),
        all_of(pointers, *(weight_VD[start:].data_ptr() for start in starts)), all_of(integers, weight_VD.stride(0)),
        all_of(floats, 0.0),
        all_of(pointers, *(out_MV[:, start:].data_ptr() for start in starts)), all_of(integers, out_MV.stride(0)),
        each, all_of(integers, 1),
    )  # fmt: skip
    return True


def add_product(total_VD: Tensor, a_MV: Tensor, b_MD: Tensor, beta: int) -> bool:
    """``total_VD = beta total_VD + a_MV.T @ b_MD`` of bfloat16 factors; False where there is nothing that does it.

    Args:
        total_VD: float32, contiguous.
        a_MV: bfloat16, with contiguous rows.
        b_MD: bfloat16, contiguous.
        beta: 0 or 1.
    """
    gemm = _mkl("cblas_gemm_bf16bf16f32") if _is_intel() else None
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
def _mkl(name: str) -> Any:
    """A function of the MKL that PyTorch brings, or None where it brings none."""
    try:
        function = getattr(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")), name)
    except (OSError, AttributeError):  # no Linux, or PyTorch without MKL
        return None
    function.restype = None
    return function


@functools.cache
def _is_intel() -> bool:
    """Whether this is a processor that MKL's bfloat16 product is made for."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself (AVX-512 BF16, AMX, recent Arm)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
