"""Response tokens whose KL to the teacher is infinite, by name: which token of which response, and what is forbidden.

A teacher logit of -inf where the student has probability makes the KL infinite. Such a token has no imitation gradient
(`ops/api.py`); `training/infinite_kl_tokens` counts it. Here a few of each step are told apart.

    TokenNumbers, micro-batches, payload of the step  ->  records, gathered over the ranks that hold other tokens

Collectives, in a step that has such tokens: over tp those of the payload's logits of the few rows that are told, and
one gathering; one over dp and cp. Every rank of the last stage takes part.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hybrid.parallel import GroupView, ParallelContext
from megatron_hybrid.records import HybridMicrobatch, LogitsPayload, TokenNumbers

logger = logging.getLogger(__name__)

TOLD_TOKENS = 4
"""Of each replica and context-parallel rank, in a step."""
TOLD_FORBIDDEN = 8
"""Vocabulary entries that a teacher forbids at one position."""

Decode = Callable[[Sequence[int]], str]


class InfiniteKl:
    """Tells such tokens apart, and warns of the first ones."""

    def __init__(self, decode: Decode, parallel: ParallelContext) -> None:
        self._decode = decode
        self._parallel = parallel
        self._told = False

    def records(
        self, batches: Sequence[HybridMicrobatch], numbers: Sequence[TokenNumbers], vocab_size: int
    ) -> list[dict[str, Any]]:
        """The first few of all replicas: prompt_id, task, position (prompt included), response_token (from 1),
        token_id, token, and forbidden: how many vocabulary entries the teacher excludes there, and the first of them.
        """
        mine: list[dict[str, Any]] = []
        for batch, of_batch in zip(batches, numbers, strict=True):
            rows = of_batch.divergence.isinf().nonzero().squeeze(1).tolist()
            mine += [self._record(batch, row, vocab_size) for row in rows[: TOLD_TOKENS - len(mine)]]
        return [record for of_rank in _gathered(mine, self._parallel.dp_cp) for record in of_rank]

    def warn(self, step: int, count: int, records: Sequence[dict[str, Any]], where: Any) -> None:
        """Once in a run, by one rank.

        count  all such tokens of the step
        where  the file that has them all
        """
        if self._told:
            return
        self._told = True
        logger.warning(
            "the divergence from the teacher is infinite at %d response tokens of step %d, which get no imitation "
            "gradient: %s. Where the teacher forbids (-inf) what the student may say, --hybrid-teacher-logit-floor "
            "gives it a finite cost; under forward_kl it is the student that forbids. A few of each step are in %s; "
            "this is said once",
            count,
            step,
            "; ".join(map(_described, records[:TOLD_TOKENS])),
            where,
        )

    def _record(self, batch: HybridMicrobatch, row: int, vocab_size: int) -> dict[str, Any]:
        prompt = batch.prompts[int(batch.sequence_of_token[row])]
        position, token_id = int(batch.position_of_token[row]), int(batch.targets[row])
        forbidden = None
        if isinstance(batch.teacher, LogitsPayload):
            ids = _forbidden(batch.teacher.logits(slice(row, row + 1)), self._parallel.tp, vocab_size)
            first = [{"token_id": i, "token": self._decode([i])} for i in ids[:TOLD_FORBIDDEN]]
            forbidden = {"count": len(ids), "first": first}
        return {
            "prompt_id": prompt.prompt_id,
            "task": prompt.task,
            "prompt": prompt.text,
            "position": position,
            "response_token": position - len(prompt.token_ids) + 1,
            "token_id": token_id,
            "token": self._decode([token_id]),
            "forbidden": forbidden,
        }


def _described(record: dict[str, Any]) -> str:
    text = (
        f"response token {record['response_token']} (position {record['position']}), token {record['token_id']} "
        f"{record['token']!r}, of prompt {record['prompt_id']} (task {record['task']})"
    )
    if (forbidden := record["forbidden"]) is None:
        return text
    shown = ", ".join(f"{entry['token_id']} {entry['token']!r}" for entry in forbidden["first"])
    return f"{text}, where the teacher forbids {forbidden['count']} tokens ({shown})"


def _forbidden(logits: Tensor, tp: GroupView, vocab_size: int) -> list[int]:
    """Global ids of the true vocabulary whose logit [1, v/tp] is -inf."""
    local = (logits[0] == -torch.inf).nonzero().squeeze(1) + tp.rank * logits.shape[-1]
    of_ranks = _gathered(local.tolist(), tp)
    return [i for ids in of_ranks for i in ids if i < vocab_size]


def _gathered(value: Any, ranks: GroupView) -> list[Any]:
    if ranks.size == 1:
        return [value]
    found: list[Any] = [None] * ranks.size
    dist.all_gather_object(found, value, group=ranks.group)
    return found
