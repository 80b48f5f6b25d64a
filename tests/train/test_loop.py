"""What the loop shows of a step: each response with its own words, reward and KL, token by token."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.parallel import ParallelContext
from megatron_hybrid.records import Prompt, RolloutBatch
from megatron_hybrid.schedule.forward_step import HybridForwardStep
from megatron_hybrid.schedule.layout import SequenceLayout
from megatron_hybrid.schedule.microbatch import microbatches
from megatron_hybrid.train.credit import Scored
from megatron_hybrid.train.loop import SHOWN_SAMPLES, OnlineLoop, Teachers

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


class Decoder:
    """The loop asks a sampler for nothing but words here."""

    @staticmethod
    def decode(ids: Any) -> str:
        return "+".join(map(str, ids))


def no_credit(rows: slice, sequence: Tensor, column: Tensor) -> Any:
    return lambda stats: (torch.ones_like(stats.kl), torch.zeros_like(stats.kl))


def loop_after_a_step(batch: RolloutBatch, size: int, *, has_teacher: bool = True) -> OnlineLoop:
    """A loop whose forward step has measured a KL of id / 1000 on the token of that id."""
    batches = microbatches(batch, micro_batch_size=size, aggregation="token-mean", credit_for=no_credit)
    step = HybridForwardStep(HybridConfig())
    step.token_kl = [micro.targets / 1000 for micro in batches]
    missing: Any = None
    loop = OnlineLoop(
        args=Namespace(iteration=0),
        config=HybridConfig(),
        forward_step=step,
        parallel=ParallelContext(),
        layout=SequenceLayout(),
        prompts=missing,
        eval_prompts=missing,
        sampler=Decoder(),  # type: ignore[arg-type]
        rubric=missing,
        build_teachers=missing,
        tasks=("task 0", "task 1", "task 2"),
        saved_state={},
        report=None,
        samples_interval=1,
        gradient_norms_interval=1,
    )
    rewards = torch.arange(len(batch.tokens)).float() / 10
    loop._teachers = Teachers(object() if has_teacher else None, None)  # type: ignore[arg-type]
    loop._collected = (Scored(batch, rewards), batches)
    return loop


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_each_kl_lands_on_its_own_token(size):
    batch = rollouts()
    loop = loop_after_a_step(batch, size)
    samples = loop._sample_rows()
    assert len(samples) == len(LENGTHS)
    for row, sample in enumerate(samples):
        ids = batch.tokens[row][batch.response_mask[row]].tolist()
        assert ids == [100 * row + BORDERS[row] + k for k in range(LENGTHS[row])]
        assert sample.tokens == tuple(map(str, ids))
        assert sample.kl_per_token == pytest.approx([i / 1000 for i in ids], rel=1e-6)  # fp32


@pytest.mark.parametrize("size", [1, 4])
def test_each_row_keeps_its_own_question_reward_and_flags(size):
    batch = rollouts()
    loop = loop_after_a_step(batch, size)
    for row, sample in enumerate(loop._sample_rows()):
        assert (sample.prompt, sample.task, sample.answer) == (f"question {row // 2}", f"task {row % 3}", f"a{row}")
        assert (sample.response, sample.truncated) == (f"response {row}", row % 4 == 0)
        assert sample.reward == pytest.approx(row / 10, rel=1e-6)  # fp32


def test_a_response_without_tokens_takes_none_of_its_neighbours():
    batch = rollouts()
    batch.response_mask[1] = False
    loop = loop_after_a_step(batch, 4)
    samples = loop._sample_rows()
    assert samples[1].tokens == samples[1].kl_per_token == ()
    assert [len(sample.tokens) for sample in samples] == [2, 0, *LENGTHS[2:]]


def test_without_a_teacher_there_is_no_kl_to_show():
    loop = loop_after_a_step(rollouts(), 4, has_teacher=False)
    assert all(sample.kl_per_token == () and sample.tokens for sample in loop._sample_rows())


def test_only_the_first_micro_batches_are_shown():
    batch = rollouts(repeat=4)
    assert len(batch.tokens) == 2 * SHOWN_SAMPLES
    loop = loop_after_a_step(batch, 4)
    assert [sample.response for sample in loop._sample_rows()] == [f"response {row}" for row in range(SHOWN_SAMPLES)]


def test_a_missing_micro_batch_is_an_error_not_a_shorter_table():
    loop = loop_after_a_step(rollouts(), 4)
    assert loop.forward_step.token_kl is not None
    loop.forward_step.token_kl.pop()
    with pytest.raises(ValueError):
        loop._sample_rows()
