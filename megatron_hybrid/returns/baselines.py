"""Rewards to advantages: subtract what does not depend on the response, so that its sign says better or worse.

    none                 a_i = r_i                                           unbiased (REINFORCE, Williams 1992)
    rloo                 a_i = r_i - mean of the group's other rewards       unbiased (leave-one-out, arXiv 2402.14740)
    running_mean         a_i = r_i - m, the mean of earlier collections      unbiased: this one is not in m
                                                                             (reinforcement comparison, Williams 1992)
    grpo                 a_i = (r_i - mean of the group) / (std of the group + 1e-6)         biased (arXiv 2402.03300)
    reinforce_plus_plus  a_i = (r_i - mean of the batch) / (std of the batch + 1e-6)         biased (arXiv 2501.03262)

Where the bias comes from: a mean over n responses contains r_i itself, which shrinks the expected gradient by exactly
1 - 1/n (n the group's size, or the B responses of the collection on all replicas, where it is next to nothing). The std
depends on r_i too. Over a group it also weighs each prompt by 1 / std, so what is climbed is no longer the mean reward:
with groups of two it is the chance to beat one's own other sample, however small the difference. Over a batch the
scale is nearly a constant, of the size that a learning rate absorbs. No factor is undone here: users know these names.

std is the sample's (divided by size - 1), as verl and TRL take it. A group is all responses to one prompt, in any
order; a batch counts every response once (verl whitens tokens, so there long responses count more).

And for the cost-to-go, a baseline of each position:

    none   0
    group  b_{i,t} = mean of C_{j,t} over the other responses j of the group, 0 for those that have ended: unbiased,
           because no other response depends on y_{i,t}; the leave-one-out of arXiv 2402.14740 at each position

Collectives: one all-gather over dp_group for reinforce_plus_plus (`reward_statistics.py`), none otherwise.
"""

import torch
from torch import Tensor

from megatron_hybrid.config import BASELINES
from megatron_hybrid.errors import ConfigError, ShapeError
from megatron_hybrid.parallel import Group, GroupView
from megatron_hybrid.returns.reward_statistics import batch_statistics

_EPSILON = 1e-6
"""Added to a std, so that equal rewards give 0 and not 0/0; verl's and TRL's values are this size too."""


def reward_advantages(
    rewards: Tensor,
    group_id: Tensor,
    baseline: str,
    *,
    dp_group: Group = None,
    running_mean: float | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """Advantages [b] fp32 of responses with rewards [b] in groups group_id [b]; positive is better than expected.

    dp_group      data-parallel replicas; read by reinforce_plus_plus, which all of them must then call with equal b
    running_mean  m of the baseline of that name: `RunningMean.value` before this collection
    kept          [b] bool: responses that count, whole groups; the others have the advantage 0. None: all

    Not on the hot path: counting the groups waits for the device.

    Raises:
        ShapeError: rewards and groups do not belong together.
        ConfigError: an unknown baseline; a group, or a batch, of a single response that has nobody to be compared with.
    """
    if rewards.dim() != 1 or group_id.shape != rewards.shape:
        raise ShapeError(
            f"rewards and group_id must both be [b], one per response; got {list(rewards.shape)} and "
            f"{list(group_id.shape)}."
        )
    values = rewards.detach().double()  # a mean of rewards like 0.1 stays exact enough to cancel
    if baseline == "none":
        advantages = values
    elif baseline in ("rloo", "grpo"):
        counts = torch.ones_like(values, dtype=torch.bool) if kept is None else kept
        advantages = torch.zeros_like(values)
        advantages[counts] = _within_groups(values[counts], group_id[counts], baseline)
    elif baseline == "reinforce_plus_plus":
        advantages = _within_batch(values, dp_group, kept)
    elif baseline == "running_mean":
        if running_mean is None:
            raise ConfigError(
                "baseline 'running_mean' subtracts the mean of earlier collections, but no running_mean was given: "
                "pass the value of a RunningMean that has not seen this one (0 at the first)."
            )
        advantages = values - running_mean
    else:
        raise ConfigError(f"baseline must be one of {', '.join(BASELINES)}; got {baseline!r}.")
    return (advantages if kept is None else torch.where(kept, advantages, 0.0)).float()


def _within_groups(values: Tensor, group_id: Tensor, baseline: str) -> Tensor:
    _, group, size = torch.unique(group_id, return_inverse=True, return_counts=True)
    if bool((size < 2).any()):
        raise ConfigError(
            f"baseline {baseline!r} compares the responses to one prompt, but a group has a single response: it has "
            "nobody to be compared with. Sample at least 2 per prompt, or use baseline 'none'."
        )
    centred = values - group_mean(values, group, size)
    if baseline == "rloo":
        return centred * (size / (size - 1.0))[group]  # r_i - (sum - r_i)/(n - 1) = (r_i - mean) n/(n - 1)
    return centred / (group_mean(centred.square(), group, size - 1).sqrt() + _EPSILON)


def group_mean(values: Tensor, group: Tensor, size: Tensor) -> Tensor:
    """[b]: for each of the values [b] the sum over its group, divided by `size` [groups]; group [b] counts into it."""
    return (values.new_zeros(len(size)).index_add_(0, group, values) / size)[group]


def _within_batch(values: Tensor, dp_group: Group, kept: Tensor | None) -> Tensor:
    batch = batch_statistics(values, dp_group, kept=kept)
    if len(values) * GroupView.of(dp_group).size < 2:  # of more than one a single one may be kept: its advantage is 0
        raise ConfigError(
            "baseline 'reinforce_plus_plus' compares the responses of a collection, and this one has 1: "
            "the deviation of a single reward does not exist. Raise --global-batch-size, or use baseline "
            "'running_mean'."
        )
    return (values - batch.mean) / (batch.std + _EPSILON)


def cost_baseline(cost_to_go: Tensor, mask: Tensor, group_id: Tensor) -> Tensor:
    """The `group` baseline of a cost-to-go, [b, s] fp32, detached: leave-one-out means at the same position.

    cost_to_go  [b, s] fp32, nats
    mask        [b, s] bool: response tokens. A response that is over costs nothing more: it counts with 0
    group_id    [b] int64: rows of one group answer the same prompt, which ends at the same position in each

    0 where a group has a single row, and off the mask; inf where another row of the group has an infinite cost.

    Raises:
        ShapeError: the shapes do not belong together.
    """
    if cost_to_go.shape != mask.shape or group_id.shape != cost_to_go.shape[:1]:
        raise ShapeError(
            f"cost_to_go and mask must be [b, s] and group_id [b]; got {list(cost_to_go.shape)}, {list(mask.shape)} "
            f"and {list(group_id.shape)}."
        )
    same = (group_id[:, None] == group_id[None, :]).float()
    peers = same - torch.eye(len(group_id), device=same.device)
    costs = torch.where(mask, cost_to_go.detach(), 0.0)
    # Apart from the sum: an infinite cost times the 0 of another group would be NaN, there and not here.
    finite = costs.isfinite()
    mean = peers @ torch.where(finite, costs, 0.0) / peers.sum(dim=1, keepdim=True).clamp(min=1)
    mean = torch.where(peers @ (~finite).float() > 0, torch.inf, mean)
    return torch.where(mask, mean, 0.0)
