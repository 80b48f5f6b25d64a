"""A problem small enough to enumerate: every response of a tiny real Megatron GPT, at its exact probability.

    J = sum_y pi(y) [ beta sum_t (log pi(y_t) - log q(y_t)) - lambda r(y) ]

`objective` is autograd through J itself, in float64. `product` is the product's own path (op, credit, Megatron's
schedule and finalize) over all groups of responses, weighed by their probability under whoever sampled them. Four
tokens, one prompt token, responses of at most three tokens that end with token 0: 40 responses, 1600 pairs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.records import Prompt, RolloutBatch

VOCAB, HORIZON, PROMPT = 4, 3, 2
TINY_GPT = {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 32, "vocab_size": VOCAB, "seq_length": 8}
RUNNING_MEAN = 0.6
MICRO_BATCH = 320
SAMPLERS = {"student": "student", "other": "somebody else"}
"""Who samples, and the name its weights are drawn from."""


@dataclass(frozen=True)
class Method:
    """Which estimator of the gradient."""

    future_cost: str = "closed_form"
    baseline: str = "none"
    cost_baseline: str = "none"
    sampler: str = "student"
    """Whose responses; those of "other" weights are corrected by exact importance weights."""
    discount: float = 1.0

    @property
    def config(self) -> HybridConfig:
        off_policy = self.sampler != "student"
        return HybridConfig(
            reward_weight=1.5,
            imitation_weight=0.7,
            discount=self.discount,
            future_cost=self.future_cost,
            baseline=self.baseline,
            cost_baseline=self.cost_baseline,
            rollout_correction="sequence_truncate" if off_policy else "none",
            rollout_is_threshold=math.inf,
            prefix_correction=off_policy,
            group_size=2,
        )

    @property
    def group_size(self) -> int:
        """Responses that one estimate compares."""
        alone = self.baseline in ("none", "running_mean") and self.cost_baseline == "none"
        return 1 if alone else 2


def responses() -> list[list[int]]:
    """Every response there is."""
    return [
        [*body, last]
        for length in range(1, HORIZON + 1)
        for body in itertools.product(range(1, VOCAB), repeat=length - 1)
        for last in range(VOCAB)
        if last == 0 or length == HORIZON
    ]


def reward(response: list[int]) -> float:
    """Any function of a response that no baseline explains."""
    return (sum((t + 1) * token * token for t, token in enumerate(response)) % 7) / 3


def objective(overrides: dict[str, Any], standardised: bool) -> dict[str, Any]:
    """dJ in float64 as shards of the one rank, and log-probs of every response's tokens by sampler.

    standardised  True: in the place of the reward, what rewards over their pair's deviation climb (GRPO)
    """
    from tests.distributed.gradient import shards
    from tests.tiny import build, megatron, set_weights, start

    with megatron(**TINY_GPT | overrides) as args:
        models = {}
        (models["student"],) = start(args)
        (models["teacher"],), (models["other"],) = build(args), build(args)
        for who, model in models.items():
            set_weights([model], SAMPLERS.get(who, who))
            model.double()
        config = Method().config
        log_probs = {who: [_log_probs(model, y) for y in responses()] for who, model in models.items()}
        chance = torch.stack([of_tokens.sum() for of_tokens in log_probs["student"]]).exp()
        assert abs(float(chance.detach().sum()) - 1) < 1e-12, "every response, once"
        cost = torch.stack(
            [(own - its.detach()).sum() for own, its in zip(log_probs["student"], log_probs["teacher"], strict=True)]
        )
        rewards = torch.tensor([reward(y) for y in responses()], dtype=torch.float64)
        gain = _standardised_gain(rewards, chance) if standardised else (chance * rewards).sum()
        (config.imitation_weight * (chance * cost).sum() - config.reward_weight * gain).backward()
        student = models["student"]
        for parameter in student.parameters():
            parameter.main_grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        sampled = {who: [of_tokens.tolist() for of_tokens in log_probs[who]] for who in SAMPLERS}
        return {"shards": shards([student]), "sampled": sampled}


def _log_probs(model: torch.nn.Module, response: list[int]) -> Tensor:
    """[length] float64: of each token of a response."""
    fed = torch.tensor([[PROMPT, *response[:-1]]])
    logits = model(fed, torch.arange(fed.shape[1])[None], None)
    distributions = logits[0, :, :VOCAB].log_softmax(-1)
    return distributions.gather(1, torch.tensor(response)[:, None]).squeeze(1)


def _standardised_gain(rewards: Tensor, chance: Tensor) -> Tensor:
    """sum over pairs of pi(y) pi(y') (r - r') / 2 / (std + 1e-6), y' held: its gradient is the mean estimate."""
    half = (rewards[:, None] - rewards[None, :]) / 2
    std = half.abs() * math.sqrt(2)  # the sample's, of two
    return (chance[:, None] * chance[None, :].detach() * half / (std + 1e-6)).sum()


def product(overrides: dict[str, Any], method: Method, sampled: dict[str, list[list[float]]]) -> dict[str, Any]:
    """The mean of the product's gradient over all groups of responses; this rank's shards.

    sampled  log-probs of every response's tokens, by sampler
    """
    from megatron_hybrid.mcore.groups import parallel_context
    from megatron_hybrid.schedule.forward_step import HybridForwardStep
    from megatron_hybrid.schedule.layout import SequenceLayout
    from megatron_hybrid.schedule.microbatch import credited, microbatches
    from megatron_hybrid.teachers.frozen import FrozenTeacher
    from megatron_hybrid.train.credit import Credit, Scored
    from tests.distributed.gradient import run_schedule, shards
    from tests.tiny import build, megatron, set_weights, start

    with megatron(**TINY_GPT | overrides, no_check_for_nan_in_loss_and_grad=True) as args:
        model = start(args, ddp=True)
        set_weights(model, "student")
        teacher = build(args)
        set_weights(teacher, "teacher")
        parallel, config = parallel_context(), method.config

        groups = list(itertools.product(range(len(responses())), repeat=method.group_size))
        everything, chances = _rollouts(groups, sampled[method.sampler])
        rewards = torch.tensor([reward(responses()[which]) for group in groups for which in group])
        advantages = _advantages(rewards, everything.group_id, config)
        size = len(rewards) // parallel.dp.size
        scored = Scored(everything, rewards, advantages).take(
            range(parallel.dp.rank * size, size * (parallel.dp.rank + 1))
        )
        chances = chances[parallel.dp.rank * size :][:size]

        step = HybridForwardStep(config)
        batches = microbatches(
            scored.rollouts,
            micro_batch_size=min(MICRO_BATCH, size),
            aggregation=config.aggregation,
            layout=SequenceLayout.of(parallel, sequence_parallel=args.sequence_parallel),
        )
        batches = credited(batches, Credit(config, parallel).credit_for(scored, step=0, metrics=step.metrics))
        payloads = FrozenTeacher(teacher, parallel).annotate(batches)
        first = parallel.dp_cp.rank == 0
        weighed = []
        for number, (batch, payload) in enumerate(zip(batches, payloads, strict=True)):
            rows = chances[number * len(batch.prompts) :][: len(batch.prompts)]
            weighed.append(
                dataclasses.replace(
                    batch,
                    teacher=payload,
                    # An expectation, not a mean over rows: each counts with its probability, and these add up to 1.
                    token_scale=batch.token_scale * rows[batch.sequence_of_token],
                    count=torch.tensor(int(first and number == 0), dtype=torch.int32),
                )
            )
        run_schedule(model, step, weighed, parallel)
        return {"shards": shards(model)}


def _rollouts(groups: list[tuple[int, ...]], log_probs: list[list[float]]) -> tuple[RolloutBatch, Tensor]:
    """Every response of every group, and the share of each in the mean: its group's probability over its size."""
    every = responses()
    rows = [(number, which) for number, group in enumerate(groups) for which in group]
    tokens = torch.zeros(len(rows), 1 + HORIZON, dtype=torch.long)
    mask = torch.zeros(len(rows), 1 + HORIZON, dtype=torch.bool)
    sampled = torch.zeros(len(rows), 1 + HORIZON)
    tokens[:, 0] = PROMPT
    for row, (_, which) in enumerate(rows):
        end = 1 + len(every[which])
        tokens[row, 1:end] = torch.tensor(every[which])
        mask[row, 1:end] = True
        sampled[row, 1:end] = torch.tensor(log_probs[which])
    total = [sum(of_tokens) for of_tokens in log_probs]
    chance_of_group = [math.exp(sum(total[which] for which in group)) / len(group) for group in groups]
    prompt = Prompt(0, (PROMPT,), "", "task")
    batch = RolloutBatch(
        prompts=(prompt,) * len(rows),
        tokens=tokens,
        response_mask=mask,
        sampled_logprobs=sampled,
        group_id=torch.tensor([number for number, _ in rows]),
        truncated=(False,) * len(rows),
        responses=("",) * len(rows),
        temperature=1.0,
        policy_version=0,
        seed=0,
    )
    return batch, torch.tensor([chance_of_group[number] for number, _ in rows])


def _advantages(rewards: Tensor, group_id: Tensor, config: HybridConfig) -> Tensor:
    """As `Credit.collected`, but for each group as a batch of its own where the baseline is the batch's."""
    from megatron_hybrid.returns.baselines import reward_advantages

    if config.baseline != "reinforce_plus_plus":
        return reward_advantages(rewards, group_id, config.baseline, running_mean=RUNNING_MEAN)
    pairs = rewards.view(-1, 2)
    return torch.cat([reward_advantages(pair, torch.arange(2), config.baseline) for pair in pairs])
