"""Which rollouts an optimizer step learns from: collections of rollouts, cut into mini-batches, gone through in epochs.

    step i (steps done)  ->  collection i // (mini_batches * ppo_epochs), epoch, mini-batch  ->  rows of the replica

One step each on its own rollouts, the default, is one mini-batch and one epoch. Otherwise every epoch deals the groups
of a collection out anew, groups kept whole. Standard library only; the same on every rank that holds the same rows.
"""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Updates:
    """How optimizer steps share rollouts."""

    mini_batches: int
    ppo_epochs: int

    @property
    def steps(self) -> int:
        """Optimizer steps per collection."""
        return self.mini_batches * self.ppo_epochs

    def is_first(self, step: int) -> bool:
        """Whether the step after `step` done ones starts a new collection."""
        return step % self.steps == 0

    def in_first_epoch(self, step: int) -> bool:
        """Whether the step after `step` done ones is the first to learn from its rollouts."""
        return step % self.steps < self.mini_batches

    def prompts_before(self, step: int, prompts_per_step: int) -> int:
        """Prompts that earlier collections have used up."""
        return step // self.steps * self.mini_batches * prompts_per_step

    def rows(self, step: int, *, num_rows: int, group_size: int, seed: int) -> list[int]:
        """Rows of the replica's collection that this step learns from, in order.

        num_rows  of the whole collection, groups of `group_size` neighbours
        """
        collection, update = divmod(step, self.steps)
        epoch, part = divmod(update, self.mini_batches)
        groups = list(range(num_rows // group_size))
        if self.steps > 1:
            random.Random(f"{seed}/{collection}/{epoch}").shuffle(groups)
        size = len(groups) // self.mini_batches
        dealt = groups[part * size : (part + 1) * size]
        return [group * group_size + member for group in dealt for member in range(group_size)]
