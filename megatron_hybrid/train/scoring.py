"""Rewards of a replica's rollouts, made while the teacher reads them.

    rollouts -> one rank of the last stage scores them in a thread -> [wait] -> broadcast over cp and tp -> RewardBatch

What becomes of responses whose reward fails is asked where they are scored (`failed_samples.py`): it may end the run.
The other stages know no rewards, and need none. A rubric that is bound to the main thread is scored there, at once.
Scores are made on the CPU and moved by the thread that waits. The breakdown of several rewards travels with their sum;
of one it would say the same again.
Collectives, on the thread that waits: along each axis a broadcast of 2 b + 1 numbers in fp32, of k > 1 rewards
(2 + k) b + 1, the last of which says whether there are scores; where there are none, the error in their place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hybrid.collectives import from_first
from megatron_hybrid.parallel import ParallelContext
from megatron_hybrid.records import RewardBatch, RolloutBatch
from megatron_hybrid.rewards.rubric import Rubric

Wait = Callable[[], RewardBatch | None]


OnFailed = Callable[[RolloutBatch, Mapping[int, Exception]], None]


def raise_first(rollouts: RolloutBatch, errors: Mapping[int, Exception]) -> None:
    """What is done about rewards that fail unless somebody knows better."""
    raise errors[min(errors)]


def start_scoring(
    rollouts: RolloutBatch, rubric: Rubric, parallel: ParallelContext, *, on_failed: OnFailed = raise_first
) -> Wait:
    """Begins to score; the function returned waits, and gives the rewards on every rank of the last stage.

    It is to be called once, on all ranks of the stage, and raises on all of them what a reward or `on_failed` raised.

    on_failed  told of rows whose reward failed, if there are any, on the rank and in the thread that scores
    """
    if not parallel.is_last_stage:
        return lambda: None
    axes = (parallel.cp, parallel.tp)
    result: Future[RewardBatch] | None = None
    names = rubric.names if len(rubric.names) > 1 else ()
    if all(axis.rank == 0 for axis in axes):
        result = Future()
        if rubric.main_thread_only:
            _score(rollouts, rubric, on_failed, result)
        else:
            # A daemon: a reward that never returns must not keep a process alive whose other threads are done.
            what = (rollouts, rubric, on_failed, result)
            threading.Thread(target=_score_beside, args=what, name="rewards", daemon=True).start()

    def scores() -> Tensor:
        assert result is not None
        scored = result.result()
        failed = torch.zeros_like(scored.rewards) if scored.failed is None else scored.failed.float()
        return torch.stack([scored.rewards, failed, *(scored.breakdown[name] for name in names)])

    def spread() -> Tensor:
        """The scores, on ranks that have none of their own too."""
        shape = (2 + len(names), len(rollouts.prompts))
        sent = torch.zeros(shape[0] * shape[1] + 1, device=rollouts.tokens.device)
        if result is not None:
            try:
                sent[:-1] = scores().flatten()
            except BaseException:  # raised below, on all ranks
                sent[-1] = 1
        for axis in axes:  # along the first axis among those that are first of the second, then along that
            if axis.size > 1:
                dist.broadcast(sent, group=axis.group, group_src=0)
        return from_first(scores, axes) if sent[-1] else sent[:-1].view(shape)

    def wait() -> RewardBatch:
        table = scores() if all(axis.size == 1 for axis in axes) else spread()
        table = table.to(rollouts.tokens.device)
        return RewardBatch(table[0], dict(zip(names, table[2:], strict=True)), failed=table[1] > 0)

    return wait


def _score(rollouts: RolloutBatch, rubric: Rubric, on_failed: OnFailed, result: Future[RewardBatch]) -> None:
    try:
        scored = rubric.score(rollouts)
        if scored.errors:
            on_failed(rollouts, scored.errors)
        result.set_result(scored)
    except Exception as error:  # it belongs to the one who waits
        result.set_exception(error)


def _score_beside(rollouts: RolloutBatch, rubric: Rubric, on_failed: OnFailed, result: Future[RewardBatch]) -> None:
    """As `_score`, in a thread of its own: whatever ends it, nobody else would say so."""
    try:
        _score(rollouts, rubric, on_failed, result)
    except BaseException as error:
        result.set_exception(error)
