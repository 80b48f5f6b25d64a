"""Advantages of rewards, by hand."""

import pytest
import torch

from megatron_hybrid.errors import ConfigError, ShapeError
from megatron_hybrid.records import TokenStats
from megatron_hybrid.returns.baselines import cost_baseline, reward_advantages
from megatron_hybrid.returns.weights import make_weigh

REWARDS = torch.tensor([1.0, 5.0, 0.0, 7.0, 2.0])
GROUPS = torch.tensor([9, 4, 9, 4, 9])  # {1, 0, 2} and {5, 7}, interleaved


def test_no_baseline_keeps_the_reward():
    assert reward_advantages(REWARDS, GROUPS, "none").tolist() == REWARDS.tolist()


def test_leave_one_out_subtracts_the_mean_of_the_others():
    assert reward_advantages(REWARDS, GROUPS, "rloo").tolist() == [0.0, -2.0, -1.5, 2.0, 1.5]


def test_grpo_divides_by_the_groups_sample_deviation():
    expected = [0.0, -1 / 2**0.5, -1.0, 1 / 2**0.5, 1.0]  # deviations 1 and sqrt 2
    assert reward_advantages(REWARDS, GROUPS, "grpo").tolist() == pytest.approx(expected, abs=2e-6)  # epsilon is 1e-6


def test_the_running_mean_is_subtracted():
    assert reward_advantages(REWARDS, GROUPS, "running_mean", running_mean=2.0).tolist() == [-1.0, 3.0, -2.0, 5.0, 0.0]


def test_reinforce_plus_plus_whitens_the_batch_whatever_the_groups():
    advantages = reward_advantages(REWARDS, GROUPS, "reinforce_plus_plus")
    # Mean 3, deviations -2, 2, -3, 4, -1: 34 / (5 - 1).
    expected = [deviation / 8.5**0.5 for deviation in (-2.0, 2.0, -3.0, 4.0, -1.0)]
    assert advantages.tolist() == pytest.approx(expected, abs=2e-6)  # epsilon is 1e-6


@pytest.mark.parametrize("baseline", ["rloo", "grpo", "reinforce_plus_plus"])
def test_equal_rewards_teach_nothing(baseline: str):
    advantages = reward_advantages(torch.full((4,), 0.1), torch.zeros(4, dtype=torch.long), baseline)
    assert advantages.abs().max() < 1e-9


@pytest.mark.parametrize("baseline", ["rloo", "grpo"])
def test_a_response_alone_in_its_group_is_refused(baseline: str):
    with pytest.raises(ConfigError, match="at least 2"):
        reward_advantages(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1]), baseline)


def test_other_mistakes_are_named():
    with pytest.raises(ConfigError, match="none, rloo, grpo, reinforce_plus_plus, running_mean"):
        reward_advantages(REWARDS, GROUPS, "median")
    with pytest.raises(ConfigError, match="no running_mean was given"):
        reward_advantages(REWARDS, GROUPS, "running_mean")
    with pytest.raises(ConfigError, match="this one has 1"):
        reward_advantages(REWARDS[:1], GROUPS[:1], "reinforce_plus_plus")
    with pytest.raises(ShapeError, match="one per response"):
        reward_advantages(REWARDS, GROUPS[:3], "rloo")


def test_cost_baseline_by_hand():
    costs = torch.tensor([[9.0, 4.0, 2.0, 0.0], [9.0, 6.0, 0.0, 0.0], [9.0, 8.0, 6.0, 4.0], [9.0, 1.0, 1.0, 1.0]])
    mask = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1]], dtype=torch.bool)
    baseline = cost_baseline(costs, mask, torch.tensor([0, 0, 0, 7]))
    # Leave one out in rows 0-2; a response that has ended counts 0; row 3 is alone.
    assert baseline.tolist() == [[0, 7, 3, 0], [0, 6, 0, 0], [0, 5, 1, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("future_cost", ["closed_form", "sampled"])
def test_an_infinite_cost_stays_in_its_own_group(future_cost: str):
    """Four responses in one micro-batch, or two and two: the credit of the clean group is the same."""
    rows, length = 4, 3
    row, position = (x.flatten() for x in torch.meshgrid(torch.arange(rows), torch.arange(length), indexing="ij"))
    kl, log_prob = torch.rand(rows * length), -torch.rand(rows * length)
    teacher = -torch.rand(rows * length)
    kl[2 * length + 2], teacher[2 * length + 2] = torch.inf, -torch.inf

    def credit(of: slice) -> torch.Tensor:
        mine = (row >= of.start) & (row < of.stop)
        weigh = make_weigh(
            reward_advantage=torch.zeros(of.stop - of.start),
            row_of_token=row[mine] - of.start,
            position_of_token=position[mine],
            num_positions=length,
            discount=1.0,
            future_cost=future_cost,
            reward_weight=0.0,
            imitation_weight=1.0,
            group_id=torch.arange(of.start, of.stop) // 2,
        )
        return weigh.advantage(TokenStats(kl[mine], log_prob[mine], teacher[mine], kl[mine]))

    together, apart = credit(slice(0, 4)), torch.cat([credit(slice(0, 2)), credit(slice(2, 4))])
    assert torch.equal(together, apart)
    assert together[: 2 * length].abs().max() > 0, "the clean group has credit"
    # Nobody in the other group has one where an infinite cost lies ahead, in the response or in its peer.
    assert together[2 * length :].view(2, length)[:, :2].abs().max() == 0


KEPT = torch.tensor([True, True, True, False, False, False])


@pytest.mark.parametrize("baseline", ["none", "rloo", "grpo", "reinforce_plus_plus", "running_mean"])
def test_a_dropped_group_is_as_if_it_had_not_been_there(baseline):
    rewards = torch.tensor([0.0, 1.0, 5.0, 100.0, 0.0, 7.0])
    groups = torch.tensor([3, 3, 3, 8, 8, 8])
    found = reward_advantages(rewards, groups, baseline, kept=KEPT, running_mean=0.5)
    alone = reward_advantages(rewards[:3], groups[:3], baseline, running_mean=0.5)
    assert torch.equal(found, torch.cat([alone, torch.zeros(3)]))


@pytest.mark.parametrize("baseline", ["none", "rloo", "grpo", "reinforce_plus_plus", "running_mean"])
@pytest.mark.parametrize("kept", [0, 2], ids=["nothing", "one group"])
def test_of_equal_rewards_or_of_nothing_no_advantage_is_nan(baseline, kept):
    rewards, groups = torch.full((4,), 0.1), torch.tensor([0, 0, 1, 1])
    found = reward_advantages(rewards, groups, baseline, kept=torch.arange(4) < kept, running_mean=0.1)
    assert found.isfinite().all() and not found[kept:].any()
    if baseline != "none":
        # 0.1 is stored in fp32, the mean given in fp64: they differ by a rounding.
        assert found.abs().max() < 1e-7


def test_the_one_response_that_is_kept_of_a_batch_has_nobody_to_be_compared_with():
    rewards, groups = torch.tensor([3.0, 5.0]), torch.tensor([0, 1])
    kept = torch.tensor([True, False])
    assert reward_advantages(rewards, groups, "reinforce_plus_plus", kept=kept).tolist() == [0, 0]
