"""Estimators of the gradient of J = E[ beta KL of the response - lambda reward ], as what the op takes for each token.

Ours are settings of the product, and its own credit makes their weights. Others' are written here, by formula and
source: the sampled token alone, an advantage and no dense term. With c_t = log pi(y_t) - log q(y_t), r the reward, and
b(.) a baseline of `returns/baselines.py`:

    kl_in_reward  A_t = b(lambda r - beta sum_t' c_t')              RLHF, the response as one action (arXiv 1909.08593;
                                                                    without a critic: 2402.14740)
    kl_to_go      A_t = lambda b(r) - beta sum_{t'>=t} gamma^(t'-t) c_t'     the KL placed on its tokens (2203.02155),
                                                                    as PPO's returns without a critic
    k3_loss       A_t = lambda b(r) + beta (q/pi - 1)               the gradient through log pi of the penalty
                                                                    q/pi - log(q/pi) - 1 in the loss (2402.03300, as TRL
                                                                    and verl have it)

and, as a trial of ours for the reward beside the product's dense and future part:

    weighted      A_t = lambda (r_i - b_i),  b_i = sum_j w_j r_j / sum_j w_j over the group's others, w_j = sum_t
                  (1 - pi(y_t))^2: unbiased as RLOO, which has w_j = 1. The baseline of least variance weighs rewards by
                  the squared norm of the score (Greensmith et al. 2004), and that of a token's is about (1 - pi)^2

Most are linear in lambda and beta: lambda * (a part of the reward) + beta * (a part of the KL). So a batch of rollouts
needs the gradient of each PART once, and every lambda follows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.metrics import Metrics
from megatron_hybrid.parallel import ParallelContext
from megatron_hybrid.records import HybridMicrobatch, TokenStats
from megatron_hybrid.returns.baselines import cost_baseline, reward_advantages
from megatron_hybrid.returns.returns_to_go import cost_to_go
from megatron_hybrid.returns.token_table import TokenTable
from megatron_hybrid.schedule.microbatch import CreditFor
from megatron_hybrid.train.credit import Credit, Scored


@dataclass(frozen=True)
class Others:
    """One of the formulas above; fields as in `HybridConfig`."""

    kind: str
    reward_weight: float = 0.0
    imitation_weight: float = 1.0
    baseline: str = "none"
    """Of the reward, and of the KL where it is in the reward."""
    discount: float = 1.0
    cost_baseline: str = "none"

    def credit_for(self, scored: Scored) -> CreditFor:
        """As `Credit.credit_for`, of micro-batches that hold whole groups."""
        rollouts, rewards = scored.rollouts, scored.rewards
        assert rewards is not None, "the rewards come first"

        def credit_for(rows: slice, batch: HybridMicrobatch) -> Callable[[TokenStats], tuple[Tensor, Tensor]]:
            group_id, earned = rollouts.group_id[rows], rewards[rows]
            table = TokenTable(batch.sequence_of_token, batch.position_of_token, len(earned), rollouts.tokens.shape[1])

            def weigh(stats: TokenStats) -> tuple[Tensor, Tensor]:
                return torch.zeros_like(stats.kl), self._advantage(stats, table, earned, group_id)

            return weigh

        return credit_for

    def _advantage(self, stats: TokenStats, table: TokenTable, rewards: Tensor, group_id: Tensor) -> Tensor:
        """A_t [n] of a micro-batch's tokens."""
        cost = stats.log_prob - stats.teacher_log_prob
        whole = table.whole({"cost": cost})
        costs, mask = whole.values["cost"], whole.mask
        if self.kind == "kl_in_reward":
            total = self.reward_weight * rewards - self.imitation_weight * costs.sum(dim=1)
            return reward_advantages(total, group_id, self.baseline)[table.row]
        if self.kind == "weighted":
            surprise = table.whole({"surprise": (1 - stats.log_prob.exp()).square()}).values["surprise"].sum(dim=1)
            return self.reward_weight * weighted_advantages(rewards, group_id, surprise)[table.row]
        reward = self.reward_weight * reward_advantages(rewards, group_id, self.baseline)[table.row]
        if self.kind == "k3_loss":
            return reward + self.imitation_weight * ((-cost).exp() - 1)
        assert self.kind == "kl_to_go", self.kind
        to_go = costs + cost_to_go(costs, mask, self.discount)
        if self.cost_baseline == "group":
            to_go = to_go - cost_baseline(to_go, mask, group_id)
        return reward - self.imitation_weight * table.own(to_go)


def weighted_advantages(rewards: Tensor, group_id: Tensor, weight: Tensor) -> Tensor:
    """r_i minus the weighted mean of the other rewards of its group, [b]; their plain mean where no weight is left."""
    peers = (group_id[:, None] == group_id[None, :]).float().fill_diagonal_(0)
    weight = weight + 1e-6
    return rewards - peers @ (weight * rewards) / (peers @ weight)


Source = HybridConfig | Others
"""Whose credit: the product's with these settings, or another's."""


def credit_of(source: Source, scored: Scored) -> CreditFor:
    """The credit of rollouts that have rewards and no advantages yet."""
    if isinstance(source, Others):
        return source.credit_for(scored)
    credit = Credit(source, ParallelContext())
    return credit.credit_for(credit.collected(scored), step=0, metrics=Metrics())


def product(**settings: object) -> HybridConfig:
    """The product's settings for fresh rollouts of the student itself."""
    return HybridConfig(**{"rollout_correction": "none", "group_size": 2} | settings)  # type: ignore[arg-type]


def reward_alone(baseline: str) -> HybridConfig:
    """lambda 1, beta 0."""
    return product(imitation_weight=0.0, baseline=baseline)


def imitation_alone(discount: float, future_cost: str = "closed_form", cost_baseline: str = "none") -> HybridConfig:
    """lambda 0, beta 1."""
    return product(reward_weight=0.0, discount=discount, future_cost=future_cost, cost_baseline=cost_baseline)


def imitation_part(kind: str, discount: float) -> str:
    """The name of a hybrid's part of the KL: without a future all kinds are the dense term."""
    return f"{kind} {discount:g}" if discount else "dense"


def _hybrid(baseline: str, future: str) -> Callable[[float, float], dict[str, float]]:
    """lambda and gamma to the weights of a reward under this baseline and the imitation of this future cost."""
    return lambda lam, d: {f"reward, {baseline}": lam, imitation_part(future, d): 1}


REFERENCE = {"reward": "reward, rloo", "imitation": "closed, group 1"}
"""The parts that a reference of many batches is made of: unbiased, with the least noise of all."""


def parts(discounts: Sequence[float], lambdas: Sequence[float]) -> dict[str, Source]:
    """All that is differentiated on each batch, by name.

    lambdas  of the one estimator that is not linear in it: a deviation of reward and KL together
    """
    found: dict[str, Source] = {f"reward, {b}": reward_alone(b) for b in ("none", "rloo", "grpo")}
    found["dense"] = imitation_alone(0.0)
    for discount in (d for d in discounts if d):
        found[f"closed {discount:g}"] = imitation_alone(discount)
        found[f"closed, group {discount:g}"] = imitation_alone(discount, cost_baseline="group")
        found[f"sampled {discount:g}"] = imitation_alone(discount, "sampled")
    found["sampled, group 1"] = imitation_alone(1.0, "sampled", "group")
    found["kl now"] = Others("kl_to_go", discount=0.0)
    found["kl to go, group"] = Others("kl_to_go", cost_baseline="group")
    found |= {f"kl total, {b}": Others("kl_in_reward", baseline=b) for b in ("none", "rloo")}
    found |= {f"total, grpo {lam:g}": Others("kl_in_reward", lam, baseline="grpo") for lam in lambdas}
    found["k3"] = Others("k3_loss")
    found["reward, weighted"] = Others("weighted", reward_weight=1.0)
    return found


@dataclass(frozen=True)
class Estimator:
    """One row of the tables, beta 1."""

    label: str
    unbiased: bool
    """Of dJ, at discount 1."""
    of: Callable[[float, float], dict[str, float]]
    """(lambda, discount) to the coefficient of each part."""
    discounted: bool = False
    """Whether the discount makes a difference."""


def _summed(*terms: tuple[str, float]) -> dict[str, float]:
    """Coefficients by name, where a part may occur twice."""
    total: dict[str, float] = {}
    for name, coefficient in terms:
        total[name] = total.get(name, 0.0) + coefficient
    return total


UNIT, UNIT_RLOO, OURS = "KL in the reward", "KL in the reward, RLOO", "ours: closed form, RLOO, group baseline"
WEIGHTED = "ours, reward's baseline weighted"
"""What the goal compares with, its stronger form, and what the product does by default; then a trial."""
ESTIMATORS = {
    e.label: e
    for e in (
        Estimator(UNIT, True, lambda lam, _: {"reward, none": lam, "kl total, none": 1}),
        Estimator(UNIT_RLOO, True, lambda lam, _: {"reward, rloo": lam, "kl total, rloo": 1}),
        Estimator("KL in the reward, GRPO", False, lambda lam, _: {f"total, grpo {lam:g}": 1}),
        Estimator(
            "KL to go in the reward, RLOO",
            True,
            lambda lam, d: _summed(
                ("reward, rloo", lam), ("kl now", 1), (imitation_part("sampled", d), 1), ("dense", -1)
            ),
            discounted=True,
        ),
        Estimator(
            "KL to go in the reward, RLOO, group baseline",
            True,
            lambda lam, _: {"reward, rloo": lam, "kl to go, group": 1},
        ),
        Estimator("GRPO, k3 in the loss", False, lambda lam, _: {"reward, grpo": lam, "k3": 1}),
        Estimator("dense only, RLOO", False, lambda lam, _: {"reward, rloo": lam, "dense": 1}),
        Estimator(
            "paper's hybrid: sampled future",
            True,
            _hybrid("none", "sampled"),
            discounted=True,
        ),
        Estimator(
            "hybrid: sampled future, RLOO",
            True,
            _hybrid("rloo", "sampled"),
            discounted=True,
        ),
        Estimator(
            "hybrid: sampled future, RLOO, group baseline",
            True,
            lambda lam, _: {"reward, rloo": lam, "sampled, group 1": 1},
        ),
        Estimator(
            "ours: closed form, RLOO",
            True,
            _hybrid("rloo", "closed"),
            discounted=True,
        ),
        Estimator(
            "ours, reward without a baseline",
            True,
            _hybrid("none", "closed, group"),
        ),
        Estimator(WEIGHTED, True, _hybrid("weighted", "closed, group")),
        Estimator(OURS, True, _hybrid("rloo", "closed, group"), discounted=True),
    )
}
