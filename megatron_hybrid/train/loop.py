"""The online step around Megatron's own: draw, sample, score, credit, annotate, update (Megatron's), measure, report.

    draw -> sample -> score -> credit -> annotate -> [Megatron's schedule, gradient, optimizer] -> measure -> report

`OnlineLoop` is what `schedule/inject.py` calls around each schedule call. Nothing here survives a step but the report:
the position in the prompts is Megatron's own count of consumed samples, and every random number derives from the step,
the prompt and the sample, so a resumed run goes on exactly.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.mcore.symbols import borrow
from megatron_hybrid.metrics import Metrics
from megatron_hybrid.parallel import ParallelContext
from megatron_hybrid.prompts.stream import PromptStream
from megatron_hybrid.records import HybridMicrobatch, RolloutBatch, TokenStats, Weigh
from megatron_hybrid.returns.baselines import reward_advantages
from megatron_hybrid.returns.weights import make_weigh
from megatron_hybrid.rewards.rubric import Rubric
from megatron_hybrid.rollouts.generate import Sampler
from megatron_hybrid.schedule.forward_step import HybridForwardStep
from megatron_hybrid.schedule.inject import ScheduleCall
from megatron_hybrid.schedule.layout import SequenceLayout, schedule_shape
from megatron_hybrid.schedule.microbatch import CreditFor, microbatches
from megatron_hybrid.teachers.base import Teacher
from megatron_hybrid.train.report import RunReport
from megatron_hybrid.train.samples import Sample

EVAL_SEED_OFFSET = 1_000_003
"""Held-out responses are drawn with noise of their own, the same at every evaluation: differences are the model's."""

SHOWN_SAMPLES = 16
"""Responses in an entry of the table of samples, at least; whole micro-batches are shown."""


@dataclasses.dataclass
class OnlineLoop:
    """The stages of one run on one rank; implements `schedule.inject.Hooks`."""

    args: Any
    """Megatron's arguments; read for its counters (iteration, consumed samples), never written."""
    config: HybridConfig
    forward_step: HybridForwardStep
    parallel: ParallelContext
    layout: SequenceLayout
    prompts: PromptStream
    eval_prompts: PromptStream
    sampler: Sampler
    rubric: Rubric
    teacher: Teacher | None
    tasks: tuple[str, ...]
    """Every task the prompts can have: ranks must report the same names, whatever they drew."""
    report: RunReport | None
    """On the logging rank only."""
    samples_interval: int
    """Steps between entries of the table of samples."""
    gradient_norms_interval: int
    """Steps between measurements of the dense and sparse gradient norms."""

    def __post_init__(self) -> None:
        self._step = int(self.args.iteration)
        """Optimizer steps done."""
        self._collected: tuple[RolloutBatch, Tensor | None, list[HybridMicrobatch]] | None = None
        self._held_out = Metrics()
        self._evaluations = 0
        self._started = False
        self._clock = _Clock()

    # Hooks, in the order Megatron's step meets them.

    def before_schedule(self, call: ScheduleCall) -> None:
        """Rollouts, rewards, credit and the teacher pass; the call then reads these micro-batches."""
        if not call.forward_only and not self._started:
            self._started = True
            self._evaluate_first(call)
        self._clock = _Clock()
        self.forward_step.metrics = self._held_out if call.forward_only else Metrics()
        self.forward_step.token_kl = []
        next_step = self._step + 1
        measured = next_step % self.gradient_norms_interval == 0 or next_step == 1
        self.forward_step.gradient_norms = measured and not call.forward_only
        batches = self._collect(call)
        call.feed(batches, shape=schedule_shape([batch.student for batch in batches], self.parallel.cp.size))

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
        values = _held_out_names(metrics.reduce(self.parallel.dp.group), self.tasks)
        if self.report is not None:
            self.report.evaluation(self._step, values)

    def after_step(self, record: dict[str, Any]) -> None:
        """Reduces the step's metrics over data-parallel replicas and reports them on the logging rank."""
        self._step = int(record["iteration"])
        if not self.parallel.is_last_stage or self._collected is None:
            return
        self._clock.lap("update")
        metrics = self.forward_step.metrics
        for name, seconds in self._clock.laps.items():
            metrics.max(f"timing_s/{name}", seconds)
        for name, key in (("actor/grad_norm", "grad_norm"), ("actor/lr", "learning_rate")):
            metrics.max(name, math.nan if record[key] is None else float(record[key]))
        for name, value in record["loss_dict"].items():
            metrics.max(name, value)  # Megatron has reduced them
        metrics.sum("training/skipped_steps", float(record["skipped_iter"]))
        metrics.max("perf/max_memory_allocated_gb", torch.cuda.max_memory_allocated() / 2**30)
        values = _finish(metrics.reduce(self.parallel.dp.group))
        if self.report is not None:
            self.report.step(self._step, values)
            if self._step % self.samples_interval == 0 or self._step == 1:
                self.report.samples(self._step, self._sample_rows())
        self._release()

    def _release(self) -> None:
        """The teacher's hidden states go before the next rollout needs the memory."""
        self._collected = None
        self.forward_step.token_kl = None

    # The stages.

    def _collect(self, call: ScheduleCall) -> list[HybridMicrobatch]:
        evaluation = call.forward_only
        micro_batch_size = int(call.kwargs["micro_batch_size"])
        group_size = 1 if evaluation else self.config.group_size
        replica, rest = divmod(int(call.kwargs["num_microbatches"]) * micro_batch_size, group_size)
        assert rest == 0, "prepare() refuses batches that cut a group"
        count = replica * self.parallel.dp.size
        step = 0 if evaluation else int(self.args.curr_iteration)
        start = self._evaluations * count if evaluation else int(self.args.consumed_train_samples) // group_size
        seed = int(self.args.seed) + (EVAL_SEED_OFFSET if evaluation else 0)
        stream = self.eval_prompts if evaluation else self.prompts

        prompts = stream.draw(start, count, self.parallel.dp.rank, self.parallel.dp.size)
        rollouts = self.sampler.sample(call.model, prompts, group_size, step=step, seed=seed)
        self._clock.lap("rollout")
        rewards = self._score(rollouts)
        self._clock.lap("reward")
        credit = self._no_credit if evaluation else self._credit(rollouts, rewards)
        batches = microbatches(
            rollouts,
            micro_batch_size=micro_batch_size,
            aggregation=self.config.aggregation,
            credit_for=credit,
            layout=self.layout,
        )
        batches = self._annotate(batches)
        self._clock.lap("teacher")

        if rewards is not None:
            self._measure(rollouts, rewards)
        self._collected = rollouts, rewards, batches
        return batches

    def _score(self, rollouts: RolloutBatch) -> Tensor | None:
        """Rewards [b]. Scored once per replica, on the last stage, which is the only one to need it."""
        if not self.parallel.is_last_stage:
            return None
        tp, device = self.parallel.tp, rollouts.tokens.device
        if tp.rank == 0:
            rewards = self.rubric.score(rollouts).rewards
        else:
            rewards = torch.empty(len(rollouts.prompts), device=device)
        if tp.size > 1:
            dist.broadcast(rewards, group=tp.group, group_src=0)
        return rewards

    def _credit(self, rollouts: RolloutBatch, rewards: Tensor | None) -> CreditFor:
        if rewards is None:
            return self._no_credit
        config = self.config
        advantages = reward_advantages(rewards, rollouts.group_id, config.baseline)

        def credit_for(rows: slice, sequence: Tensor, column: Tensor) -> Weigh:
            return make_weigh(
                reward_advantage=advantages[rows],
                row_of_token=sequence,
                position_of_token=column,
                num_positions=rollouts.tokens.shape[1],
                discount=config.discount,
                future_cost=config.future_cost,
                reward_weight=config.reward_weight,
                imitation_weight=config.imitation_weight,
                group_id=rollouts.group_id[rows] if config.cost_baseline == "group" else None,
            )

        return credit_for

    def _no_credit(self, rows: slice, sequence: Tensor, column: Tensor) -> Weigh:
        """An evaluation, or a stage without a loss: imitation alone, so that the loss reads as the KL."""

        def weigh(stats: TokenStats) -> tuple[Tensor, Tensor]:
            return torch.ones_like(stats.kl), torch.zeros_like(stats.kl)

        return weigh

    def _annotate(self, batches: list[HybridMicrobatch]) -> list[HybridMicrobatch]:
        if self.teacher is None:
            return batches
        payloads = self.teacher.annotate(batches)
        return [dataclasses.replace(b, teacher=p) for b, p in zip(batches, payloads, strict=True)]

    def _measure(self, rollouts: RolloutBatch, rewards: Tensor) -> None:
        metrics = self.forward_step.metrics
        metrics.spread("critic/score", rewards)
        metrics.spread("critic/rewards", self.config.reward_weight * rewards)
        drawn = [prompt.task for prompt in rollouts.prompts]
        for task in self.tasks:
            of_task = torch.tensor([name == task for name in drawn], device=rewards.device)
            metrics.mean(f"critic/score/{task}", rewards, weights=of_task.float())
        lengths = rollouts.response_mask.sum(dim=1).float()
        metrics.spread("response_length", lengths)
        metrics.mean("response_length/clip_ratio", torch.tensor(rollouts.truncated).float())
        prompt_lengths = torch.tensor([float(len(prompt.token_ids)) for prompt in rollouts.prompts])
        metrics.mean("prompt_length/mean", prompt_lengths)
        metrics.sum("perf/total_num_tokens", float(lengths.sum()) + float(prompt_lengths.sum()))

    def _sample_rows(self) -> list[Sample]:
        """The responses of this replica's first micro-batches, with the KL of each of their tokens."""
        assert self._collected is not None and self.forward_step.token_kl is not None
        rollouts, rewards, batches = self._collected
        assert rewards is not None
        rows: list[Sample] = []
        for batch, token_kl in zip(batches, self.forward_step.token_kl, strict=True):
            if len(rows) >= SHOWN_SAMPLES:
                break
            for k in range(len(batch.tasks)):
                row = len(rows)
                prompt, of_row = rollouts.prompts[row], batch.sequence_of_token == k
                rows.append(
                    Sample(
                        prompt=prompt.text,
                        response=rollouts.responses[row],
                        answer=prompt.answer,
                        reward=float(rewards[row]),
                        kl_per_token=tuple(token_kl[of_row].tolist()) if self.teacher is not None else (),
                        tokens=tuple(self.sampler.decode([i]) for i in batch.targets[of_row].tolist()),
                        task=prompt.task,
                        truncated=rollouts.truncated[row],
                    )
                )
        return rows

    def _evaluate_first(self, call: ScheduleCall) -> None:
        """What the student can do before its first step, by the loop that Megatron runs later: its calls come here."""
        if self._step > 0 or not self.args.do_valid:
            return
        evaluate = borrow("megatron.training.training", "evaluate_and_print_results")
        config = borrow("megatron.core.utils", "get_model_config")(call.model[0])
        evaluate("iteration 0", self.forward_step, None, call.model, 0, None, config)


class _Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now


def _finish(values: dict[str, float]) -> dict[str, float]:
    """Reduced scalars to what is reported: squared norms become norms, stage times one step time."""
    for name in ("actor/grad_norm_dense", "actor/grad_norm_sparse"):
        if name in values:
            values[name] = math.sqrt(max(values[name], 0.0))
    stages = [
        values[f"timing_s/{name}"]
        for name in ("rollout", "reward", "teacher", "update")
        if f"timing_s/{name}" in values
    ]
    values["timing_s/step"] = sum(stages)
    values["perf/throughput"] = values["perf/total_num_tokens"] / max(sum(stages), 1e-9)
    return values


def _held_out_names(values: dict[str, float], tasks: tuple[str, ...]) -> dict[str, float]:
    """The numbers of an evaluation under their held-out names; no KL without a teacher."""
    held_out = {"val/score": values["critic/score/mean"]}
    if "actor/kl_loss" in values:
        held_out["val/kl"] = values["actor/kl_loss"]
        # Sum over tokens per response: the trajectory KL, which is what the objective weighs.
        held_out["val/kl_per_response"] = values["actor/kl_loss"] * values["response_length/mean"]
    held_out["val/entropy"] = values["actor/entropy"]
    held_out["val/response_length"] = values["response_length/mean"]
    return held_out | {f"val/score/{task}": values[f"critic/score/{task}"] for task in tasks}
