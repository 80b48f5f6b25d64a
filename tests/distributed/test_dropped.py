"""A dropped group leaves the gradient of the batch without it, on every layout; of nothing the gradient is 0."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.distributed.gradient import assert_same, gradient, whole
from tests.distributed.layouts import LAYOUTS, Layout, Model, expected
from tests.distributed.problem import LENGTHS, Problem

FIRST_GROUP_FAILED = (2,)
"""A row of the first group: with two replicas, all that one of them has."""
WITHOUT = (0, 0, 0, 0, *LENGTHS[4:])
"""Response tokens of the batch without that group."""
NAMES = ("one rank, packed", "TP 2, sequence parallel", "PP 2, interleaved", "DP 2", "CP 2")
ACROSS = [layout for layout in LAYOUTS if layout.name in NAMES]


@pytest.fixture(scope="module")
def truth(rank_pool):
    """Float64 autograd on the group that is kept."""
    return {name: expected(rank_pool, Model(), replace(kind, lengths=WITHOUT)) for name, kind in PROBLEMS.items()}


PROBLEMS = {"sequences": Problem(), "tokens": Problem(aggregation="token-mean")}


def measured(rank_pool: Any, layout: Layout, problem: Problem, failed: tuple[int, ...]) -> dict[str, torch.Tensor]:
    pool = rank_pool(layout.num_ranks, init=False)
    return whole(pool.run(gradient, Model().on(layout), problem, layout.packed, failed=failed))


@pytest.mark.parametrize("counted", PROBLEMS)
@pytest.mark.parametrize("layout", ACROSS, ids=lambda layout: layout.name)
def test_the_gradient_is_that_of_the_batch_without_the_group(rank_pool, truth, layout: Layout, counted: str):
    assert len(ACROSS) == len(NAMES)
    assert_same(measured(rank_pool, layout, PROBLEMS[counted], FIRST_GROUP_FAILED), truth[counted])


@pytest.mark.parametrize("layout", ACROSS, ids=lambda layout: layout.name)
def test_without_a_token_anywhere_the_gradient_is_exactly_zero(rank_pool, layout: Layout):
    found = measured(rank_pool, layout, Problem(), (0, 7))
    assert found and all(not value.any() for value in found.values())
