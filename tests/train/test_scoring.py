"""Rewards are made beside the main thread where they can be, reach every rank of the last stage, and raise there."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megatron_hybrid.parallel import GroupView, ParallelContext
from megatron_hybrid.records import Prompt, RolloutBatch
from megatron_hybrid.rewards.rubric import Rubric
from megatron_hybrid.train.scoring import start_scoring


def rollouts() -> RolloutBatch:
    tokens = torch.zeros(2, 3, dtype=torch.long)
    return RolloutBatch(
        prompts=(Prompt(0, (1,), "", "task"),) * 2,
        tokens=tokens,
        response_mask=tokens > 0,
        sampled_logprobs=tokens.float(),
        group_id=tokens[:, 0],
        truncated=(False,) * 2,
        responses=("1.5", "2"),
        temperature=1.0,
        policy_version=0,
        seed=0,
    )


@dataclass
class Number:
    """The response as a number, once `may_go_on` is set."""

    may_go_on: threading.Event
    main_thread_only: bool = False
    name: str = "number"
    thread: str = ""

    def score(self, prompt: Prompt, response: str) -> float:
        self.thread = threading.current_thread().name
        assert self.may_go_on.wait(timeout=60)
        return float(response)


def parallel(**axes: GroupView) -> ParallelContext:
    names = ("tp", "pp", "dp", "cp", "dp_cp")
    return ParallelContext(**{name: GroupView() for name in names} | axes)


def test_scoring_goes_on_beside_the_caller():
    reward = Number(threading.Event())
    wait = start_scoring(rollouts(), Rubric({"number": (reward, 1.0)}), parallel())
    reward.may_go_on.set()  # only now: had it been scored at once, nobody could have come here
    assert wait().rewards.tolist() == [1.5, 2.0]
    assert reward.thread == "rewards"


def test_a_reward_bound_to_the_main_thread_stays_there():
    reward = Number(threading.Event(), main_thread_only=True)
    reward.may_go_on.set()
    assert start_scoring(rollouts(), Rubric({"number": (reward, 1.0)}), parallel())().rewards.tolist() == [1.5, 2.0]
    assert reward.thread == threading.main_thread().name


def test_what_a_reward_raises_reaches_the_one_who_waits():
    reward = Number(threading.Event())
    reward.may_go_on.set()
    batch = rollouts()
    object.__setattr__(batch, "responses", ("1.5", "not a number"))
    wait = start_scoring(batch, Rubric({"number": (reward, 1.0)}), parallel())
    with pytest.raises(ValueError, match="not a number"):
        wait()


def test_stages_before_the_last_know_no_rewards():
    assert (
        start_scoring(
            rollouts(), Rubric({"number": (Number(threading.Event()), 1.0)}), parallel(pp=GroupView(None, 0, 2))
        )()
        is None
    )


def scored_on_rank(axis: str) -> tuple[list[float], str]:
    reward = Number(threading.Event())
    reward.may_go_on.set()
    here = parallel(**{axis: GroupView.of(torch.distributed.group.WORLD)})
    scores: Any = start_scoring(rollouts(), Rubric({"number": (reward, 1.0)}), here)()
    return scores.rewards.tolist(), reward.thread


@pytest.mark.parametrize("axis", ["tp", "cp"])
def test_one_rank_scores_and_all_have_the_rewards(rank_pool, axis: str):
    first, second = rank_pool(2).run(scored_on_rank, axis)
    assert first == ([1.5, 2.0], "rewards") and second == ([1.5, 2.0], "")


def breakdown_on_rank() -> tuple[list[float], dict[str, list[float]]]:
    rewards = {name: (Number(threading.Event(), name=name), weight) for name, weight in (("a", 2.0), ("b", -1.0))}
    for reward, _ in rewards.values():
        reward.may_go_on.set()
    here = parallel(tp=GroupView.of(torch.distributed.group.WORLD))
    scores: Any = start_scoring(rollouts(), Rubric(rewards), here)()
    return scores.rewards.tolist(), {name: column.tolist() for name, column in scores.breakdown.items()}


def test_the_scores_of_several_rewards_reach_every_rank_with_their_sum(rank_pool):
    expected = ([1.5, 2.0], {"a": [1.5, 2.0], "b": [1.5, 2.0]})
    assert rank_pool(2).run(breakdown_on_rank) == [expected, expected]


def error_on_rank(text: str, axis: str) -> str:
    reward = Number(threading.Event())
    reward.may_go_on.set()
    batch = rollouts()
    object.__setattr__(batch, "responses", ("1.5", text))
    here = parallel(**{axis: GroupView.of(torch.distributed.group.WORLD)})
    with pytest.raises(ValueError) as caught:
        start_scoring(batch, Rubric({"number": (reward, 1.0)}), here)()
    return str(caught.value)


@pytest.mark.parametrize("axis", ["tp", "cp"])
def test_what_a_reward_raises_on_one_rank_is_raised_on_all_of_the_stage(rank_pool, axis: str):
    first, second = rank_pool(2).run(error_on_rank, "no number", axis)
    assert first == second and "no number" in first


class Interrupted:
    """Ctrl-C while it scores."""

    name = "interrupted"

    def __init__(self, *, main_thread_only: bool) -> None:
        self.main_thread_only = main_thread_only

    def score(self, prompt: Prompt, response: str) -> float:
        raise KeyboardInterrupt


def test_an_interrupt_of_the_main_thread_is_not_kept_for_later():
    with pytest.raises(KeyboardInterrupt):
        start_scoring(rollouts(), Rubric({"bad": (Interrupted(main_thread_only=True), 1.0)}), parallel())


def test_whatever_ends_the_thread_of_rewards_reaches_the_one_who_waits():
    wait = start_scoring(rollouts(), Rubric({"bad": (Interrupted(main_thread_only=False), 1.0)}), parallel())
    with pytest.raises(KeyboardInterrupt):
        wait()


def test_scores_are_made_on_the_cpu_and_moved_where_the_rollouts_are():
    batch = rollouts()
    object.__setattr__(batch, "tokens", batch.tokens.to("meta"))  # a device that is not the CPU, and is always there
    reward = Number(threading.Event())
    reward.may_go_on.set()
    rubric = Rubric({"number": (reward, 1.0)})
    assert rubric.score(batch).rewards.device.type == "cpu"
    assert start_scoring(batch, rubric, parallel())().rewards.device.type == "meta"
