"""The online step around Megatron's own: draw, sample, score, annotate, credit, update (Megatron's), measure, report.

    draw -> sample -> annotate -> credit -> [Megatron's schedule, gradient, optimizer] -> measure -> report
                   -> score    ->

`OnlineLoop` is what `schedule/inject.py` calls around each schedule call. Rewards are made while the teacher reads.
Drawing, sampling and scoring happen once per collection, from which several steps may learn (`updates.py`). The
position in the prompts follows from the number of steps, and every random number from the step, the prompt and the
sample, so a resumed run goes on exactly; what else a run has to remember goes into Megatron's checkpoint with the
arguments (`credit.py`, `nonfinite.py`) or beside it (the student's copy; a collection that later steps still learn
from).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from megatron_hybrid.checkpoint.latest import begin_over
from megatron_hybrid.config import SCHEDULED, HybridConfig
from megatron_hybrid.errors import ConfigError
from megatron_hybrid.mcore.chosen_parts import chosen_parts
from megatron_hybrid.mcore.symbols import borrow
from megatron_hybrid.metrics import Metrics
from megatron_hybrid.parallel import ParallelContext
from megatron_hybrid.prompts.stream import PromptStream
from megatron_hybrid.records import HybridMicrobatch, RolloutBatch
from megatron_hybrid.rewards.rubric import Rubric
from megatron_hybrid.rollouts.generate import Sampler
from megatron_hybrid.rollouts.recorded import RecordedSampler
from megatron_hybrid.rollouts.remote import RemoteSampler
from megatron_hybrid.schedule.forward_step import HybridForwardStep
from megatron_hybrid.schedule.inject import ScheduleCall
from megatron_hybrid.schedule.layout import SequenceLayout, schedule_shape
from megatron_hybrid.schedule.microbatch import credited, microbatches, without_rows
from megatron_hybrid.teachers.base import Teacher
from megatron_hybrid.teachers.snapshot import SnapshotTeacher
from megatron_hybrid.train.clock import StageClock
from megatron_hybrid.train.collection import fingerprint, load_collection, save_collection
from megatron_hybrid.train.credit import Credit, Scored
from megatron_hybrid.train.failed_samples import FailedSamples
from megatron_hybrid.train.infinite_kl import InfiniteKl
from megatron_hybrid.train.measure import finished, held_out, measure_rollouts, sample_rows
from megatron_hybrid.train.nonfinite import Batch, NonFiniteSteps
from megatron_hybrid.train.peers import Peers
from megatron_hybrid.train.pretraining import PretrainingData
from megatron_hybrid.train.report import RunReport
from megatron_hybrid.train.scoring import start_scoring
from megatron_hybrid.train.updates import Updates
from megatron_hybrid.train.weight_sync import WeightSync

logger = logging.getLogger(__name__)

EVAL_SEED_OFFSET = 1_000_003
"""Held-out responses are drawn with noise of their own, the same at every evaluation: differences are the model's."""


class Teachers(NamedTuple):
    """What answers for the response tokens."""

    teacher: Teacher | None
    copy: SnapshotTeacher | None
    """The part of it that is a copy of the student: it follows the student's steps and is saved with them."""


@dataclasses.dataclass
class OnlineLoop:
    """The stages of one run on one rank; implements `schedule.inject.Hooks`."""

    args: Any
    """Megatron's arguments: its counters are read; `hybrid_state` and `hybrid_nonfinite` are kept in them, which it
    saves."""
    config: HybridConfig
    forward_step: HybridForwardStep
    parallel: ParallelContext
    layout: SequenceLayout
    prompts: PromptStream
    eval_prompts: PromptStream
    sampler: Sampler | RecordedSampler | RemoteSampler
    eval_sampler: Sampler | RemoteSampler
    """Answers held-out prompts as the student is: by its own decoding, unless a server is given its weights."""
    pretraining: PretrainingData | None
    """Batches of the script's own data beside the rollouts."""
    weight_sync: WeightSync | None
    """Where a server samples and is given the student's weights."""
    rubric: Rubric
    failed_samples: FailedSamples
    """What becomes of responses that could not be scored, or were not given."""
    build_teachers: Callable[[list[torch.nn.Module]], Teachers]
    """From the student's chunks, which are known once Megatron calls its schedule."""
    tasks: tuple[str, ...]
    """Every task the prompts can have: ranks must report the same names, whatever they drew."""
    saved_state: dict[str, float]
    """What `before_save` kept in the checkpoint that was resumed from; empty at a fresh start."""
    report: RunReport | None
    """On the logging rank only."""
    samples_interval: int
    """Steps between entries of the table of samples."""
    gradient_norms_interval: int
    """Steps between measurements of the dense and sparse gradient norms."""
    peers: Peers
    """Told of every stage."""
    nonfinite: NonFiniteSteps

    def __post_init__(self) -> None:
        self._step = int(self.args.iteration)
        """Optimizer steps done."""
        self._collection: Scored | None = None
        """What the steps of this collection learn from."""
        self._collected: tuple[Scored, list[HybridMicrobatch]] | None = None
        """What this step learns from."""
        self._held_out = Metrics()
        self._evaluations = 0
        self._evaluating = False
        self._started = False
        self._teachers: Teachers | None = None
        self.updates = Updates(self.config.mini_batches, self.config.ppo_epochs)
        self.credit = Credit(self.config, self.parallel, self.tasks)
        self._clock = StageClock(self._enter)
        self._infinite_kl = InfiniteKl(self.sampler.decode, self.parallel)

    # Hooks, in the order Megatron's step meets them.

    def stepping(self, model: list[torch.nn.Module], optimizer: Any) -> contextlib.AbstractContextManager[None]:
        """A step whose gradient is not finite is not taken."""
        return self.nonfinite.stepping(model, optimizer)

    def before_schedule(self, call: ScheduleCall) -> None:
        """Rollouts, rewards, credit and the teacher pass; the call then reads these micro-batches."""
        self._evaluating = call.forward_only
        if self._teachers is None:
            self._teachers = self._begin(call.model)
        if not call.forward_only and not self._started:
            self._started = True
            self._evaluate_first(call)
            self._evaluating = False
        self._clock = StageClock(self._enter)
        self.forward_step.metrics = self._held_out if call.forward_only else Metrics()
        self.forward_step.token_numbers = []
        next_step = self._step + 1
        measured = next_step % self.gradient_norms_interval == 0 or next_step == 1
        self.forward_step.gradient_norms = measured and not call.forward_only
        batches = self._collect(call)
        self.forward_step.mixed = self.pretraining is not None and not call.forward_only
        beside = self.pretraining.draw(batches) if self.pretraining is not None and self.forward_step.mixed else []
        shape = schedule_shape([batch.student for batch in batches], self.parallel.cp.size)
        call.feed([*batches, *beside], shape=shape)
        self._enter("update")

    def after_schedule(self, call: ScheduleCall) -> None:
        """An evaluation is reported once its last iteration is done."""
        if not call.forward_only:
            return
        self._release()
        self._evaluations += 1
        if self._evaluations < int(self.args.eval_iters):
            return
        metrics, self._held_out, self._evaluations = self._held_out, Metrics(), 0
        if not self.parallel.is_last_stage:
            return
        values = held_out(metrics.reduce(self.parallel.dp_cp.group))
        if self.report is not None:
            self.report.evaluation(self._step, values)

    def after_step(self, record: dict[str, Any]) -> None:
        """Reduces the step's metrics over data-parallel replicas and reports them on the logging rank."""
        self._step = int(record["iteration"])
        if self._copy is not None:
            self._copy.update(self._step)
        batch = None
        if self.parallel.is_last_stage and self._collected is not None:
            self._report_step(record)
            assert self.forward_step.token_numbers is not None
            batch = Batch(*self._collected, self.forward_step.token_numbers)
            if self.updates.in_first_epoch(self._step - 1):
                self.credit.after_step(*self._collected, self.forward_step.token_numbers)
        self.nonfinite.after_step(self._step, batch)
        self._release()

    def _report_step(self, record: dict[str, Any]) -> None:
        assert self._collected is not None
        self._clock.rest("update")
        metrics = self.forward_step.metrics
        for name, seconds in self._clock.laps.items():
            metrics.max(f"timing_s/{name}", seconds)
        for name, key in (("actor/grad_norm", "grad_norm"), ("actor/lr", "learning_rate")):
            metrics.max(name, math.nan if record[key] is None else float(record[key]))
        for name, value in record["loss_dict"].items():
            metrics.max(name, value)  # Megatron has reduced them
        metrics.max("training/skipped_steps", float(record["skipped_iter"]))
        now = self.config.at(self._step - 1)
        for name in SCHEDULED:
            metrics.max(f"actor/{name}", getattr(now, name))
        if self.pretraining is not None:
            metrics.max("pretraining/weight", now.pretraining_weight)
        metrics.max("perf/max_memory_allocated_gb", torch.cuda.max_memory_allocated() / 2**30)
        values = finished(metrics.reduce(self.parallel.dp_cp.group))
        if self.report is not None:
            with record_function("hybrid/report"):
                self._report(self.report, values, *self._collected)
        if values.get("training/infinite_kl_tokens"):
            self._tell_infinite_kl(int(values["training/infinite_kl_tokens"]), self._collected[1])

    def _report(
        self, report: RunReport, values: dict[str, float], scored: Scored, batches: list[HybridMicrobatch]
    ) -> None:
        """What the logging rank says of a step."""
        report.step(self._step, values)
        if self._step % self.samples_interval and self._step != 1:
            return
        assert scored.rewards is not None and self.forward_step.token_numbers is not None
        # Context-parallel ranks each know the KL of some tokens of a response only.
        shows_kl = self.teacher is not None and self.parallel.cp.size == 1
        token_kl = [numbers.kl for numbers in self.forward_step.token_numbers] if shows_kl else None
        rows = sample_rows(scored.rollouts, scored.rewards, batches, token_kl, self.sampler.decode)
        report.samples(self._step, rows)

    def _tell_infinite_kl(self, count: int, batches: list[HybridMicrobatch]) -> None:
        """Collective over the last stage."""
        numbers, runtime = self.forward_step.token_numbers, self.forward_step.runtime
        assert numbers is not None and runtime is not None
        records = self._infinite_kl.records(batches, numbers, runtime.vocab_size)
        if self.report is not None:
            where = self.report.infinite_kl(self._step, records)
            self._infinite_kl.warn(self._step, count, records, where)

    def before_save(self, iteration: int) -> None:
        """What a run has to remember besides what Megatron does."""
        self._evaluating = False
        self._enter("checkpoint")
        if dist.get_rank() == 0:
            begin_over(Path(self.args.save) / f"iter_{iteration:07d}")
        self.args.hybrid_state = self.credit.state()
        self.args.hybrid_nonfinite = self.nonfinite.state()
        if self._copy is not None:
            self._copy.save(_beside(self.args.save, "hybrid_teacher", iteration))
        if self._collection is not None and not self.updates.is_first(iteration):
            folder = _beside(self.args.save, "hybrid_collection", iteration)
            save_collection(folder, self._collection, self._made_by())

    def _enter(self, stage: str) -> None:
        """Tells the other ranks where this one is."""
        if self._evaluating:
            stage = "evaluation" if stage == "update" else f"evaluation's {stage}"
        self.peers.enter(self._step + (not self._evaluating and stage != "checkpoint"), stage)

    def _begin(self, student: list[torch.nn.Module]) -> Teachers:
        """The teachers, and what a checkpoint kept of credit, copy and collection."""
        if self.report is not None:
            self.report.parts(chosen_parts(student, self.args))
        teachers = self.build_teachers(student)
        if self._step > 0:
            self.credit.load(self.saved_state)
        if self._step > 0 and teachers.copy is not None:
            folder = _beside(self.args.load, "hybrid_teacher", self._step)
            if not folder.exists():
                raise ConfigError(
                    f"the teacher is a copy of the student, and the checkpoint of step {self.args.iteration} has "
                    f"none in {folder}: it was saved by a run with another teacher. Start from it with --finetune, and "
                    "the copy is taken from its weights."
                )
            teachers.copy.load(folder)
        if self._step > 0 and not self.updates.is_first(self._step):
            folder = _beside(self.args.load, "hybrid_collection", self._step)
            self._collection = load_collection(folder, self._made_by())
        return teachers

    def _made_by(self) -> dict[str, Any]:
        return fingerprint(self.config, self.parallel, int(self.args.global_batch_size))

    @property
    def teacher(self) -> Teacher | None:
        return None if self._teachers is None else self._teachers.teacher

    @property
    def _copy(self) -> SnapshotTeacher | None:
        return None if self._teachers is None else self._teachers.copy

    def _release(self) -> None:
        """The teacher's hidden states go before the next rollout needs the memory."""
        self._collected = None
        self.forward_step.token_numbers = None

    # The stages.

    def _collect(self, call: ScheduleCall) -> list[HybridMicrobatch]:
        """The micro-batches of this schedule call, with the teacher's payload and their credit."""
        num_rows = int(call.kwargs["num_microbatches"]) * int(call.kwargs["micro_batch_size"])
        collection, wait = None if call.forward_only else self._kept_collection(), None
        self.failed_samples.step = self._step + (not call.forward_only)
        if collection is None:
            with self._clock.stage("rollout"):
                collection = Scored(self._sample(call, num_rows))
            with self._clock.stage("reward"):  # all of it, where the rubric is bound to this thread
                wait = start_scoring(
                    collection.rollouts, self.rubric, self.parallel, on_failed=self.failed_samples.rewards_failed
                )
        rows = list(range(num_rows)) if call.forward_only else self._rows_of_step(num_rows)
        with self._clock.stage("teacher"):
            batches = microbatches(
                collection.rollouts.take(rows),
                micro_batch_size=int(call.kwargs["micro_batch_size"]),
                aggregation=self.config.aggregation,
                layout=self.layout,
            )
            batches = self._annotate(batches)
        if wait is not None:
            with self._clock.stage("reward"):
                scores = wait()
            if scores is not None:
                collection = collection.rewarded(scores, drop_failed=self.failed_samples.drops_rewards)
        with self._clock.stage("credit"):
            if not call.forward_only:
                self._collection = collection = self.credit.collected(collection)
            learns_from = collection.take(rows)
            if (dropped := learns_from.dropped) is not None:
                mask = learns_from.rollouts.response_mask
                batches = without_rows(batches, mask, dropped, self.config.aggregation)
            if learns_from.rewards is not None:
                self._measure_rollouts(learns_from, learns_from.rewards)
            if learns_from.advantages is not None:
                step, metrics = int(self.args.curr_iteration), self.forward_step.metrics
                if (version := learns_from.rollouts.policy_version) is not None:
                    metrics.max("training/policy_age", step - version)
                batches = credited(batches, self.credit.credit_for(learns_from, step=step, metrics=metrics))
        self._collected = learns_from, batches
        return batches

    def _kept_collection(self) -> Scored | None:
        """What earlier steps have collected and this one learns from; None: it collects anew."""
        step = int(self.args.curr_iteration)
        if self.updates.is_first(step):
            return None
        if self._collection is None:
            logger.warning(
                "step %d is in the middle of a collection that was not kept for this layout and these batches: it is "
                "sampled anew",
                step,
            )
        return self._collection

    def _sample(self, call: ScheduleCall, num_rows: int) -> RolloutBatch:
        """A new collection; or one response to each held-out prompt, with the same noise at every evaluation."""
        dp, seed = self.parallel.dp, int(self.args.seed)
        if self.weight_sync is not None and isinstance(self.sampler, RemoteSampler):
            self.sampler.version = self.weight_sync.version_for(call.model, self._step, exact=call.forward_only)
        if call.forward_only:
            count = num_rows * dp.size
            prompts = self.eval_prompts.draw(self._evaluations * count, count, dp.rank, dp.size)
            return self.eval_sampler.sample(call.model, prompts, 1, step=0, seed=seed + EVAL_SEED_OFFSET)
        step, group_size = int(self.args.curr_iteration), self.config.group_size
        count, rest = divmod(num_rows * self.updates.mini_batches * dp.size, group_size)
        assert rest == 0, "prepare() refuses batches that cut a group"
        start = self.updates.prompts_before(step, count // self.updates.mini_batches)
        prompts = self.prompts.draw(start, count, dp.rank, dp.size)
        return self.sampler.sample(call.model, prompts, group_size, step=step, seed=seed)

    def _rows_of_step(self, num_rows: int) -> list[int]:
        """The part of its collection that the next step learns from."""
        return self.updates.rows(
            int(self.args.curr_iteration),
            num_rows=num_rows * self.updates.mini_batches,
            group_size=self.config.group_size,
            seed=int(self.args.seed),
        )

    def _measure_rollouts(self, scored: Scored, rewards: Tensor) -> None:
        measure_rollouts(
            self.forward_step.metrics,
            scored.rollouts,
            rewards,
            scored.breakdown,
            failed=scored.failed,
            dropped=scored.dropped,
            reward_weight=self.config.at(self._step).reward_weight,
            tasks=self.tasks,
            counts_tokens=self.parallel.cp.rank == 0,
        )

    def _annotate(self, batches: list[HybridMicrobatch]) -> list[HybridMicrobatch]:
        if self.teacher is None:
            return batches
        payloads = self.teacher.annotate(batches)
        return [dataclasses.replace(b, teacher=p) for b, p in zip(batches, payloads, strict=True)]

    def _evaluate_first(self, call: ScheduleCall) -> None:
        """What the student can do before its first step, by the loop that Megatron runs later: its calls come here."""
        if self._step > 0 or not self.args.do_valid:
            return
        evaluate = borrow("megatron.training.training", "evaluate_and_print_results")
        config = borrow("megatron.core.utils", "get_model_config")(call.model[0])
        evaluate("iteration 0", self.forward_step, None, call.model, 0, None, config)


def _beside(checkpoints: str, name: str, iteration: int) -> Path:
    """Where something of ours that belongs to a checkpoint lies: Megatron's own folders it may not share."""
    return Path(checkpoints) / name / f"iter_{iteration:07d}"
