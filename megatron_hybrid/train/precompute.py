"""A teacher's answers to recorded rollouts, worked out once: the teacher alone, on any TP x PP x DP, into a store.

    rows of this replica, by length -> micro-batches -> FrozenTeacher, TopKTeacher -> StoreWriter

Everything a run checks before it starts is checked here by the same code, so a store that is written is one that a run
with the same flags takes. Collectives: those of the teacher's forward pass; replicas work by themselves.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch

from megatron_hybrid.checkpoint.fingerprint import tokenizer_fingerprint
from megatron_hybrid.config import HybridConfig
from megatron_hybrid.errors import ConfigError
from megatron_hybrid.online_config import OnlineConfig
from megatron_hybrid.parallel import ParallelContext
from megatron_hybrid.records import Prompt
from megatron_hybrid.rollouts.recorded import recorded_rollouts
from megatron_hybrid.schedule.layout import SequenceLayout
from megatron_hybrid.schedule.microbatch import microbatches
from megatron_hybrid.teachers.build import build_teacher
from megatron_hybrid.teachers.frozen import FrozenTeacher
from megatron_hybrid.teachers.spec import SELF
from megatron_hybrid.teachers.store import StoreWriter
from megatron_hybrid.teachers.topk import TopKTeacher
from megatron_hybrid.train.prepare import Prepared, prepare
from megatron_hybrid.train.recorded import recorded_rows

BATCHES_PER_STAGE = 4
"""Micro-batches of a schedule call per pipeline stage: more would hold more hidden states, fewer leave stages idle."""
_SECONDS_BETWEEN_REPORTS = 10.0


def prepare_store(args: Namespace, folder: str) -> Prepared:
    """What can be known before Megatron starts.

    Raises:
        ConfigError, DataError: as `prepare`; no recorded rollouts, no teacher of its own weights, or a store there.
    """
    from megatron_hybrid.mcore.training import refuse_unsupported

    refuse_unsupported(args)
    config, online = HybridConfig.from_args(args), OnlineConfig.from_args(args)
    if online.rollouts is None or online.teacher_load is None or online.teacher_load == SELF:
        raise ConfigError(
            f"rollouts is {online.rollouts!r} and teacher_load {online.teacher_load!r}: a teacher of its own weights "
            "answers for responses that are written down. Give --hybrid-rollouts and --hybrid-teacher-load."
        )
    if config.teacher_payload != "topk":
        raise ConfigError(
            f"teacher_payload is {config.teacher_payload!r}, but a store holds likeliest tokens: whole distributions "
            "would be thousands of times larger. Set --hybrid-teacher-payload topk, and --hybrid-teacher-topk."
        )
    if args.context_parallel_size > 1:
        raise ConfigError(
            f"--context-parallel-size is {args.context_parallel_size}, but a file of the store holds whole responses, "
            "of which a rank then has parts. Use 1 here; the run that reads the store may use more."
        )
    if any(Path(folder).glob("*.safetensors")):
        raise ConfigError(
            f"{folder!r} already holds .safetensors files: answers of two teachers would be mixed up. Give an empty "
            "or a new folder."
        )
    return prepare(args, config, online)


def precompute(prepared: Prepared, args: Namespace, folder: str, say: Callable[[str], None]) -> None:
    """Answers every response of the file; Megatron has started.

    say  takes lines of progress; called on the last rank
    """
    from megatron_hybrid.mcore.groups import parallel_context

    parallel = parallel_context()
    teacher = _teacher(prepared, parallel)
    config, layout = prepared.config, SequenceLayout.of(parallel, sequence_parallel=args.sequence_parallel)
    writer = StoreWriter(
        folder,
        f"replica_{parallel.dp.rank:05d}",
        k=config.teacher_topk,
        temperature=config.teacher_temperature,
        tokenizer=tokenizer_fingerprint(prepared.tokenizer),
        teacher=str(prepared.online.teacher_load),
    )
    writes = parallel.is_last_stage and parallel.tp.rank == 0
    rows = sorted(recorded_rows(prepared.prompts, parallel.dp.rank, parallel.dp.size), key=_length)
    progress = _Progress(rows, parallel, say)
    size = int(args.micro_batch_size)
    at_a_time = size * BATCHES_PER_STAGE * parallel.pp.size
    for start in range(0, len(rows), at_a_time):
        asked = rows[start : start + at_a_time]
        filled = [*asked, *[asked[-1]] * (-len(asked) % size)]
        rollouts = recorded_rollouts(filled, decode=lambda ids: "", device=torch.device(torch.cuda.current_device()))
        batches = microbatches(rollouts, micro_batch_size=size, aggregation=config.aggregation, layout=layout)
        for number, (batch, payload) in enumerate(zip(batches, teacher.annotate(batches), strict=True)):
            if writes and payload is not None:
                writer.add(batch, payload, count=len(asked) - number * size)
        progress.done(asked)
    writer.flush()


def _teacher(prepared: Prepared, parallel: ParallelContext) -> TopKTeacher:
    config, vocab_size = prepared.config, len(prepared.tokenizer)
    assert prepared.teachers is not None
    inner = build_teacher(
        prepared.teachers,
        lambda source: FrozenTeacher.load(source, prepared.teacher_args[source], parallel),
        vocab_size=vocab_size,
        temperature=config.teacher_temperature,
        tp=parallel.tp,
    )
    return TopKTeacher(inner, config.teacher_topk, vocab_size, config.teacher_temperature, parallel.tp)


def _length(row: Prompt) -> int:
    """Tokens that the teacher reads: neighbours of one length are padded least."""
    return len(row.teacher_token_ids or row.token_ids) + len(row.responses[0].token_ids)


class _Progress:
    """Says how far the last rank's replica is, now and then and at the end."""

    def __init__(self, rows: list[Prompt], parallel: ParallelContext, say: Callable[[str], None]) -> None:
        last = all(axis.rank == axis.size - 1 for axis in (parallel.pp, parallel.dp, parallel.tp))
        self._say = say if last else None
        self._replicas = parallel.dp.size
        self._rows, self._tokens = len(rows), sum(map(_length, rows))
        self._done_rows = self._done_tokens = 0
        self._started = self._said = time.perf_counter()

    def done(self, rows: list[Prompt]) -> None:
        self._done_rows += len(rows)
        self._done_tokens += sum(map(_length, rows))
        now = time.perf_counter()
        if self._say is None or (self._done_rows < self._rows and now - self._said < _SECONDS_BETWEEN_REPORTS):
            return
        self._said, rate = now, self._done_tokens / max(now - self._started, 1e-9)
        left = timedelta(seconds=round((self._tokens - self._done_tokens) / rate))
        self._say(
            f"teacher store: {self._done_rows}/{self._rows} responses of this replica  "
            f"{rate * self._replicas:.0f} tok/s on {self._replicas} replica(s)  left {left}"
        )
