"""Micro-batches without a model, and teachers whose answers are written down."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_hybrid.records import HiddenPayload, HybridMicrobatch, ModelInput, Prompt


def micro_batch(tasks: Sequence[str], sequence_of_token: Sequence[int], *, first: int = 0) -> HybridMicrobatch:
    """Response tokens that are told apart by their row of the model's output, counted from `first`."""
    n = len(sequence_of_token)
    rows = torch.arange(first, first + n)
    reads = ModelInput(torch.zeros(len(tasks), 8), torch.zeros(len(tasks), 8), rows)
    return HybridMicrobatch(
        student=reads,
        teacher_input=reads,
        sequence_of_token=torch.tensor(sequence_of_token, dtype=torch.int64),
        position_of_token=rows,
        prompts=tuple(Prompt(row, (1,), "", task) for row, task in enumerate(tasks)),
        targets=rows + 100,
        weigh=lambda stats: (stats.kl, stats.kl),
        token_scale=rows.float(),
        count=torch.tensor(n, dtype=torch.int32),
        sampled_logprobs=-rows.float(),
    )


class Scripted:
    """Answers the token of row r with `table[r]`; None everywhere on a stage that is not the last."""

    def __init__(self, table: Tensor, *, is_last_stage: bool = True) -> None:
        self.table = table
        self.is_last_stage = is_last_stage
        self.asked: list[list[list[int]]] = []
        """The rows of each micro-batch of each call."""

    def annotate(self, batches: Sequence[HybridMicrobatch]) -> list[HiddenPayload | None]:
        self.asked.append([batch.teacher_input.token_rows.tolist() for batch in batches])
        if not self.is_last_stage:
            return [None] * len(batches)
        return [HiddenPayload(self.table[batch.teacher_input.token_rows], lambda rows: rows) for batch in batches]
