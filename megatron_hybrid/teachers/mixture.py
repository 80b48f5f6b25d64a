"""Several teachers as one distribution: q(v) = sum_i c_i q_i(v), with weights c_i that add up to 1.

With teacher logits w_i, lse_i = logsumexp_v w_i,v/T over the true vocabulary and the teachers' temperature T,

    log q(v) = logsumexp_i ( log c_i + w_i,v/T - lse_i )                  logits of the mixture: T log q(v)

T belongs to each teacher, so it divides before mixing. Whoever reads the logits (the op, `topk.py`) divides by T once
more: hence T log q, from which softmax(. / T) gives q again. A `teacher_logit_floor` is then a floor under T log q.

Collectives: each teacher's lse is merged over tensor-parallel ranks, one all-gather of 4 bytes per token and teacher
when the logits are read. Columns beyond the true vocabulary are not read for lse and hold garbage afterwards.
Memory while read: one fp32 shard, the logits of one teacher, and a few blocks of rows.
A mixture of distributions as teacher is ours: what one sample drawn from a teacher drawn at random would follow.
Not here: mixtures of logits (a product of distributions), weights that depend on the token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_hybrid.collectives import gather_ranks
from megatron_hybrid.errors import ConfigError
from megatron_hybrid.parallel import GroupView
from megatron_hybrid.records import ALL_ROWS, HybridMicrobatch, LogitsPayload
from megatron_hybrid.teachers.base import Teacher
from megatron_hybrid.teachers.blocks import row_blocks


class MixtureTeacher:
    """A teacher who answers as one of several would, drawn anew for each token.

    Args:
        teachers: they leave whole distributions (`LogitsPayload`).
        weights: the share of each, adding up to 1.
        vocab_size: true vocabulary.
        temperature: the teachers' own, as the op is told it.
        tp: the ranks that share the vocabulary.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        weights: Sequence[float],
        *,
        vocab_size: int,
        temperature: float,
        tp: GroupView,
    ) -> None:
        assert len(teachers) == len(weights) and math.isclose(sum(weights), 1) and min(weights) > 0, weights
        self.teachers = tuple(teachers)
        self.log_weights = tuple(math.log(weight) for weight in weights)
        self.vocab_size = vocab_size
        self.temperature = temperature
        self.tp = tp

    def annotate(self, batches: Sequence[HybridMicrobatch]) -> list[MixturePayload | None]:
        """See `Teacher`. Every teacher reads every micro-batch."""
        payloads = [teacher.annotate(batches) for teacher in self.teachers]
        return [self._mix(of_batch) for of_batch in zip(*payloads, strict=True)]

    def _mix(self, payloads: Sequence[object]) -> MixturePayload | None:
        if all(payload is None for payload in payloads):
            return None
        parts = []
        for payload in payloads:
            if not isinstance(payload, LogitsPayload):
                raise ConfigError(
                    f"a teacher of a mixture left a {type(payload).__name__}: a mixture needs the whole distribution "
                    "of each. Choose the most likely tokens of the mixture instead, not of its teachers."
                )
            parts.append(payload)
        return MixturePayload(tuple(parts), self.log_weights, self.vocab_size, self.temperature, self.tp)


@dataclass(frozen=True)
class MixturePayload(LogitsPayload):
    """The teachers' payloads for one micro-batch, mixed when read."""

    parts: tuple[LogitsPayload, ...]
    log_weights: tuple[float, ...]
    vocab_size: int
    temperature: float
    tp: GroupView

    @property
    def num_tokens(self) -> int:
        return self.parts[0].num_tokens

    @torch.no_grad()
    def logits(self, rows: slice = ALL_ROWS) -> Tensor:
        """T log q [rows, v/tp] fp32. Each teacher's logits are made once and gone before the next one's."""
        mixed: Tensor | None = None
        for log_weight, part in zip(self.log_weights, self.parts, strict=True):
            mixed = self._add(mixed, log_weight, part.logits(rows))
        assert mixed is not None
        return mixed.mul_(self.temperature)

    def take(self, tokens: Tensor) -> MixturePayload:
        return replace(self, parts=tuple(part.take(tokens) for part in self.parts))

    def _add(self, mixed: Tensor | None, log_weight: float, logits: Tensor) -> Tensor:
        """The log of the sum so far [rows, v/tp] fp32, and of the next teacher's part; written over the former."""
        if mixed is None:
            mixed = torch.full(logits.shape, -torch.inf, dtype=torch.float32, device=logits.device)
        blocks, shift = row_blocks(logits), (log_weight - self._log_sum_exp(logits)).unsqueeze(1)
        for block in blocks:
            scaled = (logits[block].float() / self.temperature).add_(shift[block])
            torch.logaddexp(mixed[block], scaled, out=mixed[block])
        return mixed

    def _log_sum_exp(self, logits: Tensor) -> Tensor:
        """Of logits over their temperature, over the true vocabulary of all ranks [rows], the same bits on each."""
        width = logits.shape[1]
        own = logits[:, : min(max(self.vocab_size - self.tp.rank * width, 0), width)]  # a shard may be padding alone
        parts = [(own[block].float() / self.temperature).logsumexp(1) for block in row_blocks(logits)]
        return gather_ranks(torch.cat(parts), self.tp.group).logsumexp(0)
