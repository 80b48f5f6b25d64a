"""Credit assignment between the op's two passes: per-token stats in, (imitation_weight, advantage) out.

    A_t = lambda * a_b - beta * (C_{t+1} - b_C),      C_{t+1} = sum_{t' > t} gamma^(t' - t) c_t'
    c_t = KL_t (closed_form: its expectation, less noise)   or   log pi(y_t) - log q(y_t) (sampled)

    out: beta * W^dense_t  and  W_t * A_t, the importance weights of `corrections.py`; both 1 on-policy
    beta is that of the response's task where it has a share of its own (`task_filter.py`)

The immediate cost c_t is not in C: the op's dense term, weighted by beta, is its exact gradient. The op sees n response
tokens and knows neither rows nor positions: they travel in here.

C and its group baseline look at later positions alone, so credit can also be asked from the last tokens to the first,
some at a time (`from_the_end`): the fused LM head then needs each token's logits once. Not so under context
parallelism, where other ranks hold later tokens, and where a weight is a product over a response.

Collectives: none at cp = 1; else at most one all-reduce of what has to be summed over a response (`token_table.py`).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.config import FUTURE_COSTS
from megatron_hybrid.errors import ConfigError, ShapeError
from megatron_hybrid.metrics import Metrics
from megatron_hybrid.parallel import Group, GroupView
from megatron_hybrid.records import ReverseWeigh, ReversibleWeigh, TokenStats
from megatron_hybrid.returns import corrections
from megatron_hybrid.returns.baselines import cost_baseline
from megatron_hybrid.returns.corrections import Correction
from megatron_hybrid.returns.returns_to_go import cost_to_go
from megatron_hybrid.returns.token_table import TokenTable, Whole


@dataclass(frozen=True)
class CreditAssignment(ReversibleWeigh):
    """A `Weigh` (see records.py) that can also be asked for the advantage alone. Made by `make_weigh`."""

    reward_advantage: Tensor
    """[b] fp32: a_b of each response, from `baselines.py`."""
    tokens: TokenTable
    """Row and position of this rank's n tokens; distances between positions are what the discount counts."""
    discount: float
    """gamma."""
    future_cost: str
    """closed_form or sampled."""
    reward_weight: float
    """lambda."""
    imitation_weight: float
    """beta."""
    imitation_share: Tensor | None = None
    """[b] fp32: what beta is multiplied by in each response, alike in a group; None: 1."""
    group_id: Tensor | None = None
    """[b] int64: groups for the baseline of the cost-to-go, each of them whole; None: no such baseline."""
    sampled_logprobs: Tensor | None = None
    """[n] fp32: log mu of each token; None: taken as on-policy, nothing is corrected or measured."""
    correction: Correction = Correction()
    metrics: Metrics | None = None
    """Where the mismatch between pi and mu is added at each call; None: nowhere."""

    def __call__(self, stats: TokenStats) -> tuple[Tensor, Tensor]:
        """(imitation_weight, advantage), both [n] fp32, detached; every context-parallel rank must call."""
        values = self._costs(stats)
        if self._spans_responses:
            values["log_ratio"], _ = self._log_ratios(stats)
        return self._weights(stats, self.tokens.whole(values))

    def from_the_end(self) -> ReverseWeigh | None:
        """The same weights from the last rows to the first, where positions ascend over the n tokens; None: every
        weight needs all tokens, or other ranks hold later ones."""
        if self._spans_responses or GroupView.of(self.tokens.cp_group).size > 1:
            return None
        return _FromTheEnd(self)

    def advantage(self, stats: TokenStats) -> Tensor:
        """A_t [n] fp32, before any correction; every context-parallel rank must call."""
        return self._advantage(self.tokens.whole(self._costs(stats)))

    def _imitation(self, stats: TokenStats) -> Tensor:
        return self._beta() * torch.ones_like(stats.log_prob, requires_grad=False)

    def _beta(self) -> Tensor | float:
        """beta, or that of each token [n] fp32."""
        if self.imitation_share is None:
            return self.imitation_weight
        return self.imitation_weight * self.imitation_share[self.tokens.row]

    def _costs(self, stats: TokenStats) -> dict[str, Tensor]:
        """What later tokens cost, by name; nothing where nobody looks ahead."""
        costs = stats.kl if self.future_cost == "closed_form" else stats.log_prob - stats.teacher_log_prob
        if costs.shape != self.tokens.row.shape:
            raise ShapeError(
                f"the op's stats have shape {list(costs.shape)}, the credit was made for "
                f"{list(self.tokens.row.shape)} response tokens: call the op with the rows of those tokens."
            )
        # Weight 0 also keeps an infinite cost from becoming 0 * inf.
        return {"cost": costs} if self.imitation_weight and self.discount else {}

    def _advantage(self, whole: Whole) -> Tensor:
        reward = self.reward_weight * self.reward_advantage[self.tokens.row].detach().float()
        if "cost" not in whole.values:
            return reward
        future = cost_to_go(whole.values["cost"], whole.mask, self.discount)
        if self.group_id is not None:
            future = future - cost_baseline(future, whole.mask, self.group_id)
        # A teacher that forbids what the student said makes infinite costs, in the response or in its group: no finite
        # credit says how bad that was.
        return reward - self._beta() * self.tokens.own(torch.where(future.isfinite(), future, 0.0))

    @property
    def _spans_responses(self) -> bool:
        return self.sampled_logprobs is not None and self.correction.spans_responses

    def _log_ratios(self, stats: TokenStats) -> tuple[Tensor, Tensor]:
        assert self.sampled_logprobs is not None
        return corrections.log_ratios(stats.log_prob, self.sampled_logprobs)

    def _weights(self, stats: TokenStats, whole: Whole) -> tuple[Tensor, Tensor]:
        """Both weights of these tokens, once what is summed over responses is there."""
        imitation, advantage = self._imitation(stats), self._advantage(whole)
        if self.sampled_logprobs is None:
            return imitation, advantage
        return self._corrected(imitation, advantage, whole, *self._log_ratios(stats))

    def _corrected(
        self, imitation: Tensor, advantage: Tensor, whole: Whole, token_log_ratio: Tensor, known: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both weights times the importance of their tokens; measures the mismatch."""
        log_ratio = token_log_ratio
        if self.correction.of_sequences:
            log_ratio = whole.values["log_ratio"].sum(dim=1)[self.tokens.row]
        weights = corrections.sparse_weights(self.correction, log_ratio, advantage)
        if self.correction.prefix:
            prefix = corrections.prefix_log_ratios(whole.values["log_ratio"], whole.mask)
            imitation = imitation * corrections.dense_weights(self.correction, self.tokens.own(prefix))
        if self.metrics is not None:
            corrections.measure(
                self.metrics,
                self.correction,
                token_log_ratio=token_log_ratio,
                known=known,
                log_ratio=log_ratio,
                weights=weights,
            )
        return imitation, weights * advantage


class _FromTheEnd:
    """A `ReverseWeigh`: remembers what later tokens cost. Earlier ones count as 0, where nobody who is asked looks."""

    def __init__(self, credit: CreditAssignment) -> None:
        self.credit = credit
        tokens = credit.tokens
        self.mask = tokens.whole({}).mask
        self.costs = torch.zeros_like(self.mask, dtype=torch.float32)
        torch._assert_async(
            (tokens.position[1:] >= tokens.position[:-1]).all(),
            "credit is asked from the last tokens to the first, but their positions do not ascend: a cost-to-go would "
            "miss what comes later. Sort the tokens by position, as Megatron's flattened [s, b] has them.",
        )

    def __call__(self, stats: TokenStats, rows: Any) -> tuple[Tensor, Tensor]:
        of, tokens = self.credit, self.credit.tokens
        sampled = None if of.sampled_logprobs is None else of.sampled_logprobs[rows]
        here = replace(tokens, row=tokens.row[rows], position=tokens.position[rows])
        part = replace(of, tokens=here, sampled_logprobs=sampled)
        costs = part._costs(stats)
        if costs:
            self.costs[here.row, here.position] = costs["cost"].detach().float()
            costs = {"cost": self.costs}
        return part._weights(stats, Whole(self.mask, costs))


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
    imitation_share: Tensor | None = None,
    group_id: Tensor | None = None,
    sampled_logprobs: Tensor | None = None,
    correction: Correction | None = None,
    cp_group: Group = None,
    metrics: Metrics | None = None,
) -> CreditAssignment:
    """The op's `weigh` for n response tokens of b responses; fields as in `CreditAssignment` and `TokenTable`.

    All tensors on the logits' device. Positions are trusted: finding their maximum would wait for the device. Under
    context parallelism rewards, groups and num_positions are those of whole responses, equal on the ranks of cp_group;
    tokens are this rank's, and may be none.
    """
    if future_cost not in FUTURE_COSTS:
        raise ConfigError(f"future_cost must be one of {', '.join(FUTURE_COSTS)}; got {future_cost!r}.")
    if reward_advantage.dim() != 1 or row_of_token.dim() != 1:
        raise ShapeError(
            f"reward_advantage must be [b] and row_of_token [n], got {list(reward_advantage.shape)} and "
            f"{list(row_of_token.shape)}."
        )
    for name, tensor in (("position_of_token", position_of_token), ("sampled_logprobs", sampled_logprobs)):
        if tensor is not None and tensor.shape != row_of_token.shape:
            raise ShapeError(
                f"{name} must have one entry per response token, {list(row_of_token.shape)} as row_of_token; got "
                f"{list(tensor.shape)}."
            )
    if imitation_share is not None and imitation_share.shape != reward_advantage.shape:
        raise ShapeError(
            f"imitation_share must have one entry per response, {list(reward_advantage.shape)} as reward_advantage; "
            f"got {list(imitation_share.shape)}."
        )
    return CreditAssignment(
        reward_advantage=reward_advantage,
        tokens=TokenTable(row_of_token, position_of_token, len(reward_advantage), num_positions, cp_group),
        discount=discount,
        future_cost=future_cost,
        reward_weight=reward_weight,
        imitation_weight=imitation_weight,
        imitation_share=imitation_share,
        group_id=group_id,
        sampled_logprobs=sampled_logprobs,
        correction=correction or Correction(),
        metrics=metrics,
    )
