"""Build rows.c on this machine when it is first wanted, and call it without a copy.

The library is kept in the user's cache under a name made of all that it depends on and of its own content: it is
built once a machine, and again if it was damaged. Where it cannot be built (no C compiler, a read-only home),
nothing breaks: the plain form takes over.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taid.losses.kernels.row_task import COLUMNS, Finish, RowTask
from taid.losses.kernels.torch_rows import rows
from taid.losses.objective_table import OBJECTIVES

logger = logging.getLogger(__name__)

_KERNELS = (*OBJECTIVES, "mixture_taid")  # the enum of rows.c
_FLAGS = "-std=gnu11 -O3 -march=native -fPIC -fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=fast".split()
if platform.machine() in ("x86_64", "AMD64"):
    _FLAGS.append("-mprefer-vector-width=512")  # where there are such registers; compilers hesitate to use them


class _CFinish(ctypes.Structure):
    _fields_ = (("bias", ctypes.c_void_p), ("scale", ctypes.c_float), ("softcap", ctypes.c_float))


class _CTask(ctypes.Structure):
    _fields_ = (
        ("objective", ctypes.c_int32),
        ("share", ctypes.c_float),
        ("alpha", ctypes.c_float),
        ("beta", ctypes.c_float),
        ("parameter", ctypes.c_double),
        ("mixture", ctypes.c_double),
        ("half", ctypes.c_int32),
        ("student", _CFinish),
        ("teacher", _CFinish),
    )


def native_rows(
    student_MV: Tensor,
    teacher_MV: Tensor | None,
    labels_M: Tensor,
    task: RowTask,
    columns_MK: Tensor,
    *,
    gradient: torch.dtype | None,
) -> Tensor:
    """:func:`.torch_rows.rows` for float32 and bfloat16 tiles on a CPU, by rows.c where that could be built."""
    library = _library()
    tiles = [tile for tile in (student_MV, teacher_MV) if tile is not None]
    if library is None or not _takes(tiles):
        return rows(student_MV, teacher_MV, labels_M, task, columns_MK, gradient=gradient)
    assert columns_MK.is_contiguous()
    assert columns_MK.shape[1] == len(COLUMNS)
    assert columns_MK.dtype == torch.float32
    M, V = student_MV.shape
    biases = [None if f.bias is None else f.bias.float().contiguous() for f in (task.student, task.teacher)]
    given, kernel = task.parameters, task.kernel
    if kernel == "mixture_taid" and not 0.0 < given["t"] < 1.0:  # at the ends, every mixture is one
        kernel = "taid"
    other = () if kernel == "jsd" else ("alpha", "beta", "mixture")
    main = [float(value) for name, value in given.items() if name not in other]
    labels_M = labels_M.to(torch.int64).contiguous()
    c_task = _CTask(
        _KERNELS.index(kernel), task.kd_ratio, given.get("alpha", 0.0), given.get("beta", 0.0), *(main or [0.0]),
        given.get("mixture", 1.0), student_MV.dtype == torch.bfloat16,
        *(_c_finish(finish, bias) for finish, bias in zip((task.student, task.teacher), biases, strict=True)),
    )  # fmt: skip
    failed = library.taid_rows(
        ctypes.c_void_p(student_MV.data_ptr()),
        ctypes.c_void_p(None if teacher_MV is None else teacher_MV.data_ptr()),
        ctypes.c_void_p(labels_M.data_ptr()),
        ctypes.c_long(M), ctypes.c_long(V),
        ctypes.c_long(student_MV.stride(0)), ctypes.c_long(0 if teacher_MV is None else teacher_MV.stride(0)),
        ctypes.byref(c_task), ctypes.c_void_p(columns_MK.data_ptr()), ctypes.c_int(gradient is not None),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory for a few rows of {V} numbers a thread")
    return student_MV


def _takes(tiles: list[Tensor]) -> bool:
    dtype = tiles[0].dtype
    return dtype in (torch.float32, torch.bfloat16) and all(t.dtype == dtype and t.stride(1) == 1 for t in tiles)


def _c_finish(finish: Finish, bias: Tensor | None) -> _CFinish:
    return _CFinish(None if bias is None else bias.data_ptr(), finish.scale, finish.softcap or 0.0)


@functools.cache
def _library() -> Any:
    """The compiled library, or None where there is none. TAID_NATIVE=0 asks for the plain form."""
    if os.environ.get("TAID_NATIVE") == "0":
        return None
    try:
        library = ctypes.CDLL(str(_built()))
        library.taid_rows.restype = ctypes.c_int  # and it is there
        return library
    except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:  # RuntimeError: no home
        detail = getattr(error, "stderr", None) or error
        logger.info(f"the row kernel could not be built, plain torch takes over: {detail}")
        return None


def _built() -> Path:
    """Return the path of the library; build it first if it is not there."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise OSError("no C compiler (cc, or what CC names) was found")
    source = Path(__file__).with_name("rows.c")
    run = functools.partial(
        subprocess.run, capture_output=True, text=True, errors="replace", check=True, timeout=300
    )  # compilers speak all languages
    version = run([compiler, "--version"]).stdout
    # -march=native: a home directory may be shared by machines whose processors differ.
    parts = [source.read_text(), version, " ".join(_FLAGS), platform.machine(), torch.__version__, _processor()]
    name = f"rows-{_digest(chr(0).join(parts).encode())}"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "taid"
    for library in folder.glob(f"{name}-*.so"):
        if (
            library.is_file() and library.stem == f"{name}-{_digest(library.read_bytes())}"
        ):  # to load a damaged one can end the process
            return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:  # not in `folder`: what a kill leaves there nobody clears away
        compiled, linked = Path(scratch) / "rows.o", Path(scratch) / "rows.so"
        run([compiler, *_FLAGS, "-c", str(source), "-o", str(compiled)])
        # Linked without -fopenmp: the calls find the OpenMP runtime that torch has loaded, and so torch's own threads.
        run([compiler, "-shared", str(compiled), "-o", str(linked), "-lm"])
        library = folder / f"{name}-{_digest(linked.read_bytes())}.so"
        partial = folder / f"{os.getpid()}.partial"
        shutil.copyfile(linked, partial)
        os.replace(partial, library)  # whole or not at all, whoever else builds it
    return library


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return " ".join(line for line in lines if line.startswith(("model name", "flags", "Features")))
