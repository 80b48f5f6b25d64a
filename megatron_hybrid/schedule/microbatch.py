"""A replica's rollouts cut into micro-batches, in the order Megatron's schedule asks for them.

[b, s] rows of a batch become positions of Megatron's flattened [s, b], on the rank that holds them (`layout.py`). A
position predicts the token after it, so the last token of a row is never fed and a response token at column t is
predicted by t - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.records import HybridMicrobatch, RolloutBatch, TokenStats, Weigh
from megatron_hybrid.schedule.layout import SequenceLayout
from megatron_hybrid.schedule.normalise import normaliser

CreditFor = Callable[[slice, HybridMicrobatch], Weigh]
"""(rows of the batch, the micro-batch made of them) to the credit of its tokens on this rank."""


def imitation_alone(stats: TokenStats) -> tuple[Tensor, Tensor]:
    """The credit of tokens that nothing was scored for: their loss is the divergence."""
    return torch.ones_like(stats.kl), torch.zeros_like(stats.kl)


def credited(batches: Sequence[HybridMicrobatch], credit_for: CreditFor) -> list[HybridMicrobatch]:
    """The micro-batches of `microbatches`, in its order, with the credit of their tokens."""
    done, first = [], 0
    for batch in batches:
        rows = slice(first, first + len(batch.prompts))
        done.append(replace(batch, weigh=credit_for(rows, batch)))
        first = rows.stop
    return done


def rows_of_tokens(batches: Sequence[HybridMicrobatch]) -> Tensor:
    """[n] int64: the row of the rollouts that each token of `microbatches`, in its order, belongs to."""
    rows, first = [], 0
    for batch in batches:
        rows.append(first + batch.sequence_of_token)
        first += len(batch.prompts)
    return torch.cat(rows)


def without_rows(
    batches: Sequence[HybridMicrobatch], response_mask: Tensor, dropped: Tensor, aggregation: str
) -> list[HybridMicrobatch]:
    """The micro-batches of `microbatches`, in its order, as if the dropped rows had no response.

    response_mask  [b, s] bool, what they were made of
    dropped        [b] bool: rows that give no gradient and are not counted

    To be called on the last pipeline stage, before credit: rows are dropped for rewards that only it knows, and losses
    and counts are made there alone. Other stages run the same sequences, and get a gradient of 0 for them. Waits for
    the device.
    """
    done, first = [], 0
    for batch in batches:
        rows = slice(first, first + len(batch.prompts))
        first = rows.stop
        gone = dropped[rows]
        if gone.any():
            count, _ = normaliser(response_mask[rows] & ~gone[:, None], aggregation)
            kept = (~gone[batch.sequence_of_token]).nonzero().squeeze(1)
            # The smaller of the two: where another context-parallel rank counts, this one's count is 0 and stays so.
            batch = replace(batch.take(kept), count=torch.minimum(batch.count, count))
        done.append(batch)
    return done


def microbatches(
    rollouts: RolloutBatch,
    *,
    micro_batch_size: int,
    aggregation: str,
    layout: SequenceLayout | None = None,
) -> list[HybridMicrobatch]:
    """Consecutive rows, `micro_batch_size` at a time; without credit.

    layout  None: padded, on one rank

    Raises:
        ConfigError: the teacher reads other prompts, under context parallelism.
    """
    num_rows = rollouts.tokens.shape[0]
    if num_rows % micro_batch_size:
        raise AssertionError(f"{num_rows} rollouts do not divide into micro-batches of {micro_batch_size}")
    layout = layout or SequenceLayout()
    slices = [slice(first, first + micro_batch_size) for first in range(0, num_rows, micro_batch_size)]
    fed = _fed(rollouts)
    readings = [_Reading(fed, [0] * num_rows)]
    if any(prompt.teacher_token_ids is not None for prompt in rollouts.prompts):
        readings.append(_of_teacher(rollouts, fed, layout))
    widths = [[layout.width([len(row) for row in reading.rows[part]]) for part in slices] for reading in readings]
    if layout.same_width:
        widths = [[max(of_reading)] * len(slices) for of_reading in widths]
    return [
        _microbatch(
            rollouts,
            part,
            [_Reading(reading.rows[part], reading.shifts[part]) for reading in readings],
            [of_reading[number] for of_reading in widths],
            aggregation=aggregation,
            layout=layout,
        )
        for number, part in enumerate(slices)
    ]


@dataclass(frozen=True)
class _Reading:
    """What one model reads of some rows."""

    rows: list[Tensor]
    """Token ids of each row."""
    shifts: list[int]
    """How many columns later a response stands than in the rollouts."""


def _fed(rollouts: RolloutBatch) -> list[Tensor]:
    """The rows as the student reads them: nothing behind the last predictor of a response token, at least one token."""
    columns = torch.arange(rollouts.tokens.shape[1], device=rollouts.tokens.device)
    ends = torch.where(rollouts.response_mask, columns, 1).amax(dim=1)
    return [row[:end] for row, end in zip(rollouts.tokens, ends.tolist(), strict=True)]


def _of_teacher(rollouts: RolloutBatch, fed: list[Tensor], layout: SequenceLayout) -> _Reading:
    """The same responses after the prompts that the teacher reads."""
    if layout.cp_size > 1:
        raise ConfigError(
            f"the teacher reads other prompts than the student, and --context-parallel-size is {layout.cp_size}: a "
            "response token would lie on one rank for the student and on another for the teacher. Use "
            "--context-parallel-size 1, or a teacher that reads the same prompt."
        )
    rows, shifts = [], []
    for prompt, row in zip(rollouts.prompts, fed, strict=True):
        front = prompt.token_ids if prompt.teacher_token_ids is None else prompt.teacher_token_ids
        rows.append(torch.cat((row.new_tensor(front), row[len(prompt.token_ids) :])))
        shifts.append(len(front) - len(prompt.token_ids))
    return _Reading(rows, shifts)


def _microbatch(
    rollouts: RolloutBatch,
    rows: slice,
    readings: list[_Reading],
    widths: list[int],
    *,
    aggregation: str,
    layout: SequenceLayout,
) -> HybridMicrobatch:
    tokens, mask = rollouts.tokens[rows], rollouts.response_mask[rows]
    # Position first, then sequence: ascending in the flattened [s, b].
    predictor, sequence = mask[:, 1:].T.nonzero(as_tuple=True)
    inputs = []
    for reading, width in zip(readings, widths, strict=True):
        shift = torch.tensor(reading.shifts, device=predictor.device)
        model_input, mine = layout.model_input(reading.rows, sequence, predictor + shift[sequence], width=width)
        inputs.append(model_input)
    count, scale = normaliser(mask, aggregation)
    log_probs = rollouts.sampled_logprobs
    sequence, column = sequence[mine], predictor[mine] + 1
    return HybridMicrobatch(
        student=inputs[0],
        teacher_input=inputs[-1],
        sequence_of_token=sequence,
        position_of_token=column,
        prompts=rollouts.prompts[rows],
        targets=tokens[sequence, column],
        weigh=imitation_alone,
        token_scale=scale[sequence],
        # Megatron adds the counts of context-parallel ranks up too, and each of them holds every sequence.
        count=count if layout.cp_rank == 0 else torch.zeros_like(count),
        sampled_logprobs=None if log_probs is None else log_probs[rows][sequence, column],
    )
