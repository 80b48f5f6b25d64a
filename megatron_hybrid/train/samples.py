"""Samples of a run to read: one row per response, kept in samples.jsonl, shown in Markdown and on a console.

In: `Sample` rows (one step's, any number of steps in the file). Out: a Markdown page, rich renderables. In colour a
token's shade is its reverse KL to the teacher: what the teacher would have said differently stands out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

KL_SHADES = ((0.1, "black on cyan"), (0.5, "black on yellow"), (2.0, "white on red"))
"""Nats from which a token is shaded: below 0.1 student and teacher agree; at 2 the odds are 7 to 1 on average. Basic
colours: any terminal has them, and they stay apart with a colour-vision deficiency."""


@dataclass(frozen=True)
class Sample:
    """One response as a person wants to see it; filled by the loop."""

    prompt: str
    response: str
    answer: str | None
    """The expected answer, where there is one."""
    reward: float
    kl_per_token: tuple[float, ...] = ()
    """Reverse KL to the teacher of each response token, nats; empty without a teacher."""
    tokens: tuple[str, ...] = ()
    """The response tokens in words, as many as kl_per_token; empty: the response is shown without shades."""
    task: str = ""
    truncated: bool = False
    """The response was cut off at the length limit."""

    def __post_init__(self) -> None:
        if self.tokens and self.kl_per_token and len(self.tokens) != len(self.kl_per_token):
            raise ValueError(
                f"a sample has {len(self.tokens)} tokens but {len(self.kl_per_token)} values of KL: each token needs "
                "its own. Cut both with the same response mask, or leave tokens empty."
            )

    @property
    def kl(self) -> float | None:
        """Mean reverse KL per token, nats; None without a teacher."""
        return sum(self.kl_per_token) / len(self.kl_per_token) if self.kl_per_token else None

    def as_record(self) -> dict[str, Any]:
        """The row as samples.jsonl holds it. KL keeps 5 digits: it was computed in fp32."""
        digits = [float(f"{k:.5g}") for k in self.kl_per_token]
        return asdict(self) | {"kl": None if self.kl is None else float(f"{self.kl:.5g}"), "kl_per_token": digits}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Sample:
        """A row of samples.jsonl; "NaN" and "Infinity" become numbers again."""
        return cls(
            prompt=record["prompt"],
            response=record["response"],
            answer=record["answer"],
            reward=float(record["reward"]),
            kl_per_token=tuple(float(k) for k in record["kl_per_token"]),
            tokens=tuple(record["tokens"]),
            task=record["task"],
            truncated=record["truncated"],
        )


def markdown(step: int, rows: Sequence[Sample]) -> str:
    """The rows of one step as a Markdown page: a table of numbers, then every prompt and response in full."""
    lines = [f"# Samples after step {step}", ""]
    lines += ["| # | task | reward | KL, nats/token | tokens | expected answer |", "|--:|:--|--:|--:|--:|:--|"]
    for i, row in enumerate(rows, start=1):
        answer = _one_line(row.answer or "").replace("|", "\\|")
        lines.append(f"| {i} | {row.task} | {row.reward:.3g} | {_kl(row)} | {_length(row)} | {answer} |")
    for i, row in enumerate(rows, start=1):
        lines += ["", f"## {i}. {row.task or 'sample'}: reward {row.reward:.3g}", ""]
        lines += ["Prompt", "", *_fenced(row.prompt), "", f"Response{_cut(row)}", "", *_fenced(row.response)]
        if row.answer is not None:
            lines += ["", "Expected", "", *_fenced(row.answer)]
        if row.kl_per_token:
            lines += ["", f"KL per token, nats: {' '.join(f'{k:.2g}' for k in row.kl_per_token)}"]
    return "\n".join(lines) + "\n"


def table(step: int, rows: Sequence[Sample], *, limit: int = 4) -> Table:
    """The first rows of one step, a few lines each, for a glance at the console."""
    view = Table(title=f"samples after step {step}", title_justify="left", show_lines=True, expand=True)
    for name, ratio in (("prompt", 4), ("response", 5), ("expected", 2)):
        view.add_column(name, ratio=ratio, overflow="fold")
    for name in ("reward", "KL/tok"):
        view.add_column(name, justify="right", no_wrap=True)
    for row in rows[:limit]:
        view.add_row(
            Text(_shortened(row.prompt, 160)),
            Text(_shortened(row.response, 200) + _cut(row)),
            Text(_shortened(row.answer or "", 60)),
            f"{row.reward:.3g}",
            _kl(row),
        )
    return view


def panel(step: int, row: Sample) -> Panel:
    """One sample in full; each token shaded by its KL where both are known."""
    body = Text()
    if row.tokens and row.kl_per_token:
        for token, kl in zip(row.tokens, row.kl_per_token, strict=True):
            body.append(token, style=shade(kl))
    else:
        body.append(row.response)
    body.append(_cut(row), style="dim")
    parts = [Text(row.prompt, style="dim"), Text(), body]
    if row.answer is not None:
        parts += [Text(), Text.assemble(("expected  ", "dim"), row.answer)]
    if row.kl_per_token:
        numbers = Text.assemble(("KL, nats  ", "dim"))
        for kl in row.kl_per_token:
            numbers.append(f"{kl:.2g}", style=shade(kl)).append(" ")
        parts += [Text(), numbers]
    title = Text(f"step {step}  {row.task}  reward {row.reward:.3g}  KL {_kl(row)} nats/token", style="bold")
    return Panel(Group(*parts), title=title, title_align="left", border_style="green" if row.reward > 0 else "red")


def legend() -> Text:
    """What the shades mean."""
    text = Text("KL to the teacher, nats: ")
    for bound, style in KL_SHADES:
        text.append(f" {bound:g} and more ", style=style).append(" ")
    return text


def shade(kl: float) -> str:
    """The rich style of a token with this KL; NaN takes the strongest."""
    style = ""
    for bound, candidate in KL_SHADES:
        if not kl < bound:
            style = candidate
    return style


def _kl(row: Sample) -> str:
    return "-" if row.kl is None else f"{row.kl:.3g}"


def _length(row: Sample) -> str:
    return str(len(row.kl_per_token) or len(row.tokens) or "-")


def _cut(row: Sample) -> str:
    return " [cut off at the length limit]" if row.truncated else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _shortened(text: str, limit: int) -> str:
    text = _one_line(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _fenced(text: str) -> list[str]:
    """A code block whose fence is longer than any run of backticks inside: a model's answer cannot close it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}text", text, fence]
