"""Process groups and what they mean for a shard, read once and passed along as one argument.

Only `mcore/groups.py` asks Megatron's global state; every other room is handed these objects.
"""

from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

Group = Any  # torch.distributed.ProcessGroup, or None for one rank: the class is not importable in every torch build


@dataclass(frozen=True)
class GroupView:
    """One process group seen from this rank. `group=None` is a group of one: no collective is ever issued."""

    group: Group = None
    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, group: Group) -> "GroupView":
        """Reads rank and size of `group` (None: a group of one)."""
        if group is None:
            return cls()
        return cls(group, dist.get_rank(group), dist.get_world_size(group))


@dataclass(frozen=True)
class ParallelContext:
    """The axes of one job as this rank sees them."""

    tp: GroupView = field(default_factory=GroupView)
    pp: GroupView = field(default_factory=GroupView)
    dp: GroupView = field(default_factory=GroupView)
    cp: GroupView = field(default_factory=GroupView)
    dp_cp: GroupView = field(default_factory=GroupView)
    """Replicas and their context-parallel slices together: all ranks that hold other tokens."""

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank == self.pp.size - 1
