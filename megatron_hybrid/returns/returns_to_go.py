"""Cost-to-go: what a token's choice will still cost, its own immediate cost excluded.

    C_t = sum_{t' > t} gamma^(t' - t) c_t'          over masked-in t' of the same row and segment

costs [b, s] -> C [b, s]. The immediate cost is left out because the op's dense term already differentiates it exactly.
A doubling scan: after round j every position holds the sum over the next 2**j of them, so log2(s) rounds of a few
tensor operations, and no division by gamma**t that would overflow.

Under context parallelism a sequence is cut into 2 cp equal chunks and rank r holds chunks r and 2 cp - 1 - r
(Megatron's zig-zag); packed sequences (THD) are cut each on its own. The slices are put back in order, summed once by
every rank, and each keeps its own. Collectives: one all-gather of the costs [b, s/cp] fp32; none at cp = 1.

Source: the strictly future cost of arXiv 2512.23097, whose gradient the dense term completes.
"""

import torch
from torch import Tensor

from megatron_hybrid.collectives import gather_ranks
from megatron_hybrid.errors import ConfigError, ShapeError
from megatron_hybrid.parallel import Group, GroupView

_SMALLEST = 2.0**-149
"""Smallest positive fp32: a factor below it rounds to 0, and 0 times an infinite cost is NaN."""


def cost_to_go(
    costs: Tensor, mask: Tensor, discount: float, segments: Tensor | None = None, cp_group: Group = None
) -> Tensor:
    """Discounted sums over the strict future of each position, [b, s] fp32, detached, in the costs' unit (nats).

    costs     [b, s] fp32, what each token cost; read only where the mask is True
    mask      [b, s] bool: tokens that cost something. Others cost 0 but still count as distance
    discount  gamma in [0, 1], per position of distance; 0 gives exactly 0
    segments  [b, s] integer ids of packed sequences: a sum ends where the id changes. None: one sequence per row
    cp_group  context-parallel group: s is then s/cp, this rank's two chunks of each sequence, and so is the result; all
              its ranks call, and see the same ids

    Raises:
        ShapeError: shapes or types do not belong together; positions that do not halve, under context parallelism.
        ConfigError: a discount outside [0, 1].
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
    ranks = GroupView.of(cp_group)
    if ranks.size > 1 and costs.shape[1] % 2:
        raise ShapeError(
            f"under context parallelism a rank holds two chunks of equal length, but costs are {list(costs.shape)}: "
            f"{costs.shape[1]} positions do not halve. Pad sequences to a multiple of {2 * ranks.size}."
        )
    sums = torch.where(mask, costs.detach().float(), 0.0)
    if discount == 0:
        return torch.zeros_like(sums)
    if ranks.size > 1:
        run = torch.zeros_like(sums, dtype=torch.long) if segments is None else _runs(segments)
        places = _places(run, ranks.size)  # [cp, b, s/cp]
        order = places.transpose(0, 1).flatten(1)
        whole, runs = (
            torch.empty_like(order, dtype=slices.dtype).scatter(1, order, slices.transpose(0, 1).flatten(1))
            for slices in (gather_ranks(sums, cp_group), run.expand_as(places))
        )
        return _strict_future(whole, float(discount), runs).gather(1, places[ranks.rank])
    return _strict_future(sums, float(discount), None if segments is None else _runs(segments))


def _strict_future(sums: Tensor, discount: float, run: Tensor | None) -> Tensor:
    """The doubling scan over whole rows: costs [b, s], 0 where masked, to their discounted strict future.

    run  [b, s]: number of the sequence each position is in; None: one per row
    """
    reach, factor = 1, discount
    while reach < sums.shape[1] and factor >= _SMALLEST:
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


def _runs(segments: Tensor) -> Tensor:
    """[b, s]: number of the run of equal ids each position is in; an id that comes back later starts a new run."""
    changes = torch.zeros_like(segments, dtype=torch.long)
    changes[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return changes.cumsum(1)


def _places(run: Tensor, cp_size: int) -> Tensor:
    """[cp, b, s/cp]: where each position of each rank's slice lies in the whole row [b, s].

    run  [b, s/cp]: number of the sequence a position of a slice is in, the same on every rank
    """
    num_rows, width = run.shape
    length = torch.zeros_like(run).scatter_add(1, run, torch.ones_like(run)).gather(1, run)
    torch._assert_async(
        (length % 2 == 0).all(),
        "a packed sequence has an odd number of positions on this rank: under context parallelism each holds two "
        "chunks of equal length. Pad every sequence to a multiple of twice the context-parallel size.",
    )
    position = torch.arange(width, device=run.device).expand(num_rows, -1)
    first = torch.full_like(run, width).scatter_reduce(1, run, position, "amin").gather(1, run)
    within, half = position - first, length // 2
    rank = torch.arange(cp_size, device=run.device).view(-1, 1, 1)
    second = within >= half
    chunk = torch.where(second, 2 * cp_size - 1 - rank, rank)
    return first * cp_size + chunk * half + within - torch.where(second, half, 0)
