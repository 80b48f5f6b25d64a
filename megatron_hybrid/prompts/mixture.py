"""Several sources as one without end, in given shares.

Positions are dealt out in blocks of 1000: every block holds each source exactly as often as its share says (to 1/1000,
largest remainders first), in an order of the block's own. So question p is a pure function of (seed, p): a run resumes
without a state, and what a source gives next does not depend on what the others gave. Each source goes through its own
order (`order.py`), a small file through many epochs beside a large one.
"""

import random
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.prompts.order import Order
from megatron_hybrid.prompts.question import PromptSource, Question, Refuse

BLOCK = 1000


class MixtureSource:
    """One mixture.

    Args:
        parts: (share, source); shares are above 0 and need not add up to 1.
    """

    size: int | None = None

    def __init__(self, parts: Sequence[tuple[float, PromptSource]], *, seed: int) -> None:
        self.parts = tuple(parts)
        self.tasks = frozenset[str]().union(*(source.tasks for _, source in parts))
        self.left_out = tuple(each for _, source in parts for each in source.left_out)
        self._seed = seed
        self._counts = _counts([share for share, _ in parts])
        self._orders = [Order(source, seed=f"{seed}/{number}") for number, (_, source) in enumerate(parts)]
        self._block = lru_cache(maxsize=2)(self._deal)

    def item(self, index: int) -> Question:
        block, place = divmod(index, BLOCK)
        part, earlier = self._block(block)[place]
        return self._orders[part].question(block * self._counts[part] + earlier)

    def probe(self, count: int) -> Iterator[Question]:
        for _, source in self.parts:
            yield from source.probe(count)

    def without(self, texts: Collection[str]) -> "MixtureSource":
        return MixtureSource([(share, source.without(texts)) for share, source in self.parts], seed=self._seed)

    def fitting(self, refuse: Refuse) -> "MixtureSource":
        return MixtureSource([(share, source.fitting(refuse)) for share, source in self.parts], seed=self._seed)

    def _deal(self, block: int) -> list[tuple[int, int]]:
        """For each place of a block: which source, and how many of its questions the block has before."""
        parts = [part for part, count in enumerate(self._counts) for _ in range(count)]
        random.Random(f"{self._seed}/block/{block}").shuffle(parts)
        dealt, seen = [], [0] * len(self._counts)
        for part in parts:
            dealt.append((part, seen[part]))
            seen[part] += 1
        return dealt


def _counts(shares: Sequence[float]) -> list[int]:
    """How often each source is in a block."""
    exact = [BLOCK * share / sum(shares) for share in shares]
    counts = [int(number) for number in exact]
    by_remainder = sorted(range(len(exact)), key=lambda part: counts[part] - exact[part])
    for part in by_remainder[: BLOCK - sum(counts)]:
        counts[part] += 1
    if 0 in counts:
        raise ConfigError(
            f"a source of the prompts has a share of {min(exact) / BLOCK:.2g}, and shares are kept to 1/{BLOCK}: it "
            "would never be asked. Give it more, or leave it out."
        )
    return counts
