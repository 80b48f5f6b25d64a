"""Real tiny Megatron models as students and teachers, and what a teacher's model says by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.records import HybridMicrobatch, LogitsPayload, Prompt, RolloutBatch

VOCAB = 61
HINT = (7, 8, 9, 10)
RESPONSES = (1, 5, 3, 4)
"""Lengths."""


def rollouts(*, hinted: bool = False, tasks: tuple[str, ...] = ("maths", "code", "code", "maths")) -> RolloutBatch:
    """Four prompts of 2 to 4 tokens with their responses; hinted: the teacher reads `HINT` behind the prompts of odd
    rows."""
    generator = torch.Generator().manual_seed(11)
    lengths = (2, 3, 4, 3)
    tokens = torch.randint(1, VOCAB, (4, 10), generator=generator)
    mask = torch.zeros(4, 10, dtype=torch.bool)
    prompts = []
    for row, (border, response) in enumerate(zip(lengths, RESPONSES, strict=True)):
        mask[row, border : border + response] = True
        ids = tuple(tokens[row, :border].tolist())
        prompts.append(Prompt(row, ids, "", tasks[row], teacher_token_ids=ids + HINT if hinted and row % 2 else None))
    return RolloutBatch(
        prompts=tuple(prompts),
        tokens=tokens,
        response_mask=mask,
        sampled_logprobs=torch.zeros(4, 10),
        group_id=torch.arange(4),
        truncated=(False,) * 4,
        responses=("",) * 4,
        temperature=1.0,
        policy_version=0,
        seed=0,
    )


def micro_batches(batch: RolloutBatch, parallel: Any, args: Any) -> list[HybridMicrobatch]:
    """Two sequences each."""
    from megatron_hybrid.schedule.layout import SequenceLayout
    from megatron_hybrid.schedule.microbatch import microbatches

    return microbatches(
        batch,
        micro_batch_size=2,
        aggregation="token-mean",
        layout=SequenceLayout.of(parallel, sequence_parallel=args.sequence_parallel),
    )


def plain_logits(model: Any, batch: RolloutBatch) -> list[Tensor]:
    """What a whole model on one rank says by itself: of each row, logits [response, v] of its response tokens."""
    rows = []
    for row, prompt in enumerate(batch.prompts):
        response = batch.tokens[row][batch.response_mask[row]]
        front = torch.tensor(prompt.teacher_token_ids or prompt.token_ids)
        tokens = torch.cat((front, response))[:-1].unsqueeze(0)
        with torch.no_grad():
            logits = model(tokens, torch.arange(tokens.shape[1]).unsqueeze(0), None)[0]
        rows.append(logits[len(front) - 1 :, :VOCAB].float())
    return rows


def logits_by_row(batches: list[HybridMicrobatch], payloads: list[Any], tp: Any) -> list[Tensor] | None:
    """A teacher's answers, put into the form of `plain_logits`; None on stages that have none."""
    from megatron_hybrid.collectives import gather_ranks

    if payloads[0] is None:
        return None
    rows = []
    for batch, payload in zip(batches, payloads, strict=True):
        assert isinstance(payload, LogitsPayload)
        shard = payload.logits()
        whole = torch.cat(tuple(gather_ranks(shard, tp.group)), dim=-1)[:, :VOCAB].float()
        rows += [whole[batch.sequence_of_token == number] for number in range(len(batch.prompts))]
    return rows


def save_teacher(folder: str, flags: dict[str, Any], name: str) -> list[Tensor]:
    """Saves a model of these flags with weights drawn from `name`; returns what it says about `rollouts()`."""
    from megatron_hybrid.mcore.second_model import save_weights
    from tests.tiny import megatron, set_weights, start

    with megatron(**flags) as args:
        model = start(args)
        set_weights(model, name)
        save_weights(model, Path(folder))
        model[0].eval()
        return plain_logits(model[0], rollouts()) + plain_logits(model[0], rollouts(hinted=True))


def assert_rows(ranks: list[list[Tensor] | None], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    """Every rank of the last stage answers alike, to fp32 sums in another order (some 80 roundings of the largest)."""
    answered = [rows for rows in ranks if rows is not None]
    assert answered, "no rank answered"
    for rows in answered:
        assert [len(row) for row in rows] == [len(row) for row in expected]
        for row, reference in zip(rows, expected, strict=True):
            torch.testing.assert_close(row, reference, rtol=0, atol=tolerance * float(reference.abs().max()))
