"""Unbiasedness without sampling: op and credit over every trajectory of a small problem, at its exact probability.

Each trajectory is one response, each of its tokens a row of logits, both weights multiplied by the trajectory's
probability: the summed loss has the expected gradient. It must equal the ground truth, which finite differences
confirmed.
"""

import itertools
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hybrid.ops.api import vocab_parallel_hybrid_loss
from megatron_hybrid.records import TokenStats
from megatron_hybrid.returns.weights import make_weigh
from tests.ops.vectors import VECTORS

PROBLEMS = json.loads((VECTORS / "trajectories.json").read_text())
NAMES = [f"discount_{problem['discount']}_{number}" for number, problem in enumerate(PROBLEMS)]


def prefix(tokens: list[int]) -> str:
    return ",".join(map(str, tokens))


def expected_gradient(problem: dict[str, Any], *, group_size: int = 1, **change: Any) -> Tensor:
    """[states, v] float64: the op's gradient averaged over all trajectories, or over all groups of trajectories."""
    states = {state: index for index, state in enumerate(problem["student_logits"])}
    student, teacher = (
        torch.tensor([problem[f"{who}_logits"][state] for state in states], dtype=torch.float64)
        for who in ("student", "teacher")
    )
    student.requires_grad_()
    log_p = student.detach().log_softmax(-1)
    trajectories = [[int(token) for token in key.split(",")] for key in problem["rewards"]]
    state_of_token, target, row, position, probability = [], [], [], [], []
    visits = [[states[prefix(tokens[:t])] for t in range(len(tokens))] for tokens in trajectories]
    chances = [log_p[v, tokens].sum().exp().item() for v, tokens in zip(visits, trajectories, strict=True)]
    groups = list(itertools.product(range(len(trajectories)), repeat=group_size))
    responses = [(group, which) for group in groups for which in group]
    for number, (group, which) in enumerate(responses):
        tokens, visited = trajectories[which], visits[which]
        # Each of the group's responses is an estimate; the group's is their mean.
        chance = math.prod(chances[i] for i in group) / group_size
        state_of_token += visited
        target += tokens
        row += [number] * len(tokens)
        position += range(len(tokens))
        probability += [chance] * len(tokens)
    rewards = torch.tensor(list(problem["rewards"].values()))
    options = {
        "reward_advantage": rewards[[which for _, which in responses]],
        "discount": problem["discount"],
        "future_cost": "closed_form",
        "reward_weight": problem["reward_weight"],
        "imitation_weight": 1.0,
    }
    weigh = make_weigh(
        row_of_token=torch.tensor(row),
        position_of_token=torch.tensor(position),
        num_positions=problem["horizon"],
        **(options | change),
    )
    weight = torch.tensor(probability)

    def expected(stats: TokenStats) -> tuple[Tensor, Tensor]:
        imitation, advantage = weigh(stats)
        return imitation * weight, advantage * weight

    # fp32 into the op; the sum over trajectories back at the states is float64, it is not what is tested.
    out = vocab_parallel_hybrid_loss(
        student[state_of_token].float(), teacher[state_of_token].float(), torch.tensor(target), weigh=expected
    )
    out.loss.sum().backward()
    assert student.grad is not None
    return student.grad


def truth(problem: dict[str, Any]) -> Tensor:
    return torch.tensor(list(problem["gradient"].values()), dtype=torch.float64)


@pytest.mark.parametrize("future_cost", ["closed_form", "sampled"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=NAMES)
def test_average_over_all_trajectories_is_the_exact_gradient(problem: dict[str, Any], future_cost: str):
    error = expected_gradient(problem, future_cost=future_cost) - truth(problem)
    # Terms are at most 10 in size and weighted by probabilities that sum to 1: fp32's 6e-8 of them is below 1e-6.
    assert error.abs().max() < 1e-6


@pytest.mark.parametrize("problem", PROBLEMS, ids=NAMES)
def test_a_constant_baseline_changes_nothing_in_expectation(problem: dict[str, Any]):
    rewards = torch.tensor(list(problem["rewards"].values()))
    error = expected_gradient(problem, reward_advantage=rewards - 0.7) - truth(problem)
    assert error.abs().max() < 1e-6  # as above


@pytest.mark.parametrize("future_cost", ["closed_form", "sampled"])
@pytest.mark.parametrize("problem", [problem for problem in PROBLEMS if len(problem["rewards"]) < 40])  # pairs are many
def test_the_group_baseline_of_the_cost_changes_nothing_in_expectation(problem: dict[str, Any], future_cost: str):
    pairs = len(problem["rewards"]) ** 2
    groups = torch.arange(pairs).repeat_interleave(2)
    gradient = expected_gradient(problem, group_size=2, group_id=groups, future_cost=future_cost)
    assert (gradient - truth(problem)).abs().max() < 2e-6  # as above, over a thousand times as many terms


@pytest.mark.parametrize("problem", [problem for problem in PROBLEMS if problem["discount"] > 0])
def test_dropping_the_future_cost_is_noticed(problem: dict[str, Any]):
    biased = expected_gradient(problem, discount=0.0)
    assert (biased - truth(problem)).norm() > 0.01 * truth(problem).norm()


def test_no_reward_and_no_future_is_distillation_on_the_students_own_trajectories():
    problem = PROBLEMS[0]
    gradient = expected_gradient(problem, reward_weight=0.0, discount=0.0)
    states = list(problem["student_logits"])
    student, teacher = (
        torch.tensor([problem[f"{who}_logits"][state] for state in states], dtype=torch.float64).log_softmax(-1)
        for who in ("student", "teacher")
    )
    p = student.exp()
    for index, state in enumerate(states):
        tokens = [int(token) for token in state.split(",")] if state else []
        visits = torch.stack(
            [p[states.index(prefix(tokens[:t]))][tokens[t]] for t in range(len(tokens))] or [p.sum() * 0 + 1]
        )
        ratio = student[index] - teacher[index]
        expected = visits.prod() * p[index] * (ratio - (p[index] * ratio).sum())
        assert (gradient[index] - expected).abs().max() < 1e-6  # as above
