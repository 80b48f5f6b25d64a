"""The filter of imitation by task: what it estimates, by hand, on ranks, and across a stop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hybrid.returns.task_filter import TaskFilter

Pools = Callable[..., Any]


def task_filter(floor: float = 0.1, decay: float = 0.5) -> TaskFilter:
    return TaskFilter(("sums", "words"), floor, decay)


def test_what_it_estimates_is_how_the_reward_changes_from_the_student_towards_the_teacher():
    """Responses that occur as often as the student gives them, and the derivative of E[r] under pi^(1-e) q^e."""
    counts = torch.tensor([1, 2, 4, 9])
    pi, q = counts.double() / counts.sum(), torch.tensor([0.3, 0.1, 0.5, 0.1], dtype=torch.float64)
    reward = torch.tensor([1.0, 0.0, 0.25, -2.0], dtype=torch.float64)
    share = torch.zeros((), dtype=torch.float64, requires_grad=True)
    on_the_path = torch.softmax((1 - share) * pi.log() + share * q.log(), dim=0)
    (expected,) = torch.autograd.grad(on_the_path @ reward, share)

    drawn = torch.arange(4).repeat_interleave(counts)
    preference = (q.log() - pi.log())[drawn]
    found = TaskFilter(("sums",), 0.1, 0.0).updated(
        reward[drawn], preference, torch.zeros(len(drawn), dtype=torch.long), ["sums"] * len(drawn)
    )
    # Preferences travel in fp32: a few roundings of 6e-8.
    assert found.moments["sums"][0] == pytest.approx(float(expected), rel=1e-6)


REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
PREFERENCE = torch.tensor([2.0, -2.0, 3.0, -3.0, 5.0, 7.0])
GROUPS = torch.tensor([4, 4, 9, 9, 2, 2])
TASKS = ["sums", "sums", "words", "words", "words", "words"]


def test_moments_and_shares_by_hand():
    before = task_filter()
    assert before.shares(TASKS).tolist() == [1.0] * 6, "nothing is known: imitate"
    assert before.correlation("sums") is None
    seen = before.updated(REWARDS, PREFERENCE, GROUPS, TASKS)
    # sums: (1/2 * 2 + 1/2 * 2) / 2 responses; words: -(1/2 * 3) * 2 and -(1/2 * 1) * 2 over 4; half of it is kept new
    assert seen.moments["sums"] == (0.5 * 1.0, 0.5 * 0.25, 0.5 * 4.0)
    assert seen.moments["words"] == (0.5 * -1.0, 0.5 * 0.25, 0.5 * (9 + 9 + 1 + 1) / 4)
    assert seen.shares(["words", "sums"]).tolist() == pytest.approx([0.1, 1.0])
    assert seen.correlation("sums") == pytest.approx(1.0)
    assert seen.correlation("words") == pytest.approx(-1 / math.sqrt(0.25 * 5))
    assert before.moments == {}, "the filter of earlier steps is what it was"
    again = seen.updated(REWARDS[:2], -PREFERENCE[:2], GROUPS[:2], TASKS[:2])
    assert again.moments["sums"][0] == 0.5 * 0.5 - 0.5 * 1.0
    assert again.moments["words"] == seen.moments["words"], "not seen in this step"


@pytest.mark.parametrize("bad", [-math.inf, math.nan], ids=["forbidden by the teacher", "not finite"])
def test_a_group_that_cannot_be_compared_does_not_count(bad):
    preference = PREFERENCE.clone()
    preference[2] = bad
    found = task_filter().updated(REWARDS, preference, GROUPS, TASKS)
    rows = [0, 1, 4, 5]
    alone = task_filter().updated(REWARDS[rows], PREFERENCE[rows], GROUPS[rows], [TASKS[row] for row in rows])
    assert found.moments == alone.moments
    kept = torch.tensor([True, True, False, False, True, True])
    assert task_filter().updated(REWARDS, PREFERENCE, GROUPS, TASKS, kept=kept).moments == found.moments


def test_a_task_that_nobody_knows_does_not_count():
    """A collection that was made from other prompts."""
    found = task_filter().updated(REWARDS, PREFERENCE, GROUPS, ["old", "old", *TASKS[2:]])
    assert set(found.moments) == {"words"} and found.share("old") == 1.0


def test_where_all_earn_the_same_the_teacher_is_followed():
    found = task_filter().updated(torch.zeros(6), PREFERENCE, GROUPS, TASKS)
    assert found.shares(TASKS).tolist() == [1.0] * 6
    assert found.correlation("sums") is None


def of_rank(rows: list[list[int]], part: list[float], over: str) -> dict[str, Any]:
    """The moments on one rank of two: of its own rows, or of its part of every response."""
    mine = torch.tensor(rows[dist.get_rank()])
    groups: dict[str, Any] = {f"{over}_group": dist.group.WORLD}
    found = task_filter().updated(
        REWARDS[mine], part[dist.get_rank()] * PREFERENCE[mine], GROUPS[mine], [TASKS[i] for i in mine], **groups
    )
    return found.moments


@pytest.mark.parametrize(
    ("rows", "part", "over"),
    [([[0, 1], [2, 3, 4, 5]], [1.0, 1.0], "dp"), ([[0, 1, 2, 3, 4, 5]] * 2, [0.25, 0.75], "cp")],
    ids=["replicas", "context parallelism"],
)
def test_ranks_know_together_what_one_knows_alone(rank_pool: Pools, rows, part, over):
    alone = task_filter().updated(REWARDS, PREFERENCE, GROUPS, TASKS).moments
    first, second = rank_pool(2).run(of_rank, rows, part, over)
    assert first == second == alone  # numbers that fp32 holds exactly


def test_it_goes_on_exactly_from_its_state():
    def data(seed: int) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        return torch.rand(6, generator=draw), torch.randn(6, generator=draw)

    whole = task_filter().updated(*data(1), GROUPS, TASKS)
    parts = task_filter().loaded(whole.state())
    assert parts.moments == whole.moments
    assert parts.updated(*data(2), GROUPS, TASKS) == whole.updated(*data(2), GROUPS, TASKS)
    assert set(task_filter().state()) == set(whole.state()), "stages that know nothing have the same names"
    assert TaskFilter(("new",), 0.1, 0.5).loaded(whole.state()).moments == {}
