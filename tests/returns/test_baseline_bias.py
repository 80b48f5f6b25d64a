"""Each baseline over every trajectory, or every pair of them: unbiased, or its bias named and measured."""

import pytest
import torch
from torch import Tensor

from megatron_hybrid.returns.baselines import reward_advantages
from tests.returns.trajectories import FEW, NAMES, PROBLEMS, expected_gradient, pairs, truth

REWARDED = [problem for problem in FEW if problem["reward_weight"] > 0]
"""A bias of the policy gradient shows where there is one."""


@pytest.mark.parametrize("future_cost", ["closed_form", "sampled"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=NAMES)
@pytest.mark.parametrize(("baseline", "mean"), [("none", None), ("running_mean", 0.7), ("running_mean", -3.0)])
def test_no_baseline_and_any_earlier_mean_are_unbiased(problem, baseline: str, mean: float | None, future_cost: str):
    def advantages(rewards: Tensor, group_id: Tensor) -> Tensor:
        return reward_advantages(rewards, group_id, baseline, running_mean=mean)

    error = expected_gradient(problem, baseline=advantages, future_cost=future_cost) - truth(problem)
    assert error.abs().max() < 2e-6  # fp32's 6e-8 of terms up to 10 in size, weighted by probabilities


@pytest.mark.parametrize("future_cost", ["closed_form", "sampled"])
@pytest.mark.parametrize("problem", FEW)
@pytest.mark.parametrize("cost_baseline", ["none", "group"])
@pytest.mark.parametrize("baseline", ["none", "rloo"])
def test_leave_one_out_baselines_are_unbiased(problem, baseline: str, cost_baseline: str, future_cost: str):
    gradient = expected_gradient(
        problem,
        group_size=2,
        baseline=lambda rewards, group_id: reward_advantages(rewards, group_id, baseline),
        group_id=pairs(problem) if cost_baseline == "group" else None,
        future_cost=future_cost,
    )
    assert (gradient - truth(problem)).abs().max() < 2e-6  # as above, over a thousand times as many terms


@pytest.mark.parametrize("future_cost", ["closed_form", "sampled"])
@pytest.mark.parametrize("problem", REWARDED)
def test_a_batch_mean_that_contains_the_response_shrinks_the_policy_gradient_by_one_part_in_b(problem, future_cost):
    def centred(rewards: Tensor, _: Tensor) -> Tensor:
        """REINFORCE++ of each pair as a batch of its own, its division by the std undone."""
        batches = rewards.view(-1, 2)
        whitened = [reward_advantages(batch, torch.zeros(2), "reinforce_plus_plus") for batch in batches]
        return torch.cat([part * (batch.std() + 1e-6) for part, batch in zip(whitened, batches, strict=True)])

    gradient = expected_gradient(problem, group_size=2, baseline=centred, future_cost=future_cost)
    imitation = expected_gradient(problem, reward_weight=0.0, future_cost=future_cost)
    policy = truth(problem) - imitation
    assert policy.abs().max() > 0.01  # there is something to shrink
    assert (gradient - imitation - (1 - 1 / 2) * policy).abs().max() < 2e-6  # as above


@pytest.mark.parametrize("problem", REWARDED)
def test_grpo_of_pairs_climbs_the_chance_to_beat_ones_own_other_sample(problem):
    def grpo(rewards: Tensor, group_id: Tensor) -> Tensor:
        return reward_advantages(rewards, group_id, "grpo")

    def beats(rewards: Tensor, _: Tensor) -> Tensor:
        first, second = rewards.view(-1, 2).unbind(1)
        return torch.stack(((first - second).sign(), (second - first).sign()), 1).flatten() / 2**0.5

    imitation = expected_gradient(problem, reward_weight=0.0)
    biased = expected_gradient(problem, group_size=2, baseline=grpo) - imitation
    named = expected_gradient(problem, group_size=2, baseline=beats) - imitation
    # The 1e-6 beside the std matters where rewards differ by 0.001 only: 1e-3 of an advantage of 0.7 there, in pairs of
    # which few are drawn.
    assert (biased - named).abs().max() < 1e-4
    # Not the direction of the expected reward, whatever the length: the bias is no learning rate.
    policy = truth(problem) - imitation
    assert torch.cosine_similarity(biased.flatten(), policy.flatten(), dim=0) < 0.999
