"""What is said of a step: numbers of its rollouts, its samples, and reduced scalars under their final names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_hybrid.metrics import Metrics
from megatron_hybrid.records import HybridMicrobatch, RolloutBatch
from megatron_hybrid.returns.corrections import finish_metrics
from megatron_hybrid.rollouts.assemble import Decode
from megatron_hybrid.train.samples import Sample

SHOWN_SAMPLES = 16
"""Responses in an entry of the table of samples, at least; whole micro-batches are shown."""


def measure_rollouts(
    metrics: Metrics,
    rollouts: RolloutBatch,
    rewards: Tensor,
    breakdown: Mapping[str, Tensor],
    *,
    failed: Tensor | None = None,
    dropped: Tensor | None = None,
    reward_weight: float,
    tasks: Sequence[str],
    counts_tokens: bool,
) -> None:
    """Adds what rollouts of one replica say by themselves.

    rewards        [b] fp32
    breakdown      of several rewards, the scores of each before its weight [b], by name
    failed         [b] bool: rewards that could not be made; None: there are none
    dropped        [b] bool: responses that nothing is learnt from, and of which nothing else is said; None: likewise
    tasks          every task there can be: ranks must report the same names, whatever they drew
    counts_tokens  False where another rank holds, and counts, the same rollouts
    """
    counts = {"failed_rewards": failed, "dropped_responses": dropped}
    for name, flags in (counts | {"failed_rollouts": torch.tensor(rollouts.unanswered)}).items():
        metrics.sum(f"training/{name}", 0.0 if flags is None or not counts_tokens else flags.float())
    kept = torch.ones_like(rewards, dtype=torch.bool) if dropped is None else ~dropped
    metrics.spread("critic/score", rewards, mask=kept)
    metrics.spread("critic/rewards", reward_weight * rewards, mask=kept)
    for name, scores in breakdown.items():
        metrics.mean(f"rewards/{name}/mean", scores, weights=kept)
    drawn = [prompt.task for prompt in rollouts.prompts]
    for task in tasks:
        of_task = torch.tensor([name == task for name in drawn], device=rewards.device) & kept
        metrics.mean(f"critic/score/{task}", rewards, weights=of_task)
        for name, scores in breakdown.items():
            metrics.mean(f"rewards/{name}/{task}", scores, weights=of_task)
    lengths = rollouts.response_mask.sum(dim=1).float()
    metrics.spread("response_length", lengths, mask=kept)
    metrics.mean("response_length/clip_ratio", torch.tensor(rollouts.truncated).float(), weights=kept.cpu())
    prompt_lengths = torch.tensor([float(len(prompt.token_ids)) for prompt in rollouts.prompts])
    metrics.mean("prompt_length/mean", prompt_lengths)
    counted = float(lengths.sum()) + float(prompt_lengths.sum())
    metrics.sum("perf/total_num_tokens", counted if counts_tokens else 0.0)


def sample_rows(
    rollouts: RolloutBatch,
    rewards: Tensor,
    batches: Sequence[HybridMicrobatch],
    token_kl: Sequence[Tensor] | None,
    decode: Decode,
) -> list[Sample]:
    """The responses of the first micro-batches.

    rewards   [b] fp32
    token_kl  [n] of each micro-batch, nats; None: not shown
    """
    rows: list[Sample] = []
    of_batches = [None] * len(batches) if token_kl is None else token_kl
    for batch, of_batch in zip(batches, of_batches, strict=True):
        if len(rows) >= SHOWN_SAMPLES:
            break
        for k in range(len(batch.prompts)):
            row = len(rows)
            prompt, ids = rollouts.prompts[row], rollouts.tokens[row][rollouts.response_mask[row]]
            kl = () if of_batch is None else tuple(of_batch[batch.sequence_of_token == k].tolist())
            rows.append(
                Sample(
                    prompt=prompt.text,
                    response=rollouts.responses[row],
                    answer=prompt.answer,
                    reward=float(rewards[row]),
                    kl_per_token=kl,
                    tokens=tuple(decode([i]) for i in ids.tolist()),
                    task=prompt.task,
                    truncated=rollouts.truncated[row],
                )
            )
    return rows


def finished(values: dict[str, float]) -> dict[str, float]:
    """Reduced scalars to what is reported, changed in place: squared norms to norms, stage times to one step time."""
    for name in ("actor/grad_norm_dense", "actor/grad_norm_sparse"):
        if name in values:
            values[name] = math.sqrt(max(values[name], 0.0))
    stages = [
        values[f"timing_s/{name}"]
        for name in ("rollout", "teacher", "reward", "credit", "update")
        if f"timing_s/{name}" in values
    ]
    finish_metrics(values)
    values["timing_s/step"] = sum(stages)
    values["perf/throughput"] = values["perf/total_num_tokens"] / max(sum(stages), 1e-9)
    return values


def held_out(values: dict[str, float]) -> dict[str, float]:
    """The numbers of an evaluation under their held-out names; no KL without a teacher."""
    named = {"val/score": values["critic/score/mean"]}
    if "actor/kl_loss" in values:
        named["val/kl"] = values["actor/kl_loss"]
        # Sum over tokens per response: the trajectory KL, which is what the objective weighs.
        named["val/kl_per_response"] = values["actor/kl_loss"] * values["response_length/mean"]
    named["val/entropy"] = values["actor/entropy"]
    named["val/response_length"] = values["response_length/mean"]
    for name, value in values.items():
        if name.startswith("critic/score/") and name.rpartition("/")[2] not in ("mean", "max", "min"):
            named[name.replace("critic", "val", 1)] = value
        if name.startswith("rewards/"):
            named[f"val/{name}"] = value
    return named
