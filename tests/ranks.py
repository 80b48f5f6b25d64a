"""The ranks that tests share: one pool of each size serves jobs with a process group and jobs that make their own."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from megatron_hybrid.runtime.spawn import RankPool

TIMEOUT_S = 240
"""Of a job: below pytest's own limit, whose message says less."""


class Ranks:
    """A living `RankPool(size, init=False)`, used as if it had been made with this `init`."""

    def __init__(self, pool: RankPool, init: bool) -> None:
        self._pool, self._init = pool, init

    def run(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> list[Any]:
        """As `RankPool.run`."""
        if self._init:
            return self._pool.run(_in_a_group, function, *args, **kwargs)
        return self._pool.run(function, *args, **kwargs)


def _in_a_group(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """The job in a group of all ranks, which the pool destroys after it."""
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    return function(*args, **kwargs)
