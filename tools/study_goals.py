"""What the study of training says of its goals: rollouts until a reward is there, and the KL at that moment.

The goal: most of what a reference gains, with half of its rollouts, at no higher KL to the teacher. A level is `GAIN`
of the gain of the reference, mean over its seeds; each seed of a method is compared with the same seed of the
reference, as both begin with the same questions. A goal is met where every seed meets it, missed where none does, else
open.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from study_markdown import markdown
from study_runs import GRPO

if TYPE_CHECKING:
    from study_outcome import Outcome

REWARD, KL = "val/score", "val/kl_per_response"
GAIN = 0.9
"""Share of a reference's gain that is to be reached: its very end would be a matter of noise."""
LEAST = 0.05
"""A gain in reward that is more than noise."""
GOAL = 0.5
"""Share of the reference's rollouts."""


def level(reference: "Outcome") -> float | None:
    """The reward to reach; None where the reference itself gains next to nothing."""
    start, end = float(reference.values[REWARD][:, 0].mean()), reference.final(REWARD)[0]
    return start + GAIN * (end - start) if end - start >= LEAST else None


def references(outcomes: Sequence["Outcome"]) -> list["Outcome"]:
    """What ours is compared with: GRPO with its penalty, the best of the pure methods, and every other hybrid."""
    pure = [o for o in outcomes if o.method.pure]
    best = max(pure, key=lambda o: o.final(REWARD)[0], default=None)
    grpo = [o for o in pure if o.name == GRPO]
    others = [o for o in outcomes if not o.method.pure and not o.method.ours]
    return [*([best] if best else []), *(o for o in grpo if o is not best), *others]


def needed(outcomes: Sequence["Outcome"]) -> Iterator[str]:
    """Rollouts of every method to the levels of the best pure method and of GRPO, with the KL at that moment."""
    columns: list[list[str]] = []
    for reference in (o for o in references(outcomes) if o.method.pure):
        target = level(reference)
        if target is None:
            yield f"`{reference.name}` gains less than {LEAST} in reward: rollouts to reach it would count noise."
            yield ""
            continue
        unit = float(np.mean(reference.reaches(REWARD, target)))
        cells = [_reached(o, target, unit) for o in outcomes]
        columns.append(
            [f"rollouts to reward {target:.3f}, {GAIN:.0%} of the gain of `{reference.name}`; KL then", *cells]
        )
    if columns:
        headers, *rows = zip(*columns, strict=True)
        yield from markdown(["", *headers], [[o.name, *row] for o, row in zip(outcomes, rows, strict=True)])


def _reached(outcome: "Outcome", target: float, unit: float) -> str:
    """Rollouts of a method until the target, times the reference's, and the KL at that moment."""
    rollouts = np.array(outcome.reaches(REWARD, target))
    count = int(np.isfinite(rollouts).sum())
    if count < len(rollouts):
        return f"{count} of {len(rollouts)} seeds reach it"
    times = f" ({rollouts.mean() / unit:.2f} x)" if np.isfinite(unit) and unit else ""
    return f"{rollouts.mean():.0f}{times}; {np.mean(outcome.at(KL, rollouts)):.2f} nats"


def goals(outcomes: Sequence["Outcome"]) -> Iterator[str]:
    """Each of ours beside each reference: met, missed or open."""
    rows = [
        [f"{o.name}, beside `{reference.name}`", *cells]
        for reference in references(outcomes)
        for o in outcomes
        if o.method.ours and (cells := beside(o, reference))
    ]
    if rows:
        header = [f"goal: {GAIN:.0%} of the gain with at most {GOAL:g} x the rollouts, at no higher KL"]
        yield from markdown([*header, "reward", "rollouts, x", "KL then, nats more"], rows)


def beside(ours: "Outcome", reference: "Outcome") -> list[str]:
    """The level, the share of the reference's rollouts, and the KL then; empty where there is nothing to compare."""
    target = level(reference)
    if target is None or ours.num_seeds != reference.num_seeds:
        return []
    # A seed of the reference that stays below counts as if it arrived at its end: to its favour.
    theirs = np.minimum(reference.reaches(REWARD, target), reference.rollouts[-1])
    mine = np.array(ours.reaches(REWARD, target))
    times = mine / theirs
    cells = [f"{target:.3f}", f"{_range(times)}, {verdict(times <= GOAL)}"]
    if not np.isfinite(mine).all():
        return [*cells, "not there"]
    kl_then = np.array(ours.at(KL, mine)) - np.array(reference.at(KL, theirs))
    return [*cells, f"{_range(kl_then)}, {verdict(kl_then <= 0)}"]


def verdict(holds: np.ndarray) -> str:
    """Of a goal that some seeds meet."""
    return "met" if holds.all() else "open" if holds.any() else "missed"


def _range(values: np.ndarray) -> str:
    """Mean, and the least and the largest over seeds."""
    if not np.isfinite(values).all():
        return f"{int(np.isfinite(values).sum())} of {len(values)} seeds reach it"
    return f"{values.mean():.2f} [{values.min():.2f}, {values.max():.2f}]"
