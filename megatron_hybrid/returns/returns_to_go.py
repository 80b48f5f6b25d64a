"""Cost-to-go: what a token's choice will still cost, its own immediate cost excluded.

    C_t = sum_{t' > t} gamma^(t' - t) c_t'          over masked-in t' of the same row and segment

costs [b, s] -> C [b, s]. The immediate cost is left out because the op's dense term already differentiates it exactly.
A doubling scan: after round j every position holds the sum over the next 2**j of them, so log2(s) rounds of a few
tensor operations, and no division by gamma**t that would overflow. No collective: context parallelism is refused.
"""

import torch
from torch import Tensor

from megatron_hybrid.errors import ConfigError, ShapeError
from megatron_hybrid.parallel import Group, GroupView

_SMALLEST = 2.0**-149
"""Smallest positive fp32: a factor below it rounds to 0, and 0 times an infinite cost is NaN."""


def cost_to_go(
    costs: Tensor, mask: Tensor, discount: float, segments: Tensor | None = None, cp_group: Group = None
) -> Tensor:
    """Discounted sums over the strict future of each position, [b, s] fp32, detached.

    costs     [b, s] fp32, what each token cost; read only where the mask is True
    mask      [b, s] bool: tokens that cost something. Others cost 0 but still count as distance
    discount  gamma in [0, 1], per position of distance; 0 gives exactly 0
    segments  [b, s] integer ids of packed sequences: a sum ends where the id changes. None: one sequence per row
    cp_group  context-parallel group: must have one rank
    """
    if costs.dim() != 2 or mask.shape != costs.shape or mask.dtype != torch.bool:
        raise ShapeError(
            f"cost_to_go needs costs [b, s] and a bool mask of that shape, got {list(costs.shape)} and {mask.dtype} "
            f"{list(mask.shape)}."
        )
    if segments is not None and (segments.shape != costs.shape or segments.is_floating_point()):
        raise ShapeError(f"segments must be integers {list(costs.shape)}, got {segments.dtype} {list(segments.shape)}.")
    if not 0 <= discount <= 1:
        raise ConfigError(f"discount (gamma) must lie in [0, 1], got {discount}: far costs would outweigh near ones.")
    if (ranks := GroupView.of(cp_group).size) > 1:
        raise ConfigError(
            f"cost_to_go is not written for context parallelism, and cp_group has {ranks} ranks: each would sum only "
            "its own positions, and their order (contiguous or zig-zag) is unknown here. Gather the costs first."
        )
    sums = torch.where(mask, costs.detach().float(), 0.0)
    future = torch.zeros_like(sums)
    if discount == 0:
        return future
    run = _runs(segments)
    reach, factor = 1, float(discount)
    while reach < costs.shape[1] and factor >= _SMALLEST:
        sums = sums + factor * _ahead(sums, reach, run)
        reach, factor = 2 * reach, factor * factor
    return discount * _ahead(sums, 1, run)


def _ahead(values: Tensor, distance: int, run: Tensor | None) -> Tensor:
    """values[t + distance] at t; 0 beyond the row's end or in another run."""
    shifted = torch.zeros_like(values)
    moved = values[:, distance:]
    if run is not None:
        moved = torch.where(run[:, distance:] == run[:, : run.shape[1] - distance], moved, 0.0)
    shifted[:, : moved.shape[1]] = moved
    return shifted


def _runs(segments: Tensor | None) -> Tensor | None:
    """[b, s]: number of the run of equal ids each position is in; an id that comes back later starts a new run."""
    if segments is None:
        return None
    changes = torch.zeros_like(segments, dtype=torch.long)
    changes[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return changes.cumsum(1)
