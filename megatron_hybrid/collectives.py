"""The two collectives of the op, over tensor-parallel ranks, and one rank's find for all. A group of one (or None)
issues nothing.

No reduction is left to the backend where bits matter: `gather_ranks` hands every rank the same numbers in rank order,
and whoever merges them locally gets the same bits everywhere.
"""

import traceback
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hybrid.errors import sendable
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


def from_first[T](make: Callable[[], T], axes: Sequence[GroupView]) -> T:
    """What the rank that is first of every axis makes, on every rank of them; the error that it met, likewise.

    Whatever only one rank may do, such as asking a server, must not leave the others waiting for it, whatever ends it.
    An error that pickle cannot make again is a RuntimeError with its traceback.
    Collectives: a broadcast of the pickled value along each axis.
    """
    found: list[tuple[bool, T | BaseException] | None] = [None]
    if all(axis.rank == 0 for axis in axes):
        try:
            found = [(True, make())]
        except BaseException as error:  # a reward that calls exit() too
            note = f"rank {dist.get_rank() if dist.is_initialized() else 0}, for all:\n{traceback.format_exc()}"
            found = [(False, sendable(error, note))]
    for axis in axes:  # each spreads what those before it have
        if axis.size > 1:
            dist.broadcast_object_list(found, group=axis.group, group_src=0)
    assert found[0] is not None
    fine, value = found[0]
    if not fine:
        assert isinstance(value, BaseException)
        raise value
    return value  # type: ignore[return-value]
