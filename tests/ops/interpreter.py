"""A pytest plugin (`-p tests.ops.interpreter`): the Triton backend serves wherever the torch backend is named.

For a process of its own, started with TRITON_INTERPRET=1: the kernels then run as numpy. Two repairs make that useful.
Tiles are small, so that a row of 40 logits is made of several, and of several splits. And fp32 becomes bf16 by rounding
to nearest, as every GPU does it: the interpreter cuts the last bits off.
"""

import warnings

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from megatron_hybrid.ops import api, triton_op

assert triton.knobs.runtime.interpret, "this plugin is for a process started with TRITON_INTERPRET=1"

SMALL_LANES, SMALL_SPLITS = 4, 2
triton_op.LANES, triton_op.FEWEST_TILES = SMALL_LANES, SMALL_SPLITS
api.BACKENDS["torch"] = api.BACKENDS["triton"]

_cast = interpreter.InterpreterBuilder.cast_impl


def _rounding_cast(
    self: interpreter.InterpreterBuilder, source: interpreter.TensorHandle, to: tl.dtype
) -> interpreter.TensorHandle:
    """`cast_impl` with bf16 by torch; the interpreter keeps bf16 in arrays of uint16."""
    kinds = source.dtype.scalar, to.scalar
    data = torch.from_numpy(np.ascontiguousarray(source.data))
    if kinds == (tl.float32, tl.bfloat16):
        return interpreter.TensorHandle(data.bfloat16().view(torch.uint16).numpy(), tl.bfloat16)
    if kinds == (tl.bfloat16, tl.float32):
        return interpreter.TensorHandle(data.view(torch.bfloat16).float().numpy(), tl.float32)
    return _cast(self, source, to)


interpreter.InterpreterBuilder.cast_impl = _rounding_cast
# numpy's, about infinities and NaN that the kernels mean to meet
warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
