"""What a reward is compared with beyond its own group: the whole collection, or those before it.

    rewards [b] of this replica -> BatchStatistics of all replicas' rewards          one all-gather of [b] fp64
    rewards of collection 1, 2, ..   -> RunningMean, the exponential mean of their means     the same, once per update

The gathered rewards are sorted before they are summed, so a batch has the same statistics, bit for bit, however it is
split over replicas.
A collection is what is sampled at once; several optimizer steps may learn from it.
Not here: advantages (`baselines.py`). A running mean is updated after a collection's advantages are taken: before, it
would contain them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from megatron_hybrid.collectives import gather_ranks
from megatron_hybrid.errors import ConfigError
from megatron_hybrid.parallel import Group


@dataclass(frozen=True)
class BatchStatistics:
    """Of all rewards of one collection, on all data-parallel replicas; equal on each of them."""

    count: int
    """B: responses."""
    total: float
    """Sum of their rewards."""
    std: float
    """Sample deviation (divided by B - 1); 0 for a single response."""

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0


def batch_statistics(rewards: Tensor, dp_group: Group = None, *, kept: Tensor | None = None) -> BatchStatistics:
    """Statistics of rewards [b], b being the same on every rank of dp_group; waits for the device.

    kept  [b] bool: rewards that count; None: all
    """
    own = rewards.detach().double()
    gathered = gather_ranks(own if kept is None else torch.where(kept, own, torch.nan), dp_group).flatten()
    values = gathered[~gathered.isnan()].sort().values
    count, total = len(values), float(values.sum())
    if count < 2:
        return BatchStatistics(count, total, 0.0)
    return BatchStatistics(count, total, float(((values - total / count).square().sum() / (count - 1)).sqrt()))


@dataclass(frozen=True)
class RunningMean:
    """Exponential mean of the means of earlier collections; frozen, `updated` gives the next one.

    Like Adam's moments it starts at 0 and is divided by the weight it has gathered: after one collection the value is
    its mean, not (1 - decay) of it.
    """

    decay: float
    """What a collection keeps of those before it, in [0, 1)."""
    mean: float = 0.0
    """Sum of (1 - decay) decay^age times the batch mean of that age."""
    weight: float = 0.0
    """Sum of the same factors: 1 - decay^collections."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ConfigError(f"the decay of a running mean must lie in [0, 1), got {self.decay}: at 1 it never moves.")

    @property
    def value(self) -> float:
        """The mean; 0 before any collection."""
        return self.mean / self.weight if self.weight else 0.0

    def updated(self, rewards: Tensor, *, dp_group: Group = None, kept: Tensor | None = None) -> Self:
        """With one more collection, rewards [b] on each rank of dp_group; without one that is kept unchanged."""
        batch = batch_statistics(rewards, dp_group, kept=kept)
        if not batch.count:
            return self
        new = 1.0 - self.decay
        return replace(self, mean=self.decay * self.mean + new * batch.mean, weight=self.decay * self.weight + new)

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps, as plain numbers."""
        return {"mean": self.mean, "weight": self.weight}

    @classmethod
    def from_state(cls, decay: float, state: Mapping[str, float]) -> Self:
        """Goes on exactly where `state` was taken, at a decay that may have changed since."""
        return cls(decay, mean=state["mean"], weight=state["weight"])
