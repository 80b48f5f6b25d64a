"""What is shown of a step: each response with its own words, reward and KL, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_hybrid.metrics import Metrics
from megatron_hybrid.records import Prompt, RolloutBatch
from megatron_hybrid.schedule.microbatch import microbatches
from megatron_hybrid.train.measure import SHOWN_SAMPLES, finished, held_out, measure_rollouts, sample_rows
from megatron_hybrid.train.samples import Sample

LENGTHS = (2, 5, 1, 3, 4, 2, 1, 5)
BORDERS = (3, 3, 1, 1, 2, 2, 4, 4)
WIDTH = 9


def rollouts(repeat: int = 1) -> RolloutBatch:
    """The response token at (row, column) has id 100 * row + column, so that it says where it belongs."""
    lengths, borders = LENGTHS * repeat, BORDERS * repeat
    rows = len(lengths)
    tokens = 100 * torch.arange(rows)[:, None] + torch.arange(WIDTH)[None]
    mask = torch.zeros(rows, WIDTH, dtype=torch.bool)
    for row, (border, length) in enumerate(zip(borders, lengths, strict=True)):
        mask[row, border : border + length] = True
    return RolloutBatch(
        prompts=tuple(
            Prompt(row // 2, (1,), f"question {row // 2}", f"task {row % 3}", f"a{row}") for row in range(rows)
        ),
        tokens=tokens,
        response_mask=mask,
        sampled_logprobs=torch.zeros(rows, WIDTH),
        group_id=torch.arange(rows) // 2,
        truncated=tuple(row % 4 == 0 for row in range(rows)),
        responses=tuple(f"response {row}" for row in range(rows)),
        temperature=1.0,
        policy_version=0,
        seed=0,
    )


def decode(ids: Any) -> str:
    return "+".join(map(str, ids))


def samples_of(batch: RolloutBatch, size: int, *, missing: int = 0, kl: bool = True) -> list[Sample]:
    """A step that has measured a KL of id / 1000 on the token of that id, but in the last `missing` micro-batches."""
    batches = microbatches(batch, micro_batch_size=size, aggregation="token-mean")
    token_kl = [micro.targets / 1000 for micro in batches][: len(batches) - missing]
    rewards = torch.arange(len(batch.tokens)).float() / 10
    return sample_rows(batch, rewards, batches, token_kl if kl else None, decode)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_each_kl_lands_on_its_own_token(size):
    batch = rollouts()
    samples = samples_of(batch, size)
    assert len(samples) == len(LENGTHS)
    for row, sample in enumerate(samples):
        ids = batch.tokens[row][batch.response_mask[row]].tolist()
        assert ids == [100 * row + BORDERS[row] + k for k in range(LENGTHS[row])]
        assert sample.tokens == tuple(map(str, ids))
        assert sample.kl_per_token == pytest.approx([i / 1000 for i in ids], rel=1e-6)  # fp32


@pytest.mark.parametrize("size", [1, 4])
def test_each_row_keeps_its_own_question_reward_and_flags(size):
    batch = rollouts()
    for row, sample in enumerate(samples_of(batch, size)):
        assert (sample.prompt, sample.task, sample.answer) == (f"question {row // 2}", f"task {row % 3}", f"a{row}")
        assert (sample.response, sample.truncated) == (f"response {row}", row % 4 == 0)
        assert sample.reward == pytest.approx(row / 10, rel=1e-6)  # fp32


def test_a_response_without_tokens_takes_none_of_its_neighbours():
    batch = rollouts()
    batch.response_mask[1] = False
    samples = samples_of(batch, 4)
    assert samples[1].tokens == samples[1].kl_per_token == ()
    assert [len(sample.tokens) for sample in samples] == [2, 0, *LENGTHS[2:]]


def test_without_a_teacher_there_is_no_kl_to_show():
    assert all(sample.kl_per_token == () and sample.tokens for sample in samples_of(rollouts(), 4, kl=False))


def test_only_the_first_micro_batches_are_shown():
    batch = rollouts(repeat=4)
    assert len(batch.tokens) == 2 * SHOWN_SAMPLES
    assert [sample.response for sample in samples_of(batch, 4)] == [f"response {row}" for row in range(SHOWN_SAMPLES)]


def test_a_missing_micro_batch_is_an_error_not_a_shorter_table():
    with pytest.raises(ValueError):
        samples_of(rollouts(), 4, missing=1)


def test_squared_norms_become_norms_and_stages_one_step():
    values = {"actor/grad_norm_dense": 9.0, "actor/grad_norm_sparse": 0.25, "perf/total_num_tokens": 30.0}
    values |= {"timing_s/teacher": 1.0, "timing_s/update": 2.0}  # a step that learns from an earlier collection
    found = finished(values)
    assert (found["actor/grad_norm_dense"], found["actor/grad_norm_sparse"]) == (3.0, 0.5)
    assert (found["timing_s/step"], found["perf/throughput"]) == (3.0, 10.0)


def test_each_of_several_rewards_is_reported_by_itself_and_by_task_under_training_and_held_out_names():
    batch, metrics = rollouts(), Metrics()
    rewards = torch.arange(len(LENGTHS)).float()
    breakdown = {"exact_match": rewards, "judge:80.v1": 10 * rewards}
    tasks = ("task 0", "task 1", "task 2")  # of rows 0 3 6, 1 4 7 and 2 5: two rows share a prompt, not a task
    measure_rollouts(metrics, batch, rewards, breakdown, reward_weight=1.0, tasks=tasks, counts_tokens=True)
    values = metrics.reduce() | {"actor/entropy": 1.0}
    of_task = {t: rewards[[p.task == t for p in batch.prompts]].mean().item() for t in tasks}
    for name, scale in (("exact_match", 1), ("judge:80.v1", 10)):
        assert values[f"rewards/{name}/mean"] == pytest.approx(scale * rewards.mean().item())
        for task in tasks:
            assert values[f"rewards/{name}/{task}"] == pytest.approx(scale * of_task[task])
    held = held_out(values)
    assert held["val/rewards/judge:80.v1/task 2"] == values["rewards/judge:80.v1/task 2"]
    assert {name for name in held if name.startswith("val/score/")} == {f"val/score/{task}" for task in tasks}


def test_one_reward_needs_no_breakdown():
    metrics = Metrics()
    measure_rollouts(metrics, rollouts(), torch.zeros(8), {}, reward_weight=1.0, tasks=(), counts_tokens=True)
    assert not [name for name in metrics.reduce() if name.startswith("rewards/")]
