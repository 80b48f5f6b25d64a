"""Several ranks in one process, for tests too many to start processes for: ranks run one after the other, and again.

A rank runs until it asks for a collective whose answer is not known yet; once all of them have asked, their values are
the answer, and every rank starts anew. So what runs must be deterministic, and cheap enough for one run per collective.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor


class _Asked(BaseException):
    """Carries a rank's values out to where all of them meet; no code under test catches it."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = values


def run_ranks[T](ranks: int, run: Callable[[int, Any], T]) -> list[T]:
    """`run(rank, group)` for every rank, in rank order; None is the group of a single rank."""
    if ranks == 1:
        return [run(0, None)]
    answers: list[list[Tensor]] = []
    while True:
        results: list[T] = []
        asked: list[Tensor] = []
        for rank in range(ranks):
            try:
                results.append(_run_one(rank, ranks, answers, run))
            except _Asked as question:
                asked.append(question.values)
        if not asked:
            return results
        assert not results, "some ranks asked for a collective that others never reach: on real ranks they would hang"
        answers.append(asked)


def _run_one[T](rank: int, ranks: int, answers: list[list[Tensor]], run: Callable[[int, Any], T]) -> T:
    pending = iter(answers)

    def all_gather_into_tensor(out: Tensor, values: Tensor, group: Any) -> None:
        answer = next(pending, None)
        if answer is None:
            raise _Asked(values.clone())
        for part, theirs in zip(out.chunk(ranks), answer, strict=True):
            part.copy_(theirs)

    with (
        mock.patch.object(dist, "get_rank", lambda group: rank),
        mock.patch.object(dist, "get_world_size", lambda group: ranks),
        mock.patch.object(dist, "all_gather_into_tensor", all_gather_into_tensor),
    ):
        return run(rank, object())
