"""The hybrid loss of a micro-batch's response tokens, from their hidden states.

    hidden [n, h], LM head, teacher's payload  ->  op with the micro-batch's credit  ->  HybridLoss [n], weights [n]

fused   logits of a chunk of tokens at a time; in one pass where credit can be asked from the last tokens to the first
logits  all [n, v/tp] at once: the reference; and where the head is no plain product

Collectives over tp: the op's, per chunk; in backward (one pass: forward) the all-reduce of dh [n, h]; on a GPU, where
the chunk size is not set, one all-gather of 8 bytes in the first call, to agree on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.mcore.head_parts import HeadParts
from megatron_hybrid.ops.api import HybridLoss, vocab_parallel_hybrid_loss
from megatron_hybrid.ops.diagnostics import logit_gradient_norms
from megatron_hybrid.ops.lm_head import linear_hybrid_loss
from megatron_hybrid.ops.lm_head_chunks import default_chunk_size
from megatron_hybrid.ops.topk import vocab_parallel_topk_hybrid_loss
from megatron_hybrid.parallel import GroupView
from megatron_hybrid.records import (
    ALL_ROWS,
    HybridMicrobatch,
    LogitsPayload,
    ReverseWeigh,
    ReversibleWeigh,
    TokenStats,
    TopKPayload,
)


@dataclass(frozen=True)
class Runtime:
    """What the loss must know of the job besides the method; filled once Megatron is initialised."""

    tp: GroupView
    vocab_size: int
    """True vocabulary."""


@dataclass(frozen=True)
class ResponseLoss:
    """The op with the settings of a run, on one micro-batch."""

    config: HybridConfig
    runtime: Runtime
    batch: HybridMicrobatch
    weights: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(imitation_weight, advantage) as they were asked for, the last rows first; before any normalising."""

    def fused(self, hidden: Tensor, head: HeadParts) -> HybridLoss:
        """hidden [n, h], the same on every tensor-parallel rank; its gradient is summed over them."""
        batch, config = self.batch, self.config
        teacher = batch.teacher.logits if isinstance(batch.teacher, LogitsPayload) else batch.teacher
        reverse = batch.weigh.from_the_end() if isinstance(batch.weigh, ReversibleWeigh) else None
        credit: dict[str, Any] = {"weigh": self._weigh} if reverse is None else {"reverse_weigh": self._from(reverse)}
        return head.run(
            lambda: linear_hybrid_loss(
                hidden,
                head.weight,
                teacher,
                batch.targets,
                one_pass=reverse is not None,
                chunk_size=self.chunk_size(head.weight),
                logit_scale=head.logit_scale,
                backend=config.backend,
                **credit,
                **self._options,
            )
        )

    def chunk_size(self, weight: Tensor) -> int:
        """Tokens whose logits exist at a time behind a head [v/tp, h]."""
        return self.config.lm_head_chunk_size or default_chunk_size(
            weight, has_teacher=isinstance(self.batch.teacher, LogitsPayload), group=self.runtime.tp.group
        )

    def from_logits(self, student: Tensor) -> HybridLoss:
        """student [n, v/tp]: the gradient takes their place."""
        batch, inplace = self.batch, torch.is_grad_enabled()
        if isinstance(batch.teacher, TopKPayload):
            payload = batch.teacher
            return vocab_parallel_topk_hybrid_loss(
                student,
                payload.ids,
                payload.log_probs,
                batch.targets,
                weigh=self._weigh,
                inplace=inplace,
                **self._student_options,
            )
        teacher = None if self._teacher is None else self._teacher.logits()
        return vocab_parallel_hybrid_loss(
            student,
            teacher,
            batch.targets,
            weigh=self._weigh,
            inplace=inplace,
            backend=self.config.backend,
            **self._options,
        )

    def used_weights(self) -> tuple[Tensor, Tensor]:
        """(imitation_weight, advantage) [n] of the loss that was asked for."""
        imitation, advantage = (torch.cat(parts) for parts in zip(*reversed(self.weights), strict=True))
        return imitation, advantage

    def gradient_norms(
        self, student: Tensor, rows: slice, imitation: Tensor, advantage: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Squared norms of the dense and the sparse gradient of some tokens, from their logits [r, v/tp].

        imitation, advantage  [n], as `used_weights` gives them
        """
        teacher = None if self._teacher is None else self._teacher.logits(rows)
        return logit_gradient_norms(
            student, teacher, self.batch.targets[rows], imitation[rows], advantage[rows], **self._options
        )

    @property
    def _teacher(self) -> LogitsPayload | None:
        assert not isinstance(self.batch.teacher, TopKPayload), "a teacher known in part has no logits"
        return self.batch.teacher

    def _weigh(self, stats: TokenStats) -> tuple[Tensor, Tensor]:
        return self._scaled(partial(self.batch.weigh, stats), ALL_ROWS)

    def _from(self, reverse: ReverseWeigh) -> ReverseWeigh:
        return lambda stats, rows: self._scaled(partial(reverse, stats, rows), rows)

    def _scaled(self, credit: Callable[[], tuple[Any, Any]], rows: Any) -> tuple[Tensor, Tensor]:
        with record_function("hybrid/credit"):
            imitation, advantage = credit()
        self.weights.append((imitation, advantage))
        scale = self.batch.token_scale[rows]
        return imitation * scale, advantage * scale

    @property
    def _student_options(self) -> dict[str, Any]:
        return {
            "student_temperature": self.config.student_temperature,
            "vocab_size": self.runtime.vocab_size,
            "group": self.runtime.tp.group,
            "ignore_index": None,
        }

    @property
    def _options(self) -> dict[str, Any]:
        return self._student_options | {
            "teacher_temperature": self.config.teacher_temperature,
            "teacher_logit_floor": self.config.teacher_logit_floor,
            "divergence": self.config.divergence,
            "divergence_mix": self.config.divergence_mix,
        }
