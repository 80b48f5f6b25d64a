"""The passes of `eager.py` by the kernels of `triton_kernels.py`: what a launch needs, from shapes and strides alone.

    stats      kernel over [counted rows, splits], and one over rows that merges the splits where there are several
    gradient   kernel over [all rows, splits], which also writes the zeros: no further pass over the output

Memory: [n, splits, 8] and [rows] numbers beside the output. No collective, no synchronisation, no copy of any logits.
It declines logits on a CPU, unless Triton interprets its kernels, and vocabularies that are not contiguous.

The sizes below follow from counting bytes and registers (tests/ops/test_triton_compile.py), not from GPU timings:
each thread reads one 16-byte vector of each shard per step, so about 1500 resident threads keep 48 KB in flight per
multiprocessor, where bandwidth times latency asks for about 20 KB on an H100. There is nothing left to autotune.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from megatron_hybrid.errors import ConfigError, ShapeError
from megatron_hybrid.ops.call import Call
from megatron_hybrid.ops.eager import NUM_STATS

VECTOR_BYTES = 16
"""The widest load a thread can ask for."""
WARPS = 4
LANES = 32 * WARPS
"""One lane per thread: sums over a lane's items need no shuffle. 128 threads, and not more, because a row of 18992
bf16 logits is 18.5 tiles of that: little is wasted in the last one, and the lanes meet cheaply at the end."""
FEW_ITEMS = 4
"""Of a lane where it loads them one by one: no vector asks for eight, and their masks would take registers."""
MOST_REGISTERS = 64
"""Of a thread: 8 programs per multiprocessor still fit beside each other. Asked for, as compilers for newer GPUs take
more for the Jensen-Shannon divergence, which fits without a spill."""
WANTED_PROGRAMS = 1024
"""Fewer rows than this are split: an H100 holds 132 * 10 programs at once, and should be short of none."""
FEWEST_TILES = 4
"""Of a split: below it, a program's start and the merge would cost as much as its reading."""


@dataclass(frozen=True)
class Tiling:
    """How rows are cut for a launch; see the docstring of `triton_kernels.py`."""

    items: int
    """Columns of a lane: one vector of the widest dtype; no more than `FEW_ITEMS` without whole vectors."""
    unit: int
    """`items` where rows are made of whole vectors, 1 where they are not."""
    tiles: int
    """Of one program."""
    splits: int
    """Programs of one row."""

    @classmethod
    def of(cls, num_rows: int, num_columns: int, *logits: Tensor) -> "Tiling":
        """For `num_columns` columns that are read or written in each of `num_rows` rows of logits [rows, v/tp]."""
        items = VECTOR_BYTES // max(tensor.element_size() for tensor in logits)
        whole = all(tensor.stride(0) % items == 0 and tensor.shape[1] % items == 0 for tensor in logits)
        items = items if whole else min(items, FEW_ITEMS)
        tiles = max(1, -(-num_columns // (LANES * items)))
        splits = min(-(-WANTED_PROGRAMS // max(num_rows, 1)), max(tiles // FEWEST_TILES, 1))
        tiles_of_one = -(-tiles // splits)
        return cls(items, items if whole else 1, tiles_of_one, -(-tiles // tiles_of_one))

    def constants(self) -> dict[str, int]:
        """What the kernels are compiled for."""
        # No software pipeline: it would move the loads through shared memory, and occupancy hides them already.
        launch = {"num_warps": WARPS, "num_stages": 1, "maxnreg": MOST_REGISTERS}
        return {"UNIT": self.unit, "LANES": LANES, "ITEMS": self.items, **launch}

    def stride(self, logits: Tensor | None) -> int:
        """From row to row, in units."""
        return 0 if logits is None else logits.stride(0) // self.unit


def shard_stats(student: Tensor, teacher: Tensor | None, call: Call) -> Tensor:
    """As `eager.shard_stats`: [n, 8] fp32."""
    check_readable(student, teacher)
    from megatron_hybrid.ops import triton_kernels as kernels

    shard, n = call.shard, len(call.target)
    tiling = Tiling.of(n, shard.width, *_given(student, teacher))
    stats = torch.zeros((n, NUM_STATS), dtype=torch.float32, device=student.device)
    if n == 0:
        return stats
    partial = stats if tiling.splits == 1 else stats.new_zeros((n, tiling.splits, NUM_STATS))
    scales = (shard.student_scale, shard.teacher_scale, shard.teacher_scale / shard.student_scale)
    with torch.cuda.device_of(student):  # Triton launches on the current device
        kernels.stats_kernel[(n, tiling.splits)](
            student,
            teacher,
            call.target,
            call.rows,
            partial,
            tiling.stride(student),
            tiling.stride(teacher),
            shard.first,
            shard.width,
            tiling.tiles,
            *scales,
            shard.floor,
            **tiling.constants(),
        )
        if tiling.splits > 1:
            most = 1 << (tiling.splits - 1).bit_length()
            kernels.merge_kernel[(n,)](partial, stats, tiling.splits, *scales, teacher is not None, most, num_warps=1)
    return stats


def shard_gradient(student: Tensor, teacher: Tensor | None, call: Call, coefficients: Tensor, out: Tensor) -> None:
    """As `eager.shard_gradient`: fills `out`, which may be the student logits."""
    check_readable(student, teacher, out)
    from megatron_hybrid.ops import triton_kernels as kernels

    shard = call.shard
    scales = (shard.student_scale, shard.teacher_scale / shard.student_scale)
    run_gradient(kernels.gradient_kernel, student, teacher, call, coefficients, out, *scales, shard.floor)


def run_gradient(
    kernel: Any,
    student: Tensor,
    teacher: Tensor | None,
    call: Call,
    coefficients: Tensor,
    out: Tensor,
    *numbers: float,
    **letters: float | None,
) -> None:
    """Fills `out` by a kernel over [all rows, splits].

    numbers, letters  what the kernel takes besides rows, strides and tiles: scales and floor; of a mixture its own
    """
    num_rows, num_columns = out.shape
    tiling = Tiling.of(num_rows, num_columns, *_given(student, teacher, out))
    if num_rows == 0:
        return
    with torch.cuda.device_of(student):  # Triton launches on the current device
        kernel[(num_rows, tiling.splits)](
            student,
            teacher,
            out,
            call.target,
            call.positions(num_rows),
            coefficients,
            tiling.stride(student),
            tiling.stride(teacher),
            tiling.stride(out),
            call.shard.first,
            call.shard.width,
            num_columns,
            tiling.tiles,
            *numbers,
            **letters,
            **tiling.constants(),
        )
    increment_version(out)  # a kernel writes behind autograd's back; whoever saved the student must be told


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def check_readable(*logits: Tensor | None) -> None:
    """Raises where the kernels cannot run on these logits; imports triton."""
    try:
        from megatron_hybrid.ops import triton_kernels
    except ImportError as error:
        raise ConfigError(
            f"backend 'triton' needs the package triton, which does not import here ({error}): PyTorch's CUDA builds "
            "for Linux bring it. Install it (pip install triton), or choose backend 'torch'."
        ) from error
    for tensor in _given(*logits):
        if tensor.device.type != "cuda" and not triton_kernels.INTERPRETED:
            raise ConfigError(
                f"backend 'triton' compiles for GPUs, but the logits are on {tensor.device}. Choose backend 'torch' "
                "there. For tests, TRITON_INTERPRET=1 in the environment before Python starts has the kernels "
                "interpreted, thousands of times slower."
            )
        if tensor.stride(1) != 1 and tensor.shape[1] > 1:
            raise ShapeError(
                f"backend 'triton' reads rows of adjacent logits, but neighbours in the vocabulary lie "
                f"{tensor.stride(1)} elements apart: no vector load could serve them. Pass logits.contiguous(), or "
                "choose backend 'torch'."
            )
