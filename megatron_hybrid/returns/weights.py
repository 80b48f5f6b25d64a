"""Credit assignment between the op's two passes: per-token stats in, (imitation_weight, advantage) out.

    A_t = lambda * a_b - beta * (C_{t+1} - b_C),      C_{t+1} = sum_{t' > t} gamma^(t' - t) c_t'
    c_t = KL_t (closed_form: its expectation, less noise)   or   log pi(y_t) - log q(y_t) (sampled)

The immediate cost c_t is not in C: the op's dense term, weighted by beta, is its exact gradient. The op sees n response
tokens and knows neither rows nor positions: they travel in here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hybrid.errors import ConfigError, ShapeError
from megatron_hybrid.records import TokenStats
from megatron_hybrid.returns.baselines import cost_baseline
from megatron_hybrid.returns.returns_to_go import cost_to_go


@dataclass(frozen=True)
class CreditAssignment:
    """A `Weigh` (see records.py) that can also be asked for the advantage alone. Made by `make_weigh`."""

    reward_advantage: Tensor
    """[b] fp32: a_b of each response, from `baselines.py`."""
    row_of_token: Tensor
    """[n] int64: the response each token belongs to."""
    position_of_token: Tensor
    """[n] int64: its position in the row; distances between positions are what the discount counts."""
    num_positions: int
    """s: larger than every position."""
    discount: float
    """gamma."""
    future_cost: str
    """closed_form or sampled."""
    reward_weight: float
    """lambda."""
    imitation_weight: float
    """beta."""
    group_id: Tensor | None = None
    """[b] int64: groups for the baseline of the cost-to-go, each of them whole; None: no such baseline."""

    def __call__(self, stats: TokenStats) -> tuple[Tensor, Tensor]:
        """(imitation_weight, advantage), both [n] fp32, detached."""
        advantage = self.advantage(stats)
        return torch.full_like(advantage, self.imitation_weight), advantage

    def advantage(self, stats: TokenStats) -> Tensor:
        """A_t [n] fp32."""
        reward = self.reward_weight * self.reward_advantage[self.row_of_token].detach().float()
        if self.imitation_weight == 0:
            return reward  # an infinite cost must not become 0 * inf
        return reward - self.imitation_weight * self.future_costs(stats)

    def future_costs(self, stats: TokenStats) -> Tensor:
        """C_{t+1} - b_C [n] fp32, nats; 0 where an infinite cost lies ahead, in the response or in its group."""
        costs = stats.kl if self.future_cost == "closed_form" else stats.log_prob - stats.teacher_log_prob
        if costs.shape != self.row_of_token.shape:
            raise ShapeError(
                f"the op's stats have shape {list(costs.shape)}, the credit was made for "
                f"{list(self.row_of_token.shape)} response tokens: call the op with the rows of those tokens."
            )
        here = (self.row_of_token, self.position_of_token)
        table = costs.new_zeros((len(self.reward_advantage), self.num_positions))
        mask = torch.zeros_like(table, dtype=torch.bool)
        table.index_put_(here, costs.detach())
        mask.index_put_(here, torch.ones_like(costs, dtype=torch.bool))
        future = cost_to_go(table, mask, self.discount)
        if self.group_id is not None:
            future = future - cost_baseline(future, mask, self.group_id)
        # A teacher that forbids what the student said makes infinite costs: no finite credit says how bad that was.
        return torch.where(future.isfinite(), future, 0.0)[here]


def make_weigh(
    *,
    reward_advantage: Tensor,
    row_of_token: Tensor,
    position_of_token: Tensor,
    num_positions: int,
    discount: float,
    future_cost: str,
    reward_weight: float,
    imitation_weight: float,
    group_id: Tensor | None = None,
) -> CreditAssignment:
    """The op's `weigh` for n response tokens of b responses; fields as in `CreditAssignment`.

    All tensors on the logits' device. Positions are trusted: finding their maximum would wait for the device.
    """
    if future_cost not in ("closed_form", "sampled"):
        raise ConfigError(f"future_cost must be one of closed_form, sampled; got {future_cost!r}.")
    if reward_advantage.dim() != 1 or row_of_token.dim() != 1:
        raise ShapeError(
            f"reward_advantage must be [b] and row_of_token [n], got {list(reward_advantage.shape)} and "
            f"{list(row_of_token.shape)}."
        )
    if position_of_token.shape != row_of_token.shape:
        raise ShapeError(
            f"position_of_token must have one entry per response token, {list(row_of_token.shape)} as row_of_token; "
            f"got {list(position_of_token.shape)}."
        )
    return CreditAssignment(
        reward_advantage=reward_advantage,
        row_of_token=row_of_token,
        position_of_token=position_of_token,
        num_positions=num_positions,
        discount=discount,
        future_cost=future_cost,
        reward_weight=reward_weight,
        imitation_weight=imitation_weight,
        group_id=group_id,
    )
