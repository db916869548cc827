"""Multiply with an output head on a CPU, in the way that its processor does best.

PyTorch multiplies in float32 by MKL, which uses half of the width of AVX-512 where the processor is not Intel's:
oneDNN, which PyTorch brings as well, is twice as fast there. On Intel's, a batch of MKL multiplies slabs of ids on one
thread each, which for logits is 5 to 10 % faster than all threads in one product. In bfloat16 PyTorch's products are
oneDNN's anyway, but the head's gradient has to add up in float32, for which only MKL has a product, for Intel's alone.

Shapes: M tokens, V ids, D wide; rows are contiguous. What each way gains: docs/performance.md.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_ROW_MAJOR, _NO_TRANS, _TRANS = 101, 111, 112
_SLAB = 1024  # ids in a product of its own: it stays in the cache until it is copied or added
_BATCH_SLAB = 2048  # of those that run side by side: few enough for all threads to end together
_ROWS = 16  # tokens, of which oneDNN is given a multiple


def project(hidden_MD: Tensor, weight_VD: Tensor, out_MV: Tensor) -> None:
    """``out_MV = hidden_MD @ weight_VD.T``."""
    if _one_dnn_is_better(weight_VD):
        for ids in _slabs(len(weight_VD), _SLAB):
            out_MV[:, ids] = _by_one_dnn(hidden_MD, weight_VD[ids])
    elif not _project_by_batch(hidden_MD, weight_VD, out_MV):
        for ids in _slabs(len(weight_VD), 4 * _SLAB):
            torch.mm(hidden_MD, weight_VD[ids].t(), out=out_MV[:, ids])


def project_back(gradient_MV: Tensor, weight_VD: Tensor) -> Tensor:
    """``gradient_MV @ weight_VD``, in their dtype or in float32."""
    (V, D), is_bfloat16 = weight_VD.shape, weight_VD.dtype == torch.bfloat16
    by_one_dnn = _one_dnn_is_better(weight_VD)
    if by_one_dnn or (is_bfloat16 and not _is_intel()):
        total_MD = gradient_MV.new_zeros(len(gradient_MV), D, dtype=torch.float32)
        for ids in _slabs(V, _SLAB):
            gradient, weight = gradient_MV[:, ids], weight_VD[ids]
            total_MD += _by_one_dnn(gradient, weight.t()) if by_one_dnn else gradient @ weight
        return total_MD
    if is_bfloat16 and D <= 512:  # all columns at once take half as long again
        return torch.cat([gradient_MV @ columns_VD for columns_VD in torch.split(weight_VD, 256, 1)], 1)
    return gradient_MV @ weight_VD


def add_outer(total_VD: Tensor, gradient_MV: Tensor, hidden_MD: Tensor, beta: int) -> None:
    """``total_VD = beta total_VD + gradient_MV.T @ hidden_MD``, where beta is 0 or 1.

    The total of bfloat16 factors is float32.
    """
    by_one_dnn = _one_dnn_is_better(hidden_MD)
    if not by_one_dnn and total_VD.dtype == hidden_MD.dtype:
        total_VD.addmm_(gradient_MV.t(), hidden_MD, beta=beta)
    elif by_one_dnn or not _add_outer_by_mkl(total_VD, gradient_MV, hidden_MD, beta):
        for ids in _slabs(len(total_VD), _SLAB):
            gradient_VM = gradient_MV[:, ids].t()
            product_VD = _by_one_dnn(gradient_VM, hidden_MD.t()) if by_one_dnn else gradient_VM @ hidden_MD
            if beta:
                total_VD[ids] += product_VD
            else:  # whatever lay there
                total_VD[ids] = product_VD


def row_multiple(dtype: torch.dtype) -> int:
    """Return the number of which these products should be given a multiple of tokens; fill up with zeros.

    oneDNN keeps what it has made for every shape that it has met, 0.4 MB for each: of any number of tokens, that became
    240 MB in some thousand steps of a small model.
    """
    return _ROWS if dtype == torch.float32 and _is_another_avx512() else 1


def slab_ids(V: int, dtype: torch.dtype) -> int:
    """Return the number of ids whose product :func:`project` holds beside `out_MV`."""
    return min(V, _SLAB) if dtype == torch.float32 and _is_another_avx512() else 0


def _slabs(V: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, V)) for start in range(0, V, size))


def _one_dnn_is_better(factor: Tensor) -> bool:
    return factor.dtype == torch.float32 and _is_another_avx512()


def _by_one_dnn(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y.T``."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, y, None, "none", [], "")
    return product


def _project_by_batch(hidden_MD: Tensor, weight_VD: Tensor, out_MV: Tensor) -> bool:
    """:func:`project` in float32, one slab a thread; False where PyTorch brings nothing that does it."""
    gemm = _mkl("cblas_sgemm_batch")
    tensors = hidden_MD, weight_VD, out_MV
    if gemm is None or any(x.dtype != torch.float32 or x.stride(1) != 1 or not x.numel() for x in tensors):
        return False
    (M, V), D = out_MV.shape, hidden_MD.shape[1]
    starts = range(0, V, _BATCH_SLAB)
    each = len(starts)

    def all_of(kind: type[Any], *values: Any) -> Any:  # MKL wants an array of everything: each slab is a group
        return (kind * each)(*(values if len(values) == each else values * each))

    integers, floats, pointers = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    gemm(
        _ROW_MAJOR, all_of(integers, _NO_TRANS), all_of(integers, _TRANS),
        all_of(integers, M), all_of(integers, *(min(_BATCH_SLAB, V - start) for start in starts)), all_of(integers, D),
        all_of(floats, 1.0),
        all_of(pointers, hidden_MD.data_ptr()), all_of(integers, hidden_MD.stride(0)),
        all_of(pointers, *(weight_VD[start:].data_ptr() for start in starts)), all_of(integers, weight_VD.stride(0)),
        all_of(floats, 0.0),
        all_of(pointers, *(out_MV[:, start:].data_ptr() for start in starts)), all_of(integers, out_MV.stride(0)),
        each, all_of(integers, 1),
    )  # fmt: skip
    return True


def _add_outer_by_mkl(total_VD: Tensor, gradient_MV: Tensor, hidden_MD: Tensor, beta: int) -> bool:
    """:func:`add_outer` of bfloat16 factors; False where there is nothing that does it well."""
    gemm = _mkl("cblas_gemm_bf16bf16f32") if _is_intel() else None
    factors = gradient_MV, hidden_MD
    if gemm is None or any(x.dtype != torch.bfloat16 or x.stride(1) != 1 for x in factors):
        return False
    (V, D), M = total_VD.shape, len(hidden_MD)
    gemm(
        _ROW_MAJOR, _TRANS, _NO_TRANS, V, D, M, ctypes.c_float(1.0),
        ctypes.c_void_p(gradient_MV.data_ptr()), gradient_MV.stride(0),
        ctypes.c_void_p(hidden_MD.data_ptr()), hidden_MD.stride(0),
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
def _is_another_avx512() -> bool:
    """Whether this processor has AVX-512, and MKL does not use it."""
    return (
        torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and not _is_intel()
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@functools.cache
def _is_intel() -> bool:
    """Whether this is a processor that MKL is made for."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself (AVX-512 BF16, AMX, recent Arm)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
