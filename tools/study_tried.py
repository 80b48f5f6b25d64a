"""One table of the settings that were tried: a line for each folder of runs, those that failed too.

A line says what its setting changes, where GRPO with its penalty, the best pure method and ours end, and the rollouts
of ours to the levels of both, with the verdicts of `study_goals.py`.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from study_goals import KL, REWARD, beside, references
from study_markdown import between, markdown
from study_outcome import Outcome, load
from study_runs import FULL
from study_settings import Setting

NAME = "tried"
"""Of the markers in the README."""


def write_tried(folders: Sequence[Path], readme: Path | None) -> list[str]:
    """The table, put into the README too; returns its lines."""
    header = ["setting", "seeds", "best pure method", "its reward, KL", "full hybrid's", "rollouts, x", "KL then"]
    lines = markdown(header, [list(_row(folder)) for folder in folders if (folder / "settings.json").exists()])
    if readme is not None:
        between(readme, NAME, lines)
    return lines


def _row(folder: Path) -> Iterator[str]:
    setting = Setting.read(json.loads((folder / "settings.json").read_text()))
    outcomes = load(folder, setting)
    yield f"{folder.name}: " + (", ".join(f"{k} {_plain(v)}" for k, v in setting.differences(Setting()).items()) or "-")
    ours = next((o for o in outcomes if o.name == FULL), None)
    best = next(iter(references(outcomes)), None)
    if ours is None or best is None:
        yield from ["not run"] * 6
        return
    yield str(ours.num_seeds)
    yield f"{best.name}"
    yield _end(best)
    yield _end(ours)
    yield from beside(ours, best)[1:] or ["it gains too little"] * 2


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _end(outcome: Outcome) -> str:
    return f"{outcome.final(REWARD)[0]:.3f}, {outcome.final(KL)[0]:.2f}"
