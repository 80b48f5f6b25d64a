"""Unbiasedness without sampling: op and credit over every trajectory of a small problem, at its exact probability.

Each trajectory is one response, each of its tokens a row of logits, both weights multiplied by the trajectory's
probability: the summed loss has the expected gradient. It must equal the ground truth, which finite differences
confirmed.
"""

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.ops.api import vocab_parallel_hybrid_loss
from megatron_hybrid.records import TokenStats
from megatron_hybrid.returns.weights import make_weigh
from tests.ops.vectors import VECTORS

PROBLEMS = json.loads((VECTORS / "trajectories.json").read_text())
NAMES = [f"discount_{problem['discount']}_{number}" for number, problem in enumerate(PROBLEMS)]


FEW = [problem for problem in PROBLEMS if len(problem["rewards"]) < 40]
"""Problems small enough to enumerate all pairs of trajectories."""


def prefix(tokens: list[int]) -> str:
    return ",".join(map(str, tokens))


def expected_gradient(
    problem: dict[str, Any],
    *,
    group_size: int = 1,
    baseline: Callable[[Tensor, Tensor], Tensor] | None = None,
    sampler_noise: float = 0.0,
    **change: Any,
) -> Tensor:
    """[states, v] float64: the op's gradient averaged over all trajectories, or over all groups of trajectories.

    baseline       rewards and group_id [b] of all groups' responses to their advantages; None: the rewards
    sampler_noise  nats: another policy draws the trajectories, with logits this far from the student's
    """
    states = {state: index for index, state in enumerate(problem["student_logits"])}
    student, teacher = (
        torch.tensor([problem[f"{who}_logits"][state] for state in states], dtype=torch.float64)
        for who in ("student", "teacher")
    )
    student.requires_grad_()
    noise = torch.randn(student.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    log_mu = (student.detach() + sampler_noise * noise).log_softmax(-1)
    trajectories = [[int(token) for token in key.split(",")] for key in problem["rewards"]]
    state_of_token, target, row, position, probability = [], [], [], [], []
    visits = [[states[prefix(tokens[:t])] for t in range(len(tokens))] for tokens in trajectories]
    chances = [log_mu[v, tokens].sum().exp().item() for v, tokens in zip(visits, trajectories, strict=True)]
    groups = list(itertools.product(range(len(trajectories)), repeat=group_size))
    responses = [(group, which) for group in groups for which in group]
    for number, (group, which) in enumerate(responses):
        tokens, visited = trajectories[which], visits[which]
        # Each of the group's responses is an estimate; the group's is their mean.
        chance = math.prod(chances[i] for i in group) / group_size
        state_of_token += visited
        target += tokens
        row += [number] * len(tokens)
        position += range(len(tokens))
        probability += [chance] * len(tokens)
    rewards = torch.tensor(list(problem["rewards"].values()))
    rewards = rewards[[which for _, which in responses]]
    group_id = torch.arange(len(groups)).repeat_interleave(group_size)
    options = {
        "reward_advantage": rewards if baseline is None else baseline(rewards, group_id),
        "sampled_logprobs": log_mu[state_of_token, target].float(),
        "discount": problem["discount"],
        "future_cost": "closed_form",
        "reward_weight": problem["reward_weight"],
        "imitation_weight": 1.0,
    }
    weigh = make_weigh(
        row_of_token=torch.tensor(row),
        position_of_token=torch.tensor(position),
        num_positions=problem["horizon"],
        **(options | change),
    )
    weight = torch.tensor(probability)

    def expected(stats: TokenStats) -> tuple[Tensor, Tensor]:
        imitation, advantage = weigh(stats)
        return imitation * weight, advantage * weight

    # fp32 into the op; the sum over trajectories back at the states is float64, it is not what is tested.
    out = vocab_parallel_hybrid_loss(
        student[state_of_token].float(), teacher[state_of_token].float(), torch.tensor(target), weigh=expected
    )
    out.loss.sum().backward()
    assert student.grad is not None
    return student.grad


def pairs(problem: dict[str, Any]) -> Tensor:
    """group_id [b] of the responses of all pairs of trajectories."""
    return torch.arange(len(problem["rewards"]) ** 2).repeat_interleave(2)


def truth(problem: dict[str, Any]) -> Tensor:
    return torch.tensor(list(problem["gradient"].values()), dtype=torch.float64)
