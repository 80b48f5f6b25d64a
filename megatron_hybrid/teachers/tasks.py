"""One teacher for each task: every response token is answered by the teacher of its sequence's task.

    micro-batches -> for each teacher, those that hold its tasks, its tokens alone -> its payloads
                  -> one payload per micro-batch, rows in the micro-batch's own order

A teacher without a token in this call is not run. The tasks of a replica's sequences are known to all its
tensor-parallel ranks, pipeline stages and context-parallel ranks, so they agree on that without a collective; replicas
need not. A micro-batch of several tasks is read by each of their teachers whole.
Not here: teachers whose forward pass has collectives over replicas (expert parallelism), which the job refuses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from megatron_hybrid.errors import ConfigError, DataError
from megatron_hybrid.records import ALL_ROWS, HybridMicrobatch, LogitsPayload, TeacherPayload
from megatron_hybrid.teachers.base import Teacher
from megatron_hybrid.teachers.spec import OTHERS

_Answer = tuple[Tensor, TeacherPayload]
"""Which tokens of a micro-batch [m] int64 ascending, on the CPU, and the payload of these alone."""


class TaskTeachers:
    """Several teachers as one.

    Args:
        teacher_of_task: task to teacher; `spec.OTHERS` for all other tasks. One teacher may have several tasks.
    """

    def __init__(self, teacher_of_task: Mapping[str, Teacher]) -> None:
        self.teacher_of_task = dict(teacher_of_task)

    def annotate(self, batches: Sequence[HybridMicrobatch]) -> list[TeacherPayload | None]:
        """See `Teacher`."""
        answers: list[list[_Answer]] = [[] for _ in batches]
        for teacher in {id(teacher): teacher for teacher in self.teacher_of_task.values()}.values():
            asked = {
                number: tokens
                for number, batch in enumerate(batches)
                if (tokens := self._tokens_of(teacher, batch)) is not None
            }
            if not asked:
                continue
            payloads = teacher.annotate([_only(batches[number], tokens) for number, tokens in asked.items()])
            for (number, tokens), payload in zip(asked.items(), payloads, strict=True):
                if payload is not None:
                    answers[number].append((tokens, payload))
        return [_together(of_batch) if of_batch else None for of_batch in answers]

    def _tokens_of(self, teacher: Teacher, batch: HybridMicrobatch) -> Tensor | None:
        """The tokens of this rank that `teacher` answers; None where no sequence of the micro-batch is its own."""
        own = torch.tensor([self._teacher(prompt.task) is teacher for prompt in batch.prompts])
        # Sequences decide, not tokens: under context parallelism this rank may hold no token of one that others hold.
        return own[batch.sequence_of_token.cpu()].nonzero().squeeze(1) if own.any() else None

    def _teacher(self, task: str) -> Teacher:
        teacher = self.teacher_of_task.get(task, self.teacher_of_task.get(OTHERS))
        if teacher is None:
            raise DataError(
                f"a prompt has the task {task!r}, but the teachers answer {', '.join(self.teacher_of_task)}: nobody "
                "can say what its tokens should be. Add TASK=PATH for it to teacher_load, or *=PATH for all others."
            )
        return teacher


@dataclass(frozen=True)
class TaskPayload(LogitsPayload):
    """Payloads of disjoint tokens of one micro-batch."""

    answers: tuple[tuple[Tensor, LogitsPayload], ...]
    """Tokens [m] int64 ascending, on the CPU, and their payload; together every token once."""

    @property
    def num_tokens(self) -> int:
        return sum(len(tokens) for tokens, _ in self.answers)

    def logits(self, rows: slice = ALL_ROWS) -> Tensor:
        """Logits [rows, v/tp] in the tokens' order. Every part is asked, for no rows if need be: it may gather."""
        start, stop, _ = rows.indices(self.num_tokens)
        parts = []
        for tokens, payload in self.answers:
            first, last = torch.searchsorted(tokens, torch.tensor([start, stop])).tolist()
            parts.append((tokens[first:last] - start, payload.logits(slice(first, last))))
        like = parts[0][1]
        dtype = reduce(torch.promote_types, (part.dtype for _, part in parts))
        whole = like.new_empty((stop - start, like.shape[1]), dtype=dtype)
        for tokens, part in parts:
            whole[tokens.to(whole.device)] = part.to(dtype)
        return whole

    def take(self, tokens: Tensor) -> TaskPayload:
        kept = tokens.cpu()
        answers = []
        for own, payload in self.answers:
            mine = torch.isin(own, kept)
            answers.append(
                (torch.searchsorted(kept, own[mine]), payload.take(mine.nonzero().squeeze(1).to(tokens.device)))
            )
        return TaskPayload(tuple(answers))


def _together(answers: list[_Answer]) -> TeacherPayload:
    if len(answers) == 1:
        return answers[0][1]
    parts = []
    for tokens, payload in answers:
        if not isinstance(payload, LogitsPayload):
            raise ConfigError(
                f"a micro-batch of several tasks has a {type(payload).__name__} from one of their teachers: only whole "
                "distributions can be put together. Wrap the teacher of all tasks instead, not that of one."
            )
        parts.append((tokens, payload))
    return TaskPayload(tuple(parts))


def _only(batch: HybridMicrobatch, tokens: Tensor) -> HybridMicrobatch:
    """The micro-batch with these of its response tokens."""
    return batch if len(tokens) == len(batch.targets) else batch.take(tokens.to(batch.targets.device))
