"""What every test gets: fixed seeds, and ranks that live as long as the session.

A rank costs 8 s of CPU and 0.75 GB, so tests of one size share them:

    def test_two_ranks_agree(rank_pool):
        first, second = rank_pool(2).run(job)          # a gloo group is there
        rank_pool(2, init=False).run(job)              # the job lets Megatron make its groups
"""

import random
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from megatron_hybrid.runtime.spawn import RankPool
from tests.ranks import TIMEOUT_S, Ranks

_MOST_RANKS = 8
"""Ranks alive at once, over all pools: 8 take 6 GB. Pools of 1, 2 and 4 fit together and live to the end."""


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """Every test starts from the same generators, whichever tests ran before it."""
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _patches_undone() -> Iterator[None]:
    """A test that enables the CPU stand-ins and fails half-way must not hand them to the next one."""

    def enabled() -> bool:
        cpu = sys.modules.get("megatron_hybrid.runtime.cpu")
        return cpu is not None and cpu.is_enabled()

    before = enabled()
    yield
    if enabled() and not before:
        sys.modules["megatron_hybrid.runtime.cpu"].disable()


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[Callable[..., Ranks]]:
    """`rank_pool(size, init=True)`: living ranks, started on first use and anew after a job that failed."""
    pools: dict[int, RankPool] = {}

    def get(size: int, *, init: bool = True) -> Ranks:
        pool = pools.pop(size, None)
        if pool is None or not pool.alive:
            for kept in {key: kept for key, kept in pools.items() if not kept.alive}:
                del pools[kept]
            while pools and size + sum(pools) > _MOST_RANKS:
                pools.pop(next(iter(pools))).close()  # the one that was used longest ago
            pool = RankPool(size, init=False, timeout_s=TIMEOUT_S)
        pools[size] = pool
        return Ranks(pool, init)

    yield get
    for pool in pools.values():
        pool.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that asks for ranks is marked `procs` by itself: `-m 'not procs'` is the quick round."""
    for item in items:
        if "rank_pool" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.procs)
