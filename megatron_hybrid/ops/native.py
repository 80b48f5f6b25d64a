"""The passes of `eager.py` by the C++ of `native.cpp`: fp32 and bf16 logits on a CPU; `compiled.py` asks here first.

    stats      rows over torch's threads, each shard read once    8 numbers per token
    gradient   rows over torch's threads, each shard read once; the zeros are written in the same pass

Memory: [n, 8] and [rows] numbers beside the output. No collective.

Built when first asked for, in some seconds, for the processor it will run on, and loaded from a folder that is gone
again: nothing is kept that another machine with the same home could load. Where that fails `serves` is False from then
on, and the log says why.
Not here: other types, other devices. The other divergences: `native_mixtures.py`.
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

SOURCES = [Path(__file__).with_name(name) for name in ("native.cpp", "native_mixtures.cpp")]
_VECTORS = ["-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
"""The last two take back promises, about errno and traps, that keep loops from vectors; they change no result."""
OPTIONS = ["-std=c++17", *_VECTORS, "-shared", "-fPIC"]
_ELEMENTS_PER_THREAD = 1 << 15
"""At least, of one shard: about 30 us of work, beside which waking a thread shows."""


class _Logits(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("bytes", ctypes.c_int64)]


class _Scales(ctypes.Structure):
    _fields_ = [(name, ctypes.c_float) for name in ("student", "teacher", "ratio", "floor")]


class _Rows(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.POINTER(_Logits)) for name in ("student", "teacher", "out")),
        *((name, ctypes.c_void_p) for name in ("target", "position")),
        *((name, ctypes.c_int64) for name in ("num_rows", "columns", "first", "width")),
    ]


def serves(student: Tensor, teacher: Tensor | None) -> bool:
    """Whether these logits are read here: adjacent columns of fp32 or bf16 on a CPU, with a compiler at hand."""
    both = [student] if teacher is None else [student, teacher]
    return (
        student.device.type == "cpu"
        and student.dtype in (torch.float32, torch.bfloat16)
        and all(x.dtype == student.dtype and (x.stride(1) == 1 or x.shape[1] == 1) for x in both)
        and _build() is not None
    )


def shard_stats(student: Tensor, teacher: Tensor | None, call: Call) -> Tensor:
    """As `eager.shard_stats`: [n, 8] fp32."""
    n, width = len(call.target), call.shard.width
    stats = torch.empty((n, NUM_STATS), dtype=torch.float32)
    library().stats(
        logits_of(student),
        logits_of(teacher),
        pointer(call.target),
        pointer(call.rows),
        n,
        call.shard.first,
        width,
        scales_of(call),
        pointer(stats),
        num_threads(n, width),
    )
    return stats


def shard_gradient(student: Tensor, teacher: Tensor | None, call: Call, coefficients: Tensor, out: Tensor) -> None:
    """As `eager.shard_gradient`: fills `out`, which may be the student logits."""
    coefficients, positions = coefficients.contiguous(), call.positions(len(out))
    rows = rows_of(student, teacher, out, call, positions)
    library().gradient(rows, scales_of(call), pointer(coefficients), num_threads(*out.shape))
    increment_version(out)  # written behind autograd's back; whoever saved the student must be told


def logits_of(logits: Tensor | None) -> _Logits:
    if logits is None:
        return _Logits(None, 0, 0)
    return _Logits(logits.data_ptr(), logits.stride(0) * logits.element_size(), logits.element_size())


def rows_of(student: Tensor, teacher: Tensor | None, out: Tensor, call: Call, positions: Tensor | None) -> _Rows:
    """positions  `call.positions(len(out))`, to be kept until the rows were read"""
    of_logits = [ctypes.pointer(logits_of(logits)) for logits in (student, teacher, out)]
    return _Rows(*of_logits, pointer(call.target), pointer(positions), *out.shape, call.shard.first, call.shard.width)


def scales_of(call: Call) -> _Scales:
    shard = call.shard
    return _Scales(shard.student_scale, shard.teacher_scale, shard.teacher_scale / shard.student_scale, shard.floor)


def pointer(numbers: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if numbers is None else numbers.data_ptr())


def num_threads(num_rows: int, num_columns: int) -> int:
    most = num_rows * num_columns // _ELEMENTS_PER_THREAD
    return max(1, min(torch.get_num_threads(), num_rows, most))


def library() -> ctypes.CDLL:
    """The C++, loaded; to be asked for where `serves` said yes."""
    built = _build()
    assert built is not None
    return built


@functools.cache
def _build() -> ctypes.CDLL | None:
    """`SOURCES` compiled and loaded; None where that cannot be done."""
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "native.so"
        try:
            subprocess.run(
                [*compiler.split(), *OPTIONS, "-o", built, *SOURCES], check=True, capture_output=True, text=True
            )
            loaded = ctypes.CDLL(str(built))
        except (OSError, subprocess.CalledProcessError) as error:
            reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
            logger.warning("backend 'compile' runs without its C++ for CPUs, because %r failed: %s", compiler, reason)
            return None
    logits, scales, numbers, integer = ctypes.POINTER(_Logits), ctypes.POINTER(_Scales), ctypes.c_void_p, ctypes.c_int64
    rows, mixture, number = ctypes.POINTER(_Rows), ctypes.c_float * 5, ctypes.c_float
    loaded.stats.argtypes = [logits, logits, numbers, numbers, integer, integer, integer, scales, numbers, integer]
    loaded.gradient.argtypes = [rows, scales, numbers, integer]
    loaded.mixture_sums.argtypes = [logits, logits, numbers, integer, integer, scales, mixture, number]
    loaded.mixture_sums.argtypes += [numbers, numbers, integer]
    loaded.mixture_gradient.argtypes = [rows, scales, mixture, numbers, integer]
    for function in (loaded.stats, loaded.gradient, loaded.mixture_sums, loaded.mixture_gradient):
        function.restype = None
    return loaded
