"""The credit of a step: the settings as their schedules have them then, and what a checkpoint keeps."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.metrics import Metrics
from megatron_hybrid.parallel import ParallelContext
from megatron_hybrid.records import Prompt, RolloutBatch, TokenNumbers, TokenStats
from megatron_hybrid.train.credit import Credit, Scored

KL = torch.tensor([0.5, 0.25, 1.0, 2.0])
"""Two responses of two tokens."""


def scored() -> Scored:
    mask = torch.tensor([[False, True, True]] * 2)
    batch = RolloutBatch(
        prompts=(Prompt(0, (1,), "", "task"),) * 2,
        tokens=torch.ones(2, 3, dtype=torch.long),
        response_mask=mask,
        sampled_logprobs=torch.where(mask, -1.0, 0.0),
        group_id=torch.zeros(2, dtype=torch.long),
        truncated=(False,) * 2,
        responses=("",) * 2,
        temperature=1.0,
        policy_version=0,
        seed=0,
    )
    return Scored(batch, torch.tensor([1.0, 0.0]))


def weights(config: HybridConfig, step: int, credit: Credit | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Imitation weight and advantage of the four tokens, on-policy."""
    credit = credit or Credit(config, ParallelContext())
    tokens: Any = SimpleNamespace(
        sequence_of_token=torch.tensor([0, 0, 1, 1]),
        position_of_token=torch.tensor([1, 2, 1, 2]),
        sampled_logprobs=torch.full((4,), -1.0),
    )
    weigh = credit.credit_for(credit.collected(scored()), step=step, metrics=Metrics())(slice(0, 2), tokens)
    return weigh(TokenStats(KL, torch.full((4,), -1.0), torch.full((4,), -1.5), KL))


def test_weights_and_discount_are_those_of_the_step():
    config = HybridConfig(
        baseline="none",
        cost_baseline="none",
        reward_weight=2.0,
        reward_weight_schedule="linear:0:2",
        imitation_weight=1.0,
        imitation_weight_schedule="steps:3@2",
        discount=1.0,
        discount_schedule="steps:0.5@1",
    )
    future = torch.tensor([0.25, 0.0, 2.0, 0.0])
    for step, (reward, imitation, discount) in enumerate([(0.0, 1.0, 1.0), (1.0, 1.0, 0.5), (2.0, 3.0, 0.5)]):
        dense, advantage = weights(config, step)
        expected = reward * torch.tensor([1.0, 1.0, 0.0, 0.0]) - imitation * discount * future
        assert torch.equal(advantage, expected), step
        assert torch.equal(dense, torch.full((4,), imitation))


def test_a_running_mean_is_that_of_earlier_collections_and_is_kept():
    credit = Credit(HybridConfig(baseline="running_mean", baseline_decay=0.5), ParallelContext())
    advantages = [credit.collected(scored()).advantages for _ in range(2)]
    assert advantages[0] is not None and advantages[0].tolist() == [1.0, 0.0], "nothing is known at first"
    assert advantages[1] is not None and advantages[1].tolist() == [0.5, -0.5]
    other = Credit(credit.config, ParallelContext())
    other.load(credit.state())
    assert other.running_mean == credit.running_mean


@pytest.mark.parametrize("baseline", ["rloo", "none"])
def test_a_baseline_that_remembers_nothing_keeps_nothing(baseline: str):
    """Zeros in its place would pass for a mean when a later run resumes with `running_mean`."""
    credit = Credit(HybridConfig(baseline=baseline), ParallelContext())
    credit.collected(scored())
    assert credit.state() == {}


FILTERED = HybridConfig(imitation_filter="task", imitation_filter_floor=0.25)


def learnt(teacher_log_prob: list[float]) -> Credit:
    """A credit that has seen one step, a micro-batch for each response: the first earned 1, the second 0."""
    credit = Credit(FILTERED, ParallelContext(), ("other", "task"))
    tokens: Any = SimpleNamespace(sequence_of_token=torch.tensor([0, 0]), prompts=(None,))
    ones, teacher = torch.ones(2), torch.tensor(teacher_log_prob)
    numbers = [TokenNumbers(KL[:2], KL[:2], -ones, of_row, ones, ones) for of_row in teacher.split(2)]
    credit.after_step(credit.collected(scored()), [tokens, tokens], numbers)
    return credit


@pytest.mark.parametrize(("prefers", "share"), [("what earns", 1.0), ("what does not", 0.25)])
def test_a_task_is_imitated_less_after_steps_in_which_the_teacher_preferred_what_earns_less(prefers, share):
    likely, unlikely = [-0.5, -0.25], [-4.0, -5.0]
    credit = learnt(likely + unlikely if prefers == "what earns" else unlikely + likely)
    found = weights(FILTERED, 3, credit)
    alike = weights(HybridConfig(imitation_weight=share), 3)
    assert torch.equal(found[0], alike[0]) and torch.equal(found[1], alike[1])
    metrics = Metrics()
    credit.credit_for(credit.collected(scored()), step=3, metrics=metrics)
    values = metrics.reduce()
    assert values["training/imitation_share/task"] == share
    assert values["training/teacher_alignment/task"] * (1 if share == 1 else -1) > 0.5
    assert values["training/imitation_share/other"] == 1 and math.isnan(values["training/teacher_alignment/other"])


def test_a_dropped_group_teaches_the_filter_nothing():
    credit = Credit(FILTERED, ParallelContext(), ("task",))
    tokens: Any = SimpleNamespace(sequence_of_token=torch.zeros(0, dtype=torch.long), prompts=(None,))
    nothing = TokenNumbers(*[torch.zeros(0)] * 6)
    dropped = replace(scored(), dropped=torch.tensor([True, True]))
    credit.after_step(credit.collected(dropped), [tokens, tokens], [nothing, nothing])
    assert credit.filter is not None and credit.filter.moments == {}


def test_what_the_filter_has_learnt_is_kept():
    credit = learnt([-4.0, -5.0, -0.5, -0.25])
    other = Credit(FILTERED, ParallelContext(), ("task", "third"))
    other.load(credit.state())
    assert other.filter is not None and credit.filter is not None
    assert other.filter.moments == {"task": credit.filter.moments["task"]}


def test_a_stage_without_rewards_has_no_advantages():
    credit = Credit(HybridConfig(), ParallelContext())
    nothing = Scored(scored().rollouts, None)
    assert credit.collected(nothing) is nothing
