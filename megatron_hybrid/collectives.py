"""The two collectives of the op, over tensor-parallel ranks. A group of one (or None) issues nothing.

No reduction is left to the backend where bits matter: `gather_ranks` hands every rank the same numbers in rank order,
and whoever merges them locally gets the same bits everywhere.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hybrid.parallel import Group, GroupView


def gather_ranks(values: Tensor, group: Group) -> Tensor:
    """One all-gather: values [...] of every rank, stacked in rank order, [tp, ...]; equal on every rank."""
    size = GroupView.of(group).size
    if size == 1:
        return values.unsqueeze(0)
    gathered = values.new_empty((size, *values.shape))
    # The flat form: every backend takes it, and gloo checks no shapes that only it would object to.
    dist.all_gather_into_tensor(gathered.view(-1), values.contiguous().view(-1), group=group)
    return gathered


def sum_over_ranks(values: Tensor, group: Group) -> Tensor:
    """One all-gather, summed in rank order [...]: the same bits on every rank, which an all-reduce does not promise."""
    gathered = gather_ranks(values, group)
    return gathered[0] if len(gathered) == 1 else torch.sum(gathered, dim=0)
