"""From a collection's rewards to the credit of each of its tokens, with the run's settings at that step.

    Scored (rollouts, rewards) -> advantages, once per collection -> `weigh` of each micro-batch, once per step
    what the loss said of its tokens -> on which tasks the next steps imitate (`imitation_filter`), once per step

The mean of earlier rewards (baseline `running_mean`) and the filter's moments are what a run has to remember here:
`state` is plain numbers, kept in Megatron's checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.metrics import Metrics
from megatron_hybrid.parallel import ParallelContext
from megatron_hybrid.records import HybridMicrobatch, RewardBatch, RolloutBatch, TokenNumbers, Weigh
from megatron_hybrid.returns.baselines import reward_advantages
from megatron_hybrid.returns.corrections import Correction
from megatron_hybrid.returns.reward_statistics import RunningMean
from megatron_hybrid.returns.task_filter import TaskFilter
from megatron_hybrid.returns.weights import make_weigh
from megatron_hybrid.schedule.microbatch import CreditFor, rows_of_tokens

logger = logging.getLogger(__name__)

_FILTER = "imitation_filter/"
"""How the names of its numbers begin in a checkpoint."""


@dataclass(frozen=True)
class Scored:
    """Rollouts of one replica with what became of them; rewards on the last pipeline stage only."""

    rollouts: RolloutBatch
    rewards: Tensor | None = None
    """[b] fp32."""
    advantages: Tensor | None = None
    """[b] fp32: rewards after the baseline."""
    breakdown: dict[str, Tensor] = field(default_factory=dict)
    """Of several rewards, the scores of each before its weight [b] fp32, by name."""
    failed: Tensor | None = None
    """[b] bool: rewards that could not be made and count as 0; None: there are none."""
    dropped: Tensor | None = None
    """[b] bool: whole groups that nothing is learnt from; None: there are none."""

    def rewarded(self, scores: RewardBatch, *, drop_failed: bool) -> Scored:
        """With rewards; the group of a response that has none, and of one that was never given, is dropped."""
        rollouts = self.rollouts
        lost = torch.tensor(rollouts.unanswered or (False,) * len(rollouts.prompts), device=rollouts.tokens.device)
        if drop_failed and scores.failed is not None:
            lost = lost | scores.failed
        dropped = torch.isin(rollouts.group_id, rollouts.group_id[lost]) if lost.any() else None
        return replace(self, rewards=scores.rewards, breakdown=scores.breakdown, failed=scores.failed, dropped=dropped)

    def take(self, rows: Sequence[int]) -> Scored:
        """These rows, in this order."""
        index = list(rows)
        return Scored(
            self.rollouts.take(index),
            None if self.rewards is None else self.rewards[index],
            None if self.advantages is None else self.advantages[index],
            {name: scores[index] for name, scores in self.breakdown.items()},
            None if self.failed is None else self.failed[index],
            None if self.dropped is None else self.dropped[index],
        )


class Credit:
    """Credit assignment of one run on one rank.

    tasks  every task the prompts can have, in one order on every rank; read by the filter of the imitation alone
    """

    def __init__(self, config: HybridConfig, parallel: ParallelContext, tasks: Sequence[str] = ()) -> None:
        self.config = config
        self.parallel = parallel
        self.running_mean = RunningMean(config.baseline_decay)
        self.filter: TaskFilter | None = None
        if config.imitation_filter == "task":
            self.filter = TaskFilter(tuple(tasks), config.imitation_filter_floor, config.imitation_filter_decay)

    def collected(self, scored: Scored) -> Scored:
        """A collection with its advantages; unchanged where it has them, or no rewards.

        Collective over data-parallel replicas where the baseline is.
        """
        if scored.rewards is None or scored.advantages is not None:
            return scored
        group = self.parallel.dp.group
        kept = None if scored.dropped is None else ~scored.dropped
        advantages = reward_advantages(
            scored.rewards,
            scored.rollouts.group_id,
            self.config.baseline,
            dp_group=group,
            running_mean=self.running_mean.value,
            kept=kept,
        )
        if self.config.baseline == "running_mean":
            self.running_mean = self.running_mean.updated(scored.rewards, dp_group=group, kept=kept)
        return replace(scored, advantages=advantages)

    def credit_for(self, scored: Scored, *, step: int, metrics: Metrics) -> CreditFor:
        """The credit of the tokens of each micro-batch, at the weights and discount of this step."""
        config, rollouts, advantages = self.config.at(step), scored.rollouts, scored.advantages
        assert advantages is not None, "collected() comes first"
        shares = self._shares(rollouts, advantages.device, metrics)
        correction = Correction.from_config(config)

        def credit_for(rows: slice, batch: HybridMicrobatch) -> Weigh:
            return make_weigh(
                reward_advantage=advantages[rows],
                row_of_token=batch.sequence_of_token,
                position_of_token=batch.position_of_token,
                num_positions=rollouts.tokens.shape[1],
                discount=config.discount,
                future_cost=config.future_cost,
                reward_weight=config.reward_weight,
                imitation_weight=config.imitation_weight,
                imitation_share=None if shares is None else shares[rows],
                group_id=rollouts.group_id[rows] if config.cost_baseline == "group" else None,
                sampled_logprobs=batch.sampled_logprobs,
                correction=correction,
                cp_group=self.parallel.cp.group,
                metrics=metrics,
            )

        return credit_for

    def _shares(self, rollouts: RolloutBatch, device: torch.device, metrics: Metrics) -> Tensor | None:
        """[b]: of the imitation weight, by task."""
        if self.filter is None:
            return None
        for task in self.filter.tasks:
            metrics.mean(f"training/imitation_share/{task}", self.filter.share(task))
            correlation = self.filter.correlation(task)
            known = float(correlation is not None)
            metrics.mean(f"training/teacher_alignment/{task}", correlation or 0.0, weights=known)
        return self.filter.shares([prompt.task for prompt in rollouts.prompts], device)

    def after_step(self, scored: Scored, batches: Sequence[HybridMicrobatch], numbers: Sequence[TokenNumbers]) -> None:
        """After the first step that learns from some rollouts, on the last stage: what the loss said of their tokens.

        Collective over context-parallel ranks and replicas where the imitation is filtered.
        """
        if self.filter is None:
            return
        assert scored.rewards is not None, "the last stage has them"
        per_token = torch.cat([of_batch.teacher_log_prob - of_batch.log_prob for of_batch in numbers]).cpu().float()
        preference = torch.zeros(len(scored.rewards)).index_add_(0, rows_of_tokens(batches).cpu(), per_token)
        self.filter = self.filter.updated(
            scored.rewards,
            preference,
            scored.rollouts.group_id,
            [prompt.task for prompt in scored.rollouts.prompts],
            kept=None if scored.dropped is None else ~scored.dropped,
            cp_group=self.parallel.cp.group,
            dp_group=self.parallel.dp.group,
        )

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps, equal on every rank; nothing unless baseline or filter remember something.

        Collective over pipeline stages then: the last one knows.
        """
        state = self.running_mean.state() if self.config.baseline == "running_mean" else {}
        if self.filter is not None:
            state |= {f"{_FILTER}{name}": value for name, value in self.filter.state().items()}
        pp = self.parallel.pp
        if state and pp.size > 1:
            values = torch.tensor(list(state.values()), dtype=torch.float64, device=torch.cuda.current_device())
            dist.broadcast(values, group=pp.group, group_src=pp.size - 1)
            state = dict(zip(state, values.tolist(), strict=True))
        return state

    def load(self, state: dict[str, float]) -> None:
        """Goes on from a checkpoint's state, as far as it has what this run remembers."""
        if self.config.baseline == "running_mean":
            if "mean" in state:
                self.running_mean = RunningMean.from_state(self.config.baseline_decay, state)
            else:
                logger.warning("the checkpoint holds no mean of earlier rewards: the baseline starts anew")
        if self.filter is not None:
            of_filter = {name.removeprefix(_FILTER): value for name, value in state.items() if name.startswith(_FILTER)}
            if not of_filter:
                logger.warning("the checkpoint holds nothing of the filter of imitation: it starts anew")
            self.filter = self.filter.loaded(of_filter)
