"""What a reward is, and where an answer stands in a response."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from megatron_hybrid.errors import HybridError
from megatron_hybrid.records import Prompt

Score = float | HybridError
"""Of one response: a number, or why there is none."""


class Reward(Protocol):
    """One response to one number. A reward is maximised; most lie in [0, 1]."""

    name: str
    main_thread_only: bool
    """Whether it works in the main thread only (alarm signals do); other rewards are made while the teacher reads."""

    def score(self, prompt: Prompt, response: str) -> float:
        """Raises RewardError or DataError where there is no number to give."""
        ...


@runtime_checkable
class BatchReward(Protocol):
    """As `Reward`, for one that judges many responses at a time."""

    name: str
    main_thread_only: bool

    def score_all(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Sequence[Score]:
        """A score per response, in order; raises RewardError or ServerError where there is none for any of them."""
        ...


def extract_answer(response: str) -> str:
    """The text between the last pair of <answer> tags; without a pair the whole response; outer white space is cut.

    Never the last line alone: many answers (grids, lists) have several lines. Linear in the length, where the usual
    regular expression takes quadratic time on a response of many opening tags.
    """
    before, closing, _ = response.rpartition("</answer>")
    _, opening, inside = before.rpartition("<answer>")
    return (inside if closing and opening else response).strip()
