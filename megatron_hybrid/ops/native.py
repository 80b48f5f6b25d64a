"""The passes of `eager.py` by the C++ of `native.cpp`: fp32 and bf16 logits on a CPU; `compiled.py` asks here first.

    stats      rows over threads, each shard read once    8 numbers per token
    gradient   rows over threads, each shard read once; the zeros are written in the same pass

Memory: [n, 8] and [rows] numbers beside the output. No collective.

Built when first asked for, in about a second, for the processor it will run on, and loaded from a folder that is gone
again: nothing is kept that another machine with the same home could load. Where that fails `serves` is False from then
on, and the log says why.
Not here: other types, other devices, other divergences.
"""

import ctypes
import functools
import logging
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from megatron_hybrid.ops.call import Call
from megatron_hybrid.ops.eager import NUM_STATS

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_suffix(".cpp")
_VECTORS = ["-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
"""The last two take back promises, about errno and traps, that keep loops from vectors; they change no result."""
_OPTIONS = ["-std=c++17", *_VECTORS, "-pthread", "-shared", "-fPIC"]
_ELEMENTS_PER_THREAD = 1 << 15
"""At least, of one shard: about 50 us of work, where starting a thread takes about 20."""


class _Logits(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("bytes", ctypes.c_int64)]


class _Scales(ctypes.Structure):
    _fields_ = [(name, ctypes.c_float) for name in ("student", "teacher", "ratio", "floor")]


def serves(student: Tensor, teacher: Tensor | None) -> bool:
    """Whether these logits are read here: adjacent columns of fp32 or bf16 on a CPU, with a compiler at hand."""
    both = [student] if teacher is None else [student, teacher]
    return (
        student.device.type == "cpu"
        and student.dtype in (torch.float32, torch.bfloat16)
        and all(x.dtype == student.dtype and (x.stride(1) == 1 or x.shape[1] == 1) for x in both)
        and _library() is not None
    )


def shard_stats(student: Tensor, teacher: Tensor | None, call: Call) -> Tensor:
    """As `eager.shard_stats`: [n, 8] fp32."""
    library, n, width = _library(), len(call.target), call.shard.width
    assert library is not None
    stats = torch.empty((n, NUM_STATS), dtype=torch.float32)
    library.stats(
        _logits(student),
        _logits(teacher),
        _pointer(call.target),
        _pointer(call.rows),
        n,
        call.shard.first,
        width,
        _scales(call),
        _pointer(stats),
        _threads(n, width),
    )
    return stats


def shard_gradient(student: Tensor, teacher: Tensor | None, call: Call, coefficients: Tensor, out: Tensor) -> None:
    """As `eager.shard_gradient`: fills `out`, which may be the student logits."""
    library, (num_rows, num_columns), position = _library(), out.shape, None
    assert library is not None
    if call.rows is not None:
        position = torch.full((num_rows,), -1)
        position[call.rows] = torch.arange(len(call.rows))
    coefficients = coefficients.contiguous()
    library.gradient(
        _logits(student),
        _logits(teacher),
        _logits(out),
        _pointer(call.target),
        _pointer(position),
        num_rows,
        num_columns,
        call.shard.first,
        call.shard.width,
        _scales(call),
        _pointer(coefficients),
        _threads(num_rows, num_columns),
    )
    increment_version(out)  # written behind autograd's back; whoever saved the student must be told


def _logits(logits: Tensor | None) -> "ctypes._CArgObject":
    if logits is None:
        return ctypes.byref(_Logits(None, 0, 0))
    return ctypes.byref(_Logits(logits.data_ptr(), logits.stride(0) * logits.element_size(), logits.element_size()))


def _scales(call: Call) -> "ctypes._CArgObject":
    shard = call.shard
    floor = -float("inf") if shard.teacher_floor is None else shard.teacher_floor
    ratio = shard.teacher_scale / shard.student_scale
    return ctypes.byref(_Scales(shard.student_scale, shard.teacher_scale, ratio, floor))


def _pointer(numbers: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if numbers is None else numbers.data_ptr())


def _threads(num_rows: int, num_columns: int) -> ctypes.c_int64:
    most = num_rows * num_columns // _ELEMENTS_PER_THREAD
    return ctypes.c_int64(max(1, min(torch.get_num_threads(), num_rows, most)))


@functools.cache
def _library() -> ctypes.CDLL | None:
    """`native.cpp` compiled and loaded; None where that cannot be done."""
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "native.so"
        try:
            subprocess.run(
                [*compiler.split(), *_OPTIONS, "-o", built, _SOURCE], check=True, capture_output=True, text=True
            )
            library = ctypes.CDLL(str(built))
        except (OSError, subprocess.CalledProcessError) as error:
            reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
            logger.warning("backend 'compile' runs without its C++ for CPUs, because %r failed: %s", compiler, reason)
            return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.stats.argtypes = [pointer] * 4 + [integer] * 3 + [pointer] * 2 + [integer]
    library.gradient.argtypes = [pointer] * 5 + [integer] * 4 + [pointer] * 2 + [integer]
    library.stats.restype = library.gradient.restype = None
    return library
