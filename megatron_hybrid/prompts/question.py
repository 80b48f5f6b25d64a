"""What a source gives, and what makes something a source."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_hybrid.records import RecordedResponse


@dataclass(frozen=True)
class Question:
    """One question in words, before any chat template."""

    text: str
    task: str
    """A reasoning-gym task, or the `task` field of a prompt file."""
    answer: str | None
    entry: dict[str, Any] = field(default_factory=dict)
    """For the reward: `source` says which kind of source made it, `record` is the source's own record."""
    examples: tuple[tuple[str, str], ...] = ()
    """Solved questions (question, answer) shown before this one, to teach a small model the form of an answer."""
    responses: tuple[RecordedResponse, ...] = ()
    """Its group of responses, where a file holds them."""


@dataclass(frozen=True)
class LeftOut:
    """What a file holds that a run was told to leave out, because it cannot be used."""

    file: str
    unit: str
    """lines, rows, or groups."""
    count: int
    of: int
    reasons: tuple[str, ...]
    """The first few, each with its place."""


Refuse = Callable[[Question], str | None]
"""Why a question cannot be used, in words that count alike (`longer than 79 tokens`); None: it can."""


class PromptSource(Protocol):
    """Questions by number. Question `index` never changes, whatever was asked before."""

    @property
    def size(self) -> int | None:
        """Number of questions; None: any index >= 0 gives one."""
        ...

    @property
    def tasks(self) -> frozenset[str]:
        """Every task that its questions can have."""
        ...

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """What its files hold and it does not."""
        ...

    def item(self, index: int) -> Question: ...

    def probe(self, count: int) -> Iterator[Question]:
        """All questions that can be counted, and the first `count` of those that cannot."""
        ...

    def without(self, texts: Collection[str]) -> "PromptSource":
        """The same source, guaranteed to never give a question with one of these texts."""
        ...

    def fitting(self, refuse: Refuse) -> "PromptSource":
        """The same source without the questions that `refuse` has something against; says in the log how many."""
        ...
