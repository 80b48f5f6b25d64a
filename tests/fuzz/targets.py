"""What is fuzzed: by name, how a case is drawn and what must hold of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy


@dataclass(frozen=True)
class Target:
    """One thing that is fuzzed."""

    cases: SearchStrategy[Any]
    check: Callable[[Any], None]
    """Raises where a case breaks the contract; returns where it gives a result or one of the package's errors."""


def targets() -> dict[str, Target]:
    """All of them; imports torch."""
    from tests.fuzz import config, maths, readers, servers

    return config.TARGETS | readers.TARGETS | servers.TARGETS | maths.TARGETS


def run(target: Target, cases: int, *, seeded: int | None = None) -> int:
    """Draws so many cases, the same in each run unless seeded; returns how many there were. Raises what was found."""
    count = 0

    def check(case: Any) -> None:
        nonlocal count
        count += 1
        target.check(case)

    bounds = settings(
        max_examples=cases,
        database=None,
        deadline=None,
        derandomize=seeded is None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    drawn = bounds(given(target.cases)(check))
    (drawn if seeded is None else seed(seeded)(drawn))()
    return count
