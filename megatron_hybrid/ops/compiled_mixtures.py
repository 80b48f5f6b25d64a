"""The passes of `mixtures.py` compiled: by `native_mixtures.cpp` for fp32 and bf16 on a CPU, else the torch backend's.

Data in and out, edge cases and types are those of `mixtures.py`. No collective.
Not here: torch.compile. A GPU has kernels of its own, backend "triton".
"""

from torch import Tensor

from megatron_hybrid.ops import mixtures, native, native_mixtures
from megatron_hybrid.ops.call import Call
from megatron_hybrid.ops.divergence import Mixture
from megatron_hybrid.ops.function import MixturePasses


def shard_sums(student: Tensor, teacher: Tensor, call: Call, mixture: Mixture, numbers: Tensor) -> Tensor:
    """As `mixtures.shard_sums`: [n, 2] fp32."""
    passes: MixturePasses = native_mixtures if native.serves(student, teacher) else mixtures
    return passes.shard_sums(student, teacher, call, mixture, numbers)


def shard_gradient(
    student: Tensor, teacher: Tensor, call: Call, mixture: Mixture, coefficients: Tensor, out: Tensor
) -> None:
    """As `mixtures.shard_gradient`: writes the gradient of every row and column of the shard into `out`."""
    passes: MixturePasses = native_mixtures if native.serves(student, teacher) else mixtures
    passes.shard_gradient(student, teacher, call, mixture, coefficients, out)
