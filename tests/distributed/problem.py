"""One batch of rollouts with everything that makes a gradient, and that gradient in float64, by autograd alone.

`reference` shares nothing with the product but the model's own modules: sequences go through it one at a time, without
padding, packing or masks; the loss is written out per token; torch differentiates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.records import Prompt, RolloutBatch

VOCAB = 61
SEQUENCES = 8
GROUP = 4
REWARDS = (0.0, 1.0, 0.5, 0.0, 2.0, 0.0, 0.0, 1.0)
BORDERS = (3, 3, 3, 3, 5, 5, 5, 5)
LENGTHS = (1, 9, 4, 2, 7, 9, 1, 5)
WIDTH = 14


@dataclass(frozen=True)
class Problem:
    """What is trained on."""

    aggregation: str = "seq-mean-token-sum"
    lengths: tuple[int, ...] = LENGTHS
    """Response tokens of each sequence; 0: none."""
    borders: tuple[int, ...] = BORDERS
    """Prompt tokens; WIDTH minus this is the longest response."""
    cost_baseline: str = "none"
    discount: float = 0.9
    reward_weight: float = 1.5
    off_policy: bool = False
    """Sampled under other probabilities, with exact importance weights; else on-policy, uncorrected."""
    lm_head: str = "fused"
    """In chunks of 3 tokens: several in every micro-batch, so in one pass where credit allows it."""

    @property
    def config(self) -> HybridConfig:
        return HybridConfig(
            reward_weight=self.reward_weight,
            imitation_weight=0.5,
            discount=self.discount,
            aggregation=self.aggregation,
            group_size=GROUP,
            cost_baseline=self.cost_baseline,
            rollout_correction="sequence_truncate" if self.off_policy else "none",
            rollout_is_threshold=float("inf"),
            prefix_correction=self.off_policy,
            lm_head=self.lm_head,
            lm_head_chunk_size=3 if self.lm_head == "fused" else None,
        )


def rollouts(problem: Problem) -> RolloutBatch:
    """The same tokens on every rank; every micro-batch has another number of response tokens."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, VOCAB, (SEQUENCES, WIDTH), generator=generator)
    sampled = -5 + torch.rand(SEQUENCES, WIDTH, generator=generator)  # near log(1/61): weights of about 1
    mask = torch.zeros(SEQUENCES, WIDTH, dtype=torch.bool)
    for row, (border, length) in enumerate(zip(problem.borders, problem.lengths, strict=True)):
        mask[row, border : border + length] = True
    return RolloutBatch(
        prompts=tuple(
            Prompt(row // GROUP, tuple(tokens[row, : problem.borders[row]].tolist()), "", f"task {row % 2}")
            for row in range(SEQUENCES)
        ),
        tokens=tokens,
        response_mask=mask,
        sampled_logprobs=torch.where(mask, sampled, 0.0),
        group_id=torch.arange(SEQUENCES) // GROUP,
        truncated=(False,) * SEQUENCES,
        responses=("",) * SEQUENCES,
        temperature=1.0,
        policy_version=0,
        seed=0,
    )


def reference(overrides: dict[str, Any], problem: Problem, bf16_weights: bool = False) -> dict[str, Any]:
    """The gradient in float64, as shards of the one rank that runs this (see `gradient.shards`).

    bf16_weights  at the weights that a bf16 model has
    """
    from tests.distributed.gradient import shards
    from tests.tiny import build, megatron, set_weights, start

    with megatron(**overrides) as args:
        (student,) = start(args)
        set_weights([student], "student")
        (teacher,) = build(args)
        set_weights([teacher], "teacher")
        for model in (student, teacher):
            (model.bfloat16() if bf16_weights else model).double()
        batch, config = rollouts(problem), problem.config
        log_p, log_q = [], []
        for row, length in enumerate(problem.lengths):
            fed = batch.tokens[row : row + 1, : max(problem.borders[row] + length - 1, 1)]
            where = torch.arange(fed.shape[1])[None]
            answers = slice(problem.borders[row] - 1, problem.borders[row] - 1 + length)
            with torch.no_grad():
                log_q.append(teacher(fed, where, None)[0, answers, :VOCAB].double().log_softmax(-1))
            log_p.append(student(fed, where, None)[0, answers, :VOCAB].double().log_softmax(-1))
        loss = _loss(log_p, log_q, batch, problem, config)
        loss.backward()
        for parameter in student.parameters():
            parameter.main_grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        return {"shards": shards([student])}


def _loss(
    log_p: list[Tensor], log_q: list[Tensor], batch: RolloutBatch, problem: Problem, config: HybridConfig
) -> Tensor:
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    targets = [
        batch.tokens[row, border : border + length]
        for row, (border, length) in enumerate(zip(problem.borders, problem.lengths, strict=True))
    ]
    kls = [(p.exp() * (p - q)).sum(-1) for p, q in zip(log_p, log_q, strict=True)]
    chosen = [p.gather(1, y[:, None]).squeeze(1) for p, y in zip(log_p, targets, strict=True)]
    futures = [_future(kl.detach(), config.discount) for kl in kls]
    total: Any = 0.0
    for row, length in enumerate(problem.lengths):
        others = [i for i in range(SEQUENCES) if i // GROUP == row // GROUP and i != row]
        reward = rewards[row] - rewards[others].mean()
        ratio = torch.zeros(length, dtype=torch.float64)
        if problem.off_policy:
            border = problem.borders[row]
            ratio = (chosen[row] - batch.sampled_logprobs[row, border : border + length].double()).detach()
        weight = ratio.sum().exp()
        share = 1 / length if problem.aggregation == "seq-mean-token-mean" and length else 1.0
        for t in range(length):
            future = futures[row][t]
            if problem.cost_baseline == "group":
                future = future - torch.stack([_at(futures[i], t) for i in others]).mean()
            advantage = config.reward_weight * reward - config.imitation_weight * future
            dense = config.imitation_weight * ratio[:t].sum().exp() * kls[row][t]
            total = total + share * (dense - weight * advantage * chosen[row][t])
    tokens, sequences = sum(problem.lengths), sum(length > 0 for length in problem.lengths)
    return total / (tokens if problem.aggregation == "token-mean" else sequences)


def _future(costs: Tensor, discount: float) -> Tensor:
    """What is still to come after each token, by its definition."""
    n = len(costs)
    return torch.stack(
        [
            sum((discount ** (later - t) * costs[later] for later in range(t + 1, n)), costs.new_zeros(()))
            for t in range(n)
        ]
        or [costs.new_zeros(())]
    )[:n]


def _at(values: Tensor, t: int) -> Tensor:
    return values[t] if t < len(values) else values.new_zeros(())
