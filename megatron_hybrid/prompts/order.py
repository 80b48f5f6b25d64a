"""The order in which a source is asked without end: a pure function of (seed, position).

Position p of a finite source is entry p mod n of epoch p div n; each epoch is a new permutation. An endless source has
no order of its own: position p is its question p.
"""

import random
from functools import lru_cache

from megatron_hybrid.prompts.question import PromptSource, Question


class Order:
    """One source, asked by position."""

    def __init__(self, source: PromptSource, *, seed: int | str) -> None:
        self._source = source
        self._seed = seed
        self._permutation = lru_cache(maxsize=2)(self._shuffle)  # a draw may straddle two epochs

    def question(self, position: int) -> Question:
        if self._source.size is None:
            return self._source.item(position)
        epoch, place = divmod(position, self._source.size)
        return self._source.item(self._permutation(epoch)[place])

    def _shuffle(self, epoch: int) -> list[int]:
        assert self._source.size is not None
        order = list(range(self._source.size))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)  # a text seed is hashed with SHA-512: no epoch overlaps
        return order
