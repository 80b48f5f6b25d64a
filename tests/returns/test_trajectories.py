"""Op and credit over every trajectory of a small problem: the exact gradient, and what is lost without the future."""

from typing import Any

import pytest
import torch

from tests.returns.trajectories import NAMES, PROBLEMS, expected_gradient, prefix, truth


@pytest.mark.parametrize("future_cost", ["closed_form", "sampled"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=NAMES)
def test_average_over_all_trajectories_is_the_exact_gradient(problem: dict[str, Any], future_cost: str):
    error = expected_gradient(problem, future_cost=future_cost) - truth(problem)
    # Terms are at most 10 in size and weighted by probabilities that sum to 1: fp32's 6e-8 of them is below 1e-6.
    assert error.abs().max() < 1e-6


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
