"""The numbers of a run as curves: read from its metrics.jsonl, and smoothed for the eye."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_hybrid.train import journal

SMOOTHED_SHARE = 25
"""The smoothing window spans 1/25 of the run: it hides the noise of a step, and keeps a trend of a tenth of the run."""


@dataclass(frozen=True)
class Curves:
    """The numbers of a run by name."""

    train: dict[str, tuple[np.ndarray, np.ndarray]]
    """Name to (steps [n], values [n]); NaN where a step had no finite value."""
    held_out: dict[str, tuple[np.ndarray, np.ndarray]]
    """The same for val/* names."""


def load(path: Path) -> Curves:
    """The curves of a metrics.jsonl."""
    points: dict[str, dict[str, list[tuple[int, float]]]] = {"step": {}, "eval": {}}
    for record in journal.read(path):
        for name, value in record.items():
            if name not in ("step", "kind", "time"):
                points[record["kind"]].setdefault(name, []).append((record["step"], float(value)))

    def curve(pairs: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
        steps, values = np.array([s for s, _ in pairs]), np.array([v for _, v in pairs])
        return steps, np.where(np.isfinite(values), values, np.nan)

    return Curves(*({name: curve(pairs) for name, pairs in points[kind].items()} for kind in ("step", "eval")))


def smoothed(values: np.ndarray) -> np.ndarray:
    """Local linear fit over a centred window [n]: the moving mean of it where the window is whole and nothing missing.

    At the ends, where half the window is missing, a mean would bend a sloping curve; the fitted line does not. NaN
    values are left out; NaN where the window has none but those.
    """
    half = len(values) // (2 * SMOOTHED_SHARE)
    known = np.isfinite(values)
    offset = np.arange(-half, half + 1, dtype=float)

    def moment(x: np.ndarray, power: int) -> np.ndarray:
        return np.correlate(np.pad(x, half), offset**power, mode="valid")

    ones, y = known.astype(float), np.where(known, values, 0.0)
    s0, s1, s2 = (moment(ones, power) for power in range(3))
    t0, t1 = (moment(y, power) for power in range(2))
    determinant = s0 * s2 - s1**2  # an integer: exactly 0 where a window holds one point, which then stands for itself
    line = (t0 * s2 - t1 * s1) / np.where(determinant > 0, determinant, 1.0)
    mean = np.where(s0 > 0, t0 / np.maximum(s0, 1.0), np.nan)
    return np.where(determinant > 0, line, mean)
