"""Metrics: each name keeps its own reduction, on one rank and over several."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_hybrid.errors import HybridError
from megatron_hybrid.metrics import MAX_SLOTS, Metrics
from tests.ranks import Ranks

Pools = Callable[..., Ranks]


def test_each_kind_by_hand():
    metrics = Metrics()
    for values in (torch.tensor([1.0, 2.0]), torch.tensor([6.0])):
        metrics.mean("m", values)
        metrics.sum("s", values)
        metrics.max("hi", values)
        metrics.min("lo", values)
    assert metrics.reduce() == {"m": 3.0, "s": 9.0, "hi": 6.0, "lo": 1.0}


def test_mean_of_uneven_microbatches_is_the_mean_of_their_values():
    metrics = Metrics()
    metrics.mean("m", torch.full((9,), 1.0))
    metrics.mean("m", torch.tensor([11.0]))
    assert metrics.reduce()["m"] == 2.0


def test_scalar_weight_is_the_number_of_things_averaged():
    metrics = Metrics()
    metrics.mean("m", 1.0, weights=3)
    metrics.mean("m", 5.0, weights=1)
    assert metrics.reduce()["m"] == 2.0


def test_masked_values_are_never_looked_at():
    values, mask = torch.tensor([math.nan, 2.0, 4.0, math.inf]), torch.tensor([False, True, True, False])
    metrics = Metrics()
    metrics.mean("m", values, weights=mask)
    metrics.spread("x", values, mask=mask)
    assert metrics.reduce() == {"m": 3.0, "x/mean": 3.0, "x/max": 4.0, "x/min": 2.0}


def test_nothing_at_all_is_nan_not_zero():
    metrics = Metrics()
    metrics.mean("m", 1.0, weights=0)
    metrics.spread("x", torch.zeros(0))
    assert all(math.isnan(value) for value in metrics.reduce().values())


def test_a_nan_stays_with_its_own_name():
    metrics = Metrics()
    metrics.max("bad", torch.tensor([1.0, math.nan]))
    metrics.max("bad", 2.0)
    metrics.max("good", 3.0)
    metrics.mean("bad mean", math.nan)
    metrics.mean("good mean", 4.0)
    reduced = metrics.reduce()
    assert math.isnan(reduced["bad"]) and math.isnan(reduced["bad mean"])
    assert (reduced["good"], reduced["good mean"]) == (3.0, 4.0)


def test_sums_keep_integers_that_fp32_would_round():
    metrics = Metrics()
    metrics.sum("tokens", torch.tensor([2**24], dtype=torch.int64))
    metrics.sum("tokens", 1)
    assert metrics.reduce()["tokens"] == 2**24 + 1


def test_collecting_keeps_no_graph():
    value = torch.tensor([1.0], requires_grad=True)
    metrics = Metrics()
    metrics.mean("m", value * 2)
    metrics.max("hi", value * 2)
    assert not metrics._sums["m"].requires_grad and not metrics._peaks["hi"].requires_grad


def test_one_name_cannot_have_two_reductions():
    metrics = Metrics()
    metrics.mean("x", 1.0)
    with pytest.raises(HybridError, match="'x' was collected as a mean and now as a max"):
        metrics.max("x", 1.0)


def test_more_maxima_than_fit_are_refused():
    metrics = Metrics()
    for i in range(MAX_SLOTS // 2):
        metrics.max(f"x{i}", 1.0)
    with pytest.raises(HybridError, match="at most 255 fit"):
        metrics.reduce()


def uneven_ranks() -> tuple[dict[str, float], int]:
    """What a rank gets, and how many collectives that took. Rank 1 says the names in another order."""
    rank = dist.get_rank()
    metrics = Metrics()
    values = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0])][rank]
    actions = [
        lambda: metrics.mean("m", values),
        lambda: metrics.sum("s", values),
        lambda: metrics.max("hi", values),
        lambda: metrics.min("lo", values),
        lambda: metrics.max("nan", math.nan if rank == 0 else 1.0),
        lambda: metrics.mean("one rank only", 7.0, weights=rank),
        lambda: metrics.max("nobody", torch.zeros(0)),
    ]
    for action in actions if rank == 0 else reversed(actions):
        action()
    calls, original = [], dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    dist.all_reduce = counted
    try:
        return metrics.reduce(dist.group.WORLD), len(calls)
    finally:
        dist.all_reduce = original


def different_names(maxima: int) -> str:
    """The error of a rank when rank 1 alone has `maxima` more."""
    metrics = Metrics()
    metrics.mean("both", 1.0)
    for i in range(maxima if dist.get_rank() == 1 else 0):
        metrics.max(f"extra{i}", 1.0)
        metrics.mean(f"mean{i}", 1.0)
    try:
        metrics.reduce(dist.group.WORLD)
    except HybridError as error:
        return str(error)
    return "no error"


def different_kinds() -> str:
    metrics = Metrics()
    (metrics.mean if dist.get_rank() == 0 else metrics.sum)("x", 1.0)
    try:
        metrics.reduce(dist.group.WORLD)
    except HybridError as error:
        return str(error)
    return "no error"


def test_two_ranks_get_the_numbers_of_all_values_in_two_collectives(rank_pool: Pools):
    for reduced, num_collectives in rank_pool(2).run(uneven_ranks):
        assert math.isnan(reduced.pop("nan")) and math.isnan(reduced.pop("nobody"))
        assert reduced == {"m": 4.0, "s": 16.0, "hi": 10.0, "lo": 1.0, "one rank only": 7.0}
        assert num_collectives == 2


@pytest.mark.parametrize("maxima", [1, 100])
def test_ranks_with_different_names_all_raise_and_name_the_difference(rank_pool: Pools, maxima: int):
    for message in rank_pool(2).run(different_names, maxima):
        assert "rank 0 lacks extra0 (max)" in message and "mean0 (mean)" in message
        assert "rank 1 lacks" not in message


def test_one_name_of_two_kinds_is_a_difference(rank_pool: Pools):
    for message in rank_pool(2).run(different_kinds):
        assert "rank 0 lacks x (sum); rank 1 lacks x (mean)" in message
