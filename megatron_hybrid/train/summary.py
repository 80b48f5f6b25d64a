"""Held-out numbers before and after a run, side by side.

In: two mappings of val/* names to floats. Out: `Change` rows, shown as a rich table or Markdown. The change in % is
100 * (after - before) / |before|; there is none where before is 0 or either number is missing or not finite.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

TITLES = {
    "val/kl": "held-out reverse KL, nats/token",
    "val/kl_per_response": "held-out reverse KL, nats/response",
    "val/score": "held-out reward",
    "val/entropy": "entropy, nats/token",
    "val/response_length": "response length, tokens",
}
TASK_PREFIX = "val/score/"
HEADER = ("", "before", "after", "change")


@dataclass(frozen=True)
class Change:
    """One number before and after."""

    name: str
    title: str
    before: float | None
    after: float | None

    @property
    def percent(self) -> float | None:
        """Relative change in %, signed; None where it means nothing."""
        if not self.before or self.after is None or not (math.isfinite(self.before) and math.isfinite(self.after)):
            return None
        return 100 * (self.after - self.before) / abs(self.before)

    def as_record(self) -> dict[str, Any]:
        return {"before": self.before, "after": self.after, "change_percent": self.percent}

    def cells(self) -> tuple[str, str, str, str]:
        """The row as text."""
        change = "-" if self.percent is None else f"{self.percent:+.1f} %"
        return self.title, _text(self.before), _text(self.after), change


def compare(before: Mapping[str, float], after: Mapping[str, float]) -> list[Change]:
    """One row per name in either mapping: KL, reward, reward per task, entropy, length, then the rest."""
    names = {**before, **after}
    tasks = sorted(n for n in names if n.startswith(TASK_PREFIX))
    ordered = ["val/kl", "val/kl_per_response", "val/score", *tasks, "val/entropy", "val/response_length"]
    ordered = [n for n in ordered if n in names] + [n for n in names if n not in ordered]
    return [Change(n, _title(n), before.get(n), after.get(n)) for n in ordered]


def table(changes: Sequence[Change]) -> Table:
    """The rows for a console."""
    view = Table(title="before and after", title_justify="left")
    for i, name in enumerate(HEADER):
        view.add_column(name, justify="left" if i == 0 else "right", no_wrap=i > 0)
    for change in changes:
        view.add_row(*change.cells())
    return view


def markdown(changes: Sequence[Change]) -> str:
    """The rows as a Markdown table."""
    rows = [HEADER, (":--", "--:", "--:", "--:"), *(change.cells() for change in changes)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _title(name: str) -> str:
    if name.startswith(TASK_PREFIX):
        return f"held-out reward, {name.removeprefix(TASK_PREFIX)}"
    return TITLES.get(name, name)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
