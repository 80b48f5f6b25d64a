"""What a reward is, and where an answer stands in a response."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from megatron_hybrid.records import Prompt


class Reward(Protocol):
    """One response to one number. A reward is maximised; most lie in [0, 1]."""

    name: str
    main_thread_only: bool
    """Whether it works in the main thread only (alarm signals do); other rewards are made while the teacher reads."""

    def score(self, prompt: Prompt, response: str) -> float: ...


@runtime_checkable
class BatchReward(Protocol):
    """As `Reward`, for one that judges many responses at a time."""

    name: str
    main_thread_only: bool

    def score_all(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """A score per response, in order."""
        ...


def extract_answer(response: str) -> str:
    """The text between the last pair of <answer> tags; without a pair the whole response; outer white space is cut.

    Never the last line alone: many answers (grids, lists) have several lines. Linear in the length, where the usual
    regular expression takes quadratic time on a response of many opening tags.
    """
    before, closing, _ = response.rpartition("</answer>")
    _, opening, inside = before.rpartition("<answer>")
    return (inside if closing and opening else response).strip()
