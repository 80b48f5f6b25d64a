"""Rewards to advantages: subtract what does not depend on the response, so that its sign says better or worse.

    none   a_i = r_i
    rloo   a_i = r_i - mean of the other rewards of the group          leave-one-out, unbiased (arXiv 2402.14740)
    grpo   a_i = (r_i - mean of the group) / (std of the group + 1e-6)          (arXiv 2402.03300)

std is the sample's (divided by size - 1), as verl and TRL take it. A group is all responses to one prompt, in any
order.

And for the cost-to-go, a baseline of each position:

    none   0
    group  b_{i,t} = mean of C_{j,t} over the other responses j of the group, 0 for those that have ended: unbiased,
           because no other response depends on y_{i,t}
"""

import torch
from torch import Tensor

from megatron_hybrid.errors import ConfigError, ShapeError

_GRPO_EPSILON = 1e-6
"""Added to the std, so that a group of equal rewards gives 0 and not 0/0; verl's and TRL's values are this size too."""


def reward_advantages(rewards: Tensor, group_id: Tensor, baseline: str) -> Tensor:
    """Advantages [b] fp32 of responses with rewards [b] in groups group_id [b]; positive is better than its group.

    Not on the hot path: counting the groups waits for the device.
    """
    if rewards.dim() != 1 or group_id.shape != rewards.shape:
        raise ShapeError(
            f"rewards and group_id must both be [b], one per response; got {list(rewards.shape)} and "
            f"{list(group_id.shape)}."
        )
    if baseline == "none":
        return rewards.detach().float()
    if baseline not in ("rloo", "grpo"):
        raise ConfigError(f"baseline must be one of none, rloo, grpo; got {baseline!r}.")
    _, group, size = torch.unique(group_id, return_inverse=True, return_counts=True)
    if bool((size < 2).any()):
        raise ConfigError(
            f"baseline {baseline!r} compares the responses to one prompt, but a group has a single response: it has "
            "nobody to be compared with. Sample at least 2 per prompt, or use baseline 'none'."
        )
    values = rewards.detach().double()  # a mean of rewards like 0.1 stays exact enough to cancel

    def group_mean(of: Tensor, count: Tensor) -> Tensor:
        return (of.new_zeros(len(size)).index_add_(0, group, of) / count)[group]

    centred = values - group_mean(values, size)
    if baseline == "rloo":
        advantages = centred * (size / (size - 1.0))[group]  # r_i - (sum - r_i)/(n - 1) = (r_i - mean) n/(n - 1)
    else:
        advantages = centred / (group_mean(centred.square(), size - 1).sqrt() + _GRPO_EPSILON)
    return advantages.float()


def cost_baseline(cost_to_go: Tensor, mask: Tensor, group_id: Tensor) -> Tensor:
    """The `group` baseline of a cost-to-go, [b, s] fp32, detached: leave-one-out means at the same position.

    cost_to_go  [b, s] fp32, nats
    mask        [b, s] bool: response tokens. A response that is over costs nothing more: it counts with 0
    group_id    [b] int64: rows of one group answer the same prompt, which ends at the same position in each

    0 where a group has a single row, and off the mask.
    """
    if cost_to_go.shape != mask.shape or group_id.shape != cost_to_go.shape[:1]:
        raise ShapeError(
            f"cost_to_go and mask must be [b, s] and group_id [b]; got {list(cost_to_go.shape)}, {list(mask.shape)} "
            f"and {list(group_id.shape)}."
        )
    same = (group_id[:, None] == group_id[None, :]).float()
    peers = same - torch.eye(len(group_id), device=same.device)
    costs = torch.where(mask, cost_to_go.detach(), 0.0)
    mean = peers @ costs / peers.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(mask, mean, 0.0)
