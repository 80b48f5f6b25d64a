"""How the studies write: tables in Markdown, between two markers of a README."""

from collections.abc import Sequence
from pathlib import Path


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; the first column is text, the others numbers."""
    lines = ["| " + " | ".join(header) + " |", "| :-- |" + " --: |" * (len(header) - 1)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def between(path: Path, name: str, lines: list[str]) -> None:
    """Puts the lines between `<!-- name -->` and `<!-- end of name -->` of a file."""
    first, last = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    text = path.read_text(encoding="utf-8")
    if text.count(first) != 1 or text.count(last) != 1:
        raise SystemExit(f"study: {path} needs the line {first.strip()} and, behind it, {last}, once each.")
    before, rest = text.split(first)
    path.write_text(before + first + "\n".join(lines).rstrip() + "\n" + last + rest.split(last)[1], encoding="utf-8")
