"""The only transposition: [b, s] rollouts to rows of Megatron's flattened [s, b], which predict the next token."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_hybrid.config import AGGREGATIONS
from megatron_hybrid.records import HybridMicrobatch, Prompt, RolloutBatch, TokenStats, TopKPayload
from megatron_hybrid.schedule.microbatch import credited, microbatches, without_rows

BORDERS = (2, 1, 3, 2)
LENGTHS = (2, 4, 0, 4)
WIDTH = 6


def rollouts() -> RolloutBatch:
    """Token at (row, column) is 10 * row + column, its log-prob minus that / 100; row 2 has no response."""
    rows = torch.arange(len(BORDERS))[:, None]
    columns = torch.arange(WIDTH)[None]
    mask = torch.zeros(len(BORDERS), WIDTH, dtype=torch.bool)
    for row, (border, length) in enumerate(zip(BORDERS, LENGTHS, strict=True)):
        mask[row, border : border + length] = True
    tokens = 10 * rows + columns
    return RolloutBatch(
        prompts=tuple(Prompt(row, (1,), "", "task") for row in range(len(BORDERS))),
        tokens=tokens,
        response_mask=mask,
        sampled_logprobs=-tokens.float() / 100,
        group_id=torch.tensor([0, 0, 1, 1]),
        truncated=(False,) * len(BORDERS),
        responses=("",) * len(BORDERS),
        temperature=1.0,
        policy_version=0,
        seed=0,
    )


def cut(batch: RolloutBatch, size: int, aggregation: str = "seq-mean-token-sum") -> list[HybridMicrobatch]:
    """Micro-batches whose credit is where it was asked for: row of the batch and column of each token."""

    def credit_for(rows: slice, batch: HybridMicrobatch):
        return lambda stats: (rows.start + batch.sequence_of_token.float(), batch.position_of_token.float())

    return credited(microbatches(batch, micro_batch_size=size, aggregation=aggregation), credit_for)


def rows_of(batch: RolloutBatch, row: int) -> RolloutBatch:
    """A batch of one row."""
    names = ("tokens", "response_mask", "sampled_logprobs", "group_id", "prompts", "truncated", "responses")
    return dataclasses.replace(batch, **{name: getattr(batch, name)[row : row + 1] for name in names})


def test_rows_and_targets_by_hand():
    first, second = cut(rollouts(), 2)
    # Row 0 answers in columns 2 and 3, row 1 in columns 1 to 4: predicted by t - 1, at (t - 1) * 2 + row.
    assert first.student.token_rows.tolist() == [0 * 2 + 1, 1 * 2 + 0, 1 * 2 + 1, 2 * 2 + 0, 2 * 2 + 1, 3 * 2 + 1]
    assert first.targets.tolist() == [11, 2, 12, 3, 13, 14]
    # Row 2 of the batch has no response; row 3 answers in columns 2 to 5 and is sequence 1 here.
    assert second.student.token_rows.tolist() == [1 * 2 + 1, 2 * 2 + 1, 3 * 2 + 1, 4 * 2 + 1]
    assert second.targets.tolist() == [32, 33, 34, 35]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_response_token_at_column_t_is_predicted_by_the_fed_token_at_t_minus_1(size):
    batch = rollouts()
    seen = set()
    for number, micro in enumerate(cut(batch, size)):
        fed = micro.student.tokens.T.flatten()  # Megatron's [s, b], flattened
        before = fed[micro.student.token_rows]
        assert torch.equal(before + 1, micro.targets)  # the next column of the same row, by how the tokens were made
        seen |= {divmod(token, 10) for token in micro.targets.tolist()}
        first = number * size
        width = max(
            max(BORDERS[row] + LENGTHS[row] - 1 if LENGTHS[row] else 1 for row in range(first, first + size)), 1
        )
        assert micro.student.tokens.shape == (size, width)
        # Behind the last predictor of a row there is padding, which nobody reads.
        known = micro.student.tokens != 0
        assert torch.equal(micro.student.tokens[known], batch.tokens[first : first + size, :width][known])
    assert seen == {tuple(place) for place in batch.response_mask.nonzero().tolist()}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_rows_are_ascending_in_the_flattened_order(size):
    for micro in cut(rollouts(), size):
        assert micro.student.token_rows.tolist() == sorted(set(micro.student.token_rows.tolist()))


def test_a_micro_batch_of_its_own_width_ends_with_its_longest_response():
    batch = rollouts()
    short, silent, long = (
        microbatches(part, micro_batch_size=1, aggregation="token-mean")[0]
        for part in (rows_of(batch, 0), rows_of(batch, 2), rows_of(batch, 3))
    )
    assert short.student.tokens.tolist() == [[0, 1, 2]]  # the response ends in column 3, which is only predicted
    assert short.targets.tolist() == [2, 3]
    assert silent.student.tokens.shape == (1, 1)
    assert len(silent.targets) == 0
    assert long.student.tokens.tolist() == [[30, 31, 32, 33, 34]]


def test_a_micro_batch_keeps_everything_of_its_own_tokens():
    for micro in cut(rollouts(), 2):
        assert torch.equal(micro.sampled_logprobs, -micro.targets.float() / 100)
        counted = torch.arange(micro.student.tokens.shape[1]).expand(2, -1)
        padding = micro.student.position_ids == 0  # and every sequence's first position
        assert torch.equal(micro.student.position_ids[~padding], counted[~padding])
        assert micro.student.tokens.is_contiguous() and micro.student.position_ids.is_contiguous()
        assert micro.student is micro.teacher_input and micro.teacher is None


def test_credit_is_asked_with_rows_of_the_batch_and_columns_of_the_tokens():
    for number, micro in enumerate(cut(rollouts(), 2)):
        row, column = micro.weigh(TokenStats(*[torch.zeros(len(micro.targets))] * 4))
        assert set((row - 2 * number).tolist()) <= {0.0, 1.0}
        assert torch.equal(10 * row + column, micro.targets.float())


def test_without_credit_there_is_imitation_alone():
    (micro,) = microbatches(rollouts(), micro_batch_size=4, aggregation="token-mean")
    imitation, advantage = micro.weigh(TokenStats(*[torch.full((len(micro.targets),), 3.0)] * 4))
    assert imitation.unique().tolist() == [1.0] and advantage.unique().tolist() == [0.0]


@pytest.mark.parametrize(
    ("aggregation", "counts", "scales"),
    [
        ("seq-mean-token-sum", [2, 1], [[1.0] * 6, [1.0] * 4]),
        ("token-mean", [6, 4], [[1.0] * 6, [1.0] * 4]),
        ("seq-mean-token-mean", [2, 1], [[1 / 4, 1 / 2, 1 / 4, 1 / 2, 1 / 4, 1 / 4], [1 / 4] * 4]),
    ],
)
def test_count_and_scale_of_each_token_by_hand(aggregation, counts, scales):
    micros = cut(rollouts(), 2, aggregation)
    assert [micro.count.item() for micro in micros] == counts
    for micro, scale in zip(micros, scales, strict=True):
        torch.testing.assert_close(micro.token_scale, torch.tensor(scale), rtol=0, atol=0)


def test_a_micro_batch_without_any_response_has_no_rows_and_counts_nothing():
    batch = rollouts()
    silent = dataclasses.replace(batch, response_mask=torch.zeros_like(batch.response_mask))
    for micro in cut(silent, 2):
        assert len(micro.student.token_rows) == len(micro.targets) == len(micro.token_scale) == micro.count.item() == 0
        assert micro.student.tokens.shape == (2, 1)  # stages still exchange activations of a shape


def test_rollouts_that_do_not_divide_are_our_own_mistake():
    with pytest.raises(AssertionError, match="4 rollouts do not divide into micro-batches of 3"):
        cut(rollouts(), 3)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_dropped_row_leaves_what_a_row_without_a_response_does(size, aggregation):
    batch, dropped = rollouts(), torch.tensor([False, True, False, False])
    without = dataclasses.replace(batch, response_mask=batch.response_mask & ~dropped[:, None])
    given = [
        dataclasses.replace(micro, teacher=TopKPayload(micro.targets[:, None], -micro.targets[:, None] / 1))
        for micro in microbatches(batch, micro_batch_size=size, aggregation=aggregation)
    ]
    expected = microbatches(without, micro_batch_size=size, aggregation=aggregation)
    for found, micro in zip(without_rows(given, batch.response_mask, dropped, aggregation), expected, strict=True):
        for name in ("sequence_of_token", "position_of_token", "targets", "token_scale", "count", "sampled_logprobs"):
            assert torch.equal(getattr(found, name), getattr(micro, name)), name
        # The row itself is still fed: where its tokens are counted may be another place, of the same token.
        fed = [one.student.tokens.T.flatten()[one.student.token_rows] for one in (found, micro)]
        assert torch.equal(*fed)
        assert found.teacher_input is found.student
        assert isinstance(found.teacher, TopKPayload) and torch.equal(found.teacher.ids.squeeze(1), micro.targets)


def test_where_another_rank_counts_a_dropped_row_changes_nothing():
    batch, dropped = rollouts(), torch.tensor([False, True, False, False])
    elsewhere = [
        dataclasses.replace(micro, count=torch.zeros_like(micro.count))
        for micro in microbatches(batch, micro_batch_size=2, aggregation="token-mean")
    ]
    found = without_rows(elsewhere, batch.response_mask, dropped, "token-mean")
    assert [int(micro.count) for micro in found] == [0, 0]
