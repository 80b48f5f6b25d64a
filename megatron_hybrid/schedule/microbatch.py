"""A replica's rollouts cut into micro-batches, in the order Megatron's schedule asks for them.

This file holds the only transposition: [b, s] rows of a batch become positions in Megatron's flattened [s, b]. A
position predicts the token after it, so the last column is never fed and a response token at column t is predicted by t
- 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_hybrid.records import HybridMicrobatch, RolloutBatch, Weigh
from megatron_hybrid.schedule.normalise import normaliser

CreditFor = Callable[[slice, Tensor, Tensor], Weigh]
"""(rows of the batch, row of each token [n], column of each token [n]) to the credit of those tokens; rows and columns
count from the start of the micro-batch and of the sequence."""


def microbatches(
    rollouts: RolloutBatch, *, micro_batch_size: int, aggregation: str, credit_for: CreditFor, same_width: bool = True
) -> list[HybridMicrobatch]:
    """Consecutive rows, `micro_batch_size` at a time.

    same_width  True: all as wide as the batch, which pipeline stages rely on. False: each as wide as its longest row
    """
    rows = rollouts.tokens.shape[0]
    if rows % micro_batch_size:
        raise AssertionError(f"{rows} rollouts do not divide into micro-batches of {micro_batch_size}")
    return [
        _microbatch(rollouts, slice(first, first + micro_batch_size), aggregation, credit_for, same_width)
        for first in range(0, rows, micro_batch_size)
    ]


def _microbatch(
    rollouts: RolloutBatch, rows: slice, aggregation: str, credit_for: CreditFor, same_width: bool
) -> HybridMicrobatch:
    tokens, mask = rollouts.tokens[rows], rollouts.response_mask[rows]
    if not same_width:
        # Nothing behind the last response token of any row is read; two columns make one position and its target.
        last = int(mask.any(dim=0).nonzero().max()) if bool(mask.any()) else 1
        tokens, mask = tokens[:, : last + 1], mask[:, : last + 1]
    batch, width = tokens.shape
    # Ascending in the flattened [s, b]: position first, then sequence.
    predictor, sequence = mask[:, 1:].T.nonzero(as_tuple=True)
    column = predictor + 1
    count, scale = normaliser(mask, aggregation)
    return HybridMicrobatch(
        tokens=tokens[:, :-1].contiguous(),
        position_ids=torch.arange(width - 1, device=tokens.device).expand(batch, -1).contiguous(),
        attention_mask=None,
        token_rows=predictor * batch + sequence,
        targets=tokens[sequence, column],
        weigh=credit_for(rows, sequence, column),
        token_scale=scale[sequence],
        count=count,
        sampled_logprobs=rollouts.sampled_logprobs[rows][sequence, column],
    )
