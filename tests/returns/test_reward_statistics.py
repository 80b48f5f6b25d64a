"""Statistics over replicas and over steps: by hand, and the same bits however a batch is split."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.returns.baselines import reward_advantages
from megatron_hybrid.returns.reward_statistics import RunningMean, batch_statistics
from tests.ranks import Ranks

Pools = Callable[..., Ranks]
REWARDS = torch.tensor([0.1, 1e15, -0.7, 3.3, 1e-5, -1e15, 0.2, 0.9])
"""So far apart that even fp64 sums depend on their order."""


def of_replica(rewards: Tensor) -> tuple[Any, Tensor, float]:
    """On each rank: statistics of all, REINFORCE++ advantages of its part, a running mean after one step."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    part, group = rewards.chunk(ranks)[rank], dist.group.WORLD
    advantages = reward_advantages(part, torch.zeros(len(part)), "reinforce_plus_plus", dp_group=group)
    return batch_statistics(part, group), advantages, RunningMean(0.5).updated(part, dp_group=group).value


def test_statistics_by_hand():
    batch = batch_statistics(torch.tensor([1.0, 5.0, 0.0, 2.0]))
    assert (batch.count, batch.total, batch.mean) == (4, 8.0, 2.0)
    assert batch.std == pytest.approx((14 / 3) ** 0.5, rel=1e-15)  # 1 + 9 + 4 + 0, divided by 4 - 1; fp64
    assert batch_statistics(torch.tensor([3.0])).std == 0.0
    assert batch_statistics(torch.zeros(0)).mean == 0.0


def test_a_batch_split_over_replicas_has_the_same_bits(rank_pool: Pools):
    expected = batch_statistics(REWARDS)
    advantages = reward_advantages(REWARDS, torch.zeros(8), "reinforce_plus_plus")
    for order in (torch.arange(8), torch.arange(8).flip(0), torch.tensor([3, 1, 4, 0, 5, 2, 7, 6])):
        seen = rank_pool(2).run(of_replica, REWARDS[order])
        assert all(batch == expected for batch, _, _ in seen)
        assert torch.equal(torch.cat([part for _, part, _ in seen]), advantages[order])
        assert all(mean == expected.mean for _, _, mean in seen)


def test_the_running_mean_starts_at_zero_and_forgets_at_its_decay():
    new = RunningMean(0.9)
    assert new.value == 0.0
    first = new.updated(torch.tensor([2.0, 4.0]))
    assert first.value == pytest.approx(3.0, rel=1e-12)  # the step's mean, not a tenth of it
    second = first.updated(torch.tensor([6.0]))
    assert second.value == pytest.approx((0.9 * 3 + 6) / 1.9, rel=1e-12)  # ages weigh 0.9 and 1
    assert RunningMean(0.0).updated(torch.tensor([2.0])).updated(torch.tensor([7.0])).value == 7.0


def test_an_update_changes_neither_the_old_mean_nor_anything_without_responses():
    mean = RunningMean(0.5).updated(torch.tensor([2.0]))
    before = mean.state()
    assert mean.updated(torch.zeros(0)) is mean
    mean.updated(torch.tensor([100.0]))
    assert mean.state() == before


def test_the_running_mean_goes_on_exactly_from_its_state():
    mean = RunningMean(0.9).updated(torch.tensor([0.3])).updated(torch.tensor([1.7]))
    state = mean.state()
    assert all(type(number) is float for number in state.values())
    assert RunningMean.from_state(0.9, state) == mean


def test_a_mean_that_never_moves_is_refused():
    with pytest.raises(ConfigError, match="never moves"):
        RunningMean(1.0)
