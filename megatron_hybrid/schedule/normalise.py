"""The only divisor of the gradient: one global count, and the share of a token in its sequence's term.

Megatron sums `count` over micro-batches and data-parallel ranks (`--calculate-per-token-loss`) and divides the summed
gradient by it once, so the gradient does not depend on how sequences were split or ordered.

    seq-mean-token-sum   sum over tokens, mean over sequences     scale 1          count sequences   (the objective J)
    token-mean           mean over tokens                         scale 1          count tokens
    seq-mean-token-mean  mean over a sequence's tokens, then over sequences   scale 1/length   count sequences
"""

import torch
from torch import Tensor

from megatron_hybrid.errors import ConfigError


def normaliser(response_mask: Tensor, aggregation: str) -> tuple[Tensor, Tensor]:
    """What a micro-batch adds to the global count, and the scale of its tokens.

    response_mask  [b, s] bool
    returns        count [] int32 (Megatron's type), scale per sequence [b] fp32

    A sequence without a response token counts as none.
    """
    lengths = response_mask.sum(dim=1)
    sequences = (lengths > 0).sum()
    ones = torch.ones_like(lengths, dtype=torch.float32)
    if aggregation == "seq-mean-token-sum":
        return sequences.int(), ones
    if aggregation == "token-mean":
        return lengths.sum().int(), ones
    if aggregation == "seq-mean-token-mean":
        return sequences.int(), 1.0 / lengths.clamp(min=1).float()
    raise ConfigError(f"aggregation {aggregation!r} has no normaliser: see AGGREGATIONS in megatron_hybrid/config.py.")
