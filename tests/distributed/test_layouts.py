"""The gradient of one batch of rollouts is the same number on every layout, and that of float64 autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.distributed.gradient import assert_same, gradient, whole
from tests.distributed.layouts import GPT, LAYOUTS, MODELS, Layout, Model, expected, measured
from tests.distributed.problem import Problem

BY_NAME = {layout.name: layout for layout in LAYOUTS}
ACROSS = [
    BY_NAME[name]
    for name in ("one rank, packed", "TP 2, sequence parallel", "PP 2, interleaved", "DP 2", "CP 2", "CP 2, packed")
]
"""One layout of each kind, for the problems that differ in what is trained on."""


@pytest.fixture(scope="module")
def truth(rank_pool):
    """The reference of a model and problem, worked out once."""
    known: dict[Any, Any] = {}

    def of(name: str, problem: Problem) -> dict[str, Any]:
        if (name, problem) not in known:
            known[name, problem] = expected(rank_pool, MODELS[name], problem)
        return known[name, problem]

    return of


def cases() -> list[Any]:
    """The table, cell by cell. Slow: eight ranks, and untied embeddings where no other model is tried either."""
    return [
        pytest.param(
            each,
            name,
            id=f"{each.name}: {name}",
            marks=pytest.mark.slow if each.num_ranks > 4 or (each.models is GPT and name == "GPT, untied") else (),
        )
        for each in LAYOUTS
        for name in each.models
    ]


@pytest.mark.parametrize(("layout", "name"), cases())
def test_every_layout_gives_the_gradient_of_float64_autograd(rank_pool, truth, layout: Layout, name: str):
    model = MODELS[name]
    assert_same(measured(rank_pool, layout, model, Problem()), truth(name, Problem()), model.tolerance)


PROBLEMS = {
    "token-mean": Problem(aggregation="token-mean"),
    "seq-mean-token-mean": Problem(aggregation="seq-mean-token-mean"),
    "responses of length 0, 1 and full": Problem(lengths=(0, 1, 13, 0, 0, 12, 1, 0), borders=(1, 3, 1, 5, 2, 2, 13, 4)),
    "micro-batches without a token": Problem(lengths=(0, 0, 0, 0, 7, 0, 0, 3)),
    "off-policy, exact weights": Problem(off_policy=True),
    "whole logits": Problem(lm_head="logits"),
}
QUICK = {
    "token-mean": ("DP 2", "CP 2, packed"),
    "seq-mean-token-mean": ("one rank, packed", "CP 2"),
    "responses of length 0, 1 and full": ("PP 2, interleaved", "CP 2, packed"),
    "micro-batches without a token": ("TP 2, sequence parallel", "PP 2, interleaved"),
    "off-policy, exact weights": ("one rank, packed", "CP 2"),
    "whole logits": ("TP 2, sequence parallel", "DP 2"),
}
"""Each problem on two layouts, among them one that it asks something of, and each layout with two problems."""


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        pytest.param(
            layout,
            name,
            id=f"{layout.name}-{name}",
            marks=() if layout.name in QUICK[name] else pytest.mark.slow,
        )
        for layout in ACROSS
        for name in PROBLEMS
    ],
)
def test_what_is_trained_on_does_not_depend_on_the_layout(rank_pool, truth, layout: Layout, name: str):
    problem = PROBLEMS[name]
    assert_same(measured(rank_pool, layout, Model(), problem), truth("GPT, tied", problem))


def test_a_micro_batch_without_a_token_adds_exactly_nothing(rank_pool):
    pool, problem = rank_pool(1, init=False), PROBLEMS["micro-batches without a token"]
    with_empty, without = (
        whole(pool.run(gradient, {"micro_batch_size": 2}, problem, drop_empty=drop)) for drop in (False, True)
    )
    assert all(torch.equal(with_empty[key], value) for key, value in without.items())


@pytest.mark.parametrize("name", ["one rank, micro-batches of 4", "TP 2, sequence parallel", "PP 2", "CP 2, packed"])
def test_the_group_baseline_of_the_cost_does_not_depend_on_the_layout(rank_pool, truth, name: str):
    layout = replace(BY_NAME[name], flags=BY_NAME[name].flags | {"micro_batch_size": 4})  # whole groups
    problem = Problem(cost_baseline="group")
    assert_same(measured(rank_pool, layout, Model(), problem), truth("GPT, tied", problem))


@pytest.mark.parametrize("other", [Problem(discount=0.8), Problem(reward_weight=1.49)], ids=["discount", "reward"])
def test_another_objective_is_told_apart(rank_pool, truth, other: Problem):
    with pytest.raises(AssertionError):
        assert_same(measured(rank_pool, BY_NAME["DP 2"], Model(), other), truth("GPT, tied", Problem()))
