"""Trajectories drawn by another policy, at their exact probabilities: which weights give the student's gradient."""

import math
from typing import Any

import pytest

from megatron_hybrid.returns.baselines import reward_advantages
from megatron_hybrid.returns.corrections import Correction
from tests.returns.trajectories import FEW, NAMES, PROBLEMS, expected_gradient, pairs, truth

EXACT = Correction("sequence_truncate", threshold=math.inf, prefix=True)


@pytest.mark.parametrize("future_cost", ["closed_form", "sampled"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=NAMES)
def test_sequence_and_prefix_weights_are_exact_for_any_sampler(problem: dict[str, Any], future_cost: str):
    gradient = expected_gradient(problem, sampler_noise=0.7, correction=EXACT, future_cost=future_cost)
    # Ratios lie between 0.2 and 20 and multiply chances that are as much smaller: the bound of on-policy trajectories,
    # 1e-6, with a few more roundings.
    assert (gradient - truth(problem)).abs().max() < 2e-6


@pytest.mark.parametrize("future_cost", ["closed_form", "sampled"])
@pytest.mark.parametrize("problem", FEW)
def test_leave_one_out_baselines_stay_unbiased_under_another_sampler(problem: dict[str, Any], future_cost: str):
    gradient = expected_gradient(
        problem,
        group_size=2,
        baseline=lambda rewards, group_id: reward_advantages(rewards, group_id, "rloo"),
        group_id=pairs(problem),
        sampler_noise=0.7,
        correction=EXACT,
        future_cost=future_cost,
    )
    assert (gradient - truth(problem)).abs().max() < 4e-6  # as above, over a thousand times as many terms


@pytest.mark.parametrize("lesser", [Correction("token_truncate", math.inf), Correction("sequence_truncate", math.inf)])
@pytest.mark.parametrize("problem", PROBLEMS, ids=NAMES)
def test_token_weights_and_a_dense_term_without_prefix_are_biased_but_less_than_no_weights(problem, lesser: Correction):
    def error(correction: Correction) -> float:
        gradient = expected_gradient(problem, sampler_noise=0.7, correction=correction)
        return float((gradient - truth(problem)).norm())

    assert 1e-3 < error(lesser) < error(Correction("none"))
