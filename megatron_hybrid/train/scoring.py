"""Rewards of a replica's rollouts, made while the teacher reads them.

    rollouts -> one rank of the last stage scores them in a thread -> [wait] -> broadcast over cp and tp -> rewards [b]

The other stages know no rewards, and need none. A rubric that is bound to the main thread is scored there, at once.
Collectives: the broadcasts of [b] fp32, on the thread that waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hybrid.parallel import ParallelContext
from megatron_hybrid.records import RolloutBatch
from megatron_hybrid.rewards.rubric import Rubric

Wait = Callable[[], Tensor | None]


def start_scoring(rollouts: RolloutBatch, rubric: Rubric, parallel: ParallelContext) -> Wait:
    """Begins to score; the function returned waits, and gives rewards [b] fp32 on every rank of the last stage.

    It is to be called once, on all ranks of the stage, and raises what a reward raised.
    """
    if not parallel.is_last_stage:
        return lambda: None
    axes = (parallel.cp, parallel.tp)
    result: Future[Tensor] | None = None
    if all(axis.rank == 0 for axis in axes):
        result = Future()
        if rubric.main_thread_only:
            _score(rollouts, rubric, result)
        else:
            # A daemon: a reward that never returns must not keep a process alive whose other threads are done.
            threading.Thread(target=_score, args=(rollouts, rubric, result), name="rewards", daemon=True).start()

    def wait() -> Tensor:
        rewards = torch.empty(len(rollouts.prompts), device=rollouts.tokens.device)
        if result is not None:
            rewards = result.result()
        for axis in axes:  # along the first axis among those that are first of the second, then along that
            if axis.size > 1:
                dist.broadcast(rewards, group=axis.group, group_src=0)
        return rewards

    return wait


def _score(rollouts: RolloutBatch, rubric: Rubric, result: Future[Tensor]) -> None:
    try:
        result.set_result(rubric.score(rollouts).rewards)
    except BaseException as error:  # whatever it is, it belongs to the thread that waits
        result.set_exception(error)
