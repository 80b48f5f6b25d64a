"""The passes of `mixtures.py` by the kernels of `triton_mixture_kernels.py`: other divergences than the reverse KL.

    sums       kernel over [counted rows, splits]; a row's splits are added up after it
    gradient   kernel over [all rows, splits], which also writes the zeros: no further pass over the output

Memory: [n, splits, 2] and [rows] numbers beside the output. No collective, no synchronisation, no copy of any logits.
Tiles, sizes and what is declined: `triton_op.py`.
"""

import torch
from torch import Tensor

from megatron_hybrid.ops import mixtures
from megatron_hybrid.ops.call import Call
from megatron_hybrid.ops.divergence import Mixture
from megatron_hybrid.ops.triton_op import Tiling, check_readable, run_gradient


def shard_sums(student: Tensor, teacher: Tensor, call: Call, mixture: Mixture, numbers: Tensor) -> Tensor:
    """As `mixtures.shard_sums`: [n, 2] fp32."""
    check_readable(student, teacher)
    from megatron_hybrid.ops import triton_mixture_kernels as kernels

    shard, n = call.shard, len(call.target)
    tiling = Tiling.of(n, shard.width, student, teacher)
    sums = torch.zeros((n, tiling.splits, 2), dtype=torch.float32, device=student.device)
    if n:
        with torch.cuda.device_of(student):  # Triton launches on the current device
            kernels.mixture_sums_kernel[(n, tiling.splits)](
                student,
                teacher,
                call.rows,
                numbers,
                sums,
                tiling.stride(student),
                tiling.stride(teacher),
                shard.width,
                tiling.tiles,
                *_scales(call),
                mixtures.forbidden(shard),
                **letters(mixture),
                **tiling.constants(),
            )
    return sums.sum(1)


def shard_gradient(
    student: Tensor, teacher: Tensor, call: Call, mixture: Mixture, coefficients: Tensor, out: Tensor
) -> None:
    """As `mixtures.shard_gradient`: fills `out`, which may be the student logits."""
    check_readable(student, teacher, out)
    from megatron_hybrid.ops import triton_mixture_kernels as kernels

    own = {name: value for name, value in letters(mixture).items() if name != "teacher_term"}
    run_gradient(kernels.mixture_gradient_kernel, student, teacher, call, coefficients, out, *_scales(call), **own)


def _scales(call: Call) -> tuple[float, float, float, float]:
    shard = call.shard
    return shard.student_scale, shard.teacher_scale, shard.teacher_scale / shard.student_scale, shard.floor


def letters(mixture: Mixture) -> dict[str, float | None]:
    """The numbers of `divergence.py` by the kernels' names; None for a 0, of which nothing is then compiled."""
    return {name: value or None for name, value in (mixture._asdict() | {"slope": mixture.slope}).items()}
