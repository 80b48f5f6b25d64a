"""Megatron's split of a sequence over context-parallel ranks, written out: rank r has chunks r and 2 cp - 1 - r."""

import torch
from torch import Tensor


def positions_of(rank: int, ranks: int, length: int) -> Tensor:
    """Positions of a row that lie on this rank, in its order; length must divide by 2 * ranks."""
    chunk = length // (2 * ranks)
    first, second = rank * chunk, (2 * ranks - 1 - rank) * chunk
    return torch.cat((torch.arange(first, first + chunk), torch.arange(second, second + chunk)))
