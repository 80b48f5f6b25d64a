"""What one rank finds, or what ends it, reaches every rank that waits for it."""

from __future__ import annotations

import torch.distributed as dist

from megatron_hybrid.collectives import from_first
from megatron_hybrid.parallel import GroupView


class Stubborn(Exception):
    """Cannot be made again from what pickle keeps of it."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def met(error: BaseException) -> tuple[str, str]:
    """Type and full text, notes included, of what this rank meets where rank 0 raises `error`."""

    def fail() -> None:
        assert dist.get_rank() == 0, "one rank asks"
        raise error

    try:
        from_first(fail, (GroupView(), GroupView.of(dist.group.WORLD)))
    except BaseException as got:
        return type(got).__name__, "\n".join([str(got), *getattr(got, "__notes__", ())])
    return "nothing", ""


def every_rank_meets() -> list[tuple[str, str]]:
    return [met(error) for error in (KeyError("lost"), SystemExit(3), Stubborn("two", "words"))]


def test_an_error_of_the_first_rank_is_raised_on_all_and_says_where_it_was(rank_pool):
    first, second = rank_pool(2).run(every_rank_meets)
    assert first == second
    assert [name for name, _ in first] == ["KeyError", "SystemExit", "RuntimeError"]
    assert "twowords" in first[2][1]
    assert all("rank 0, for all:" in text and "raise error" in text for _, text in first)
