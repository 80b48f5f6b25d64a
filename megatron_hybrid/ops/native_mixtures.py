"""The passes of `mixtures.py` by the C++ of `native_mixtures.cpp`: other divergences than the reverse KL on a CPU.

    sums       rows over threads, each shard read once    D and E_p[g] per token
    gradient   rows over threads, each shard read once; the zeros are written in the same pass

Memory: [n, 2] and [rows] numbers beside the output. No collective. Which logits are read: `native.serves`.
"""

import ctypes

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from megatron_hybrid.ops import mixtures, native
from megatron_hybrid.ops.call import Call
from megatron_hybrid.ops.divergence import Mixture


def shard_sums(student: Tensor, teacher: Tensor, call: Call, mixture: Mixture, numbers: Tensor) -> Tensor:
    """As `mixtures.shard_sums`: [n, 2] fp32."""
    n, width, numbers = len(call.target), call.shard.width, numbers.contiguous()
    sums = torch.empty((n, 2), dtype=torch.float32)
    native.library().mixture_sums(
        native.logits_of(student),
        native.logits_of(teacher),
        native.pointer(call.rows),
        n,
        width,
        native.scales_of(call),
        _letters(mixture),
        mixtures.forbidden(call.shard),
        native.pointer(numbers),
        native.pointer(sums),
        native.num_threads(n, width),
    )
    return sums


def shard_gradient(
    student: Tensor, teacher: Tensor, call: Call, mixture: Mixture, coefficients: Tensor, out: Tensor
) -> None:
    """As `mixtures.shard_gradient`: fills `out`, which may be the student logits."""
    coefficients, positions = coefficients.contiguous(), call.positions(len(out))
    native.library().mixture_gradient(
        native.rows_of(student, teacher, out, call, positions),
        native.scales_of(call),
        _letters(mixture),
        native.pointer(coefficients),
        native.num_threads(*out.shape),
    )
    increment_version(out)  # written behind autograd's back; whoever saved the student must be told


def _letters(mixture: Mixture) -> "ctypes.Array[ctypes.c_float]":
    return (ctypes.c_float * 5)(*mixture, mixture.slope)
