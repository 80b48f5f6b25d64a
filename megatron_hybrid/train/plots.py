"""Figures of a run from its metrics.jsonl, one PNG per question and an overview of all: `draw(run_dir)`.

Raw steps stay visible, pale, behind a local linear fit; held-out evaluations are points on top. Importing this file
imports matplotlib (so import it late); no pyplot, so neither the backend nor the settings of a host program change.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_hybrid.train.curves import Curves, load, smoothed

# Okabe and Ito's palette: told apart with any of the common colour-vision deficiencies, and in grey.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
GREY = "#8C8C8C"

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "white",
    "savefig.dpi": 200,
}

STAGES = (("rollout", BLUE), ("teacher", ORANGE), ("reward", PURPLE), ("credit", GREY), ("update", GREEN))


def draw(run_dir: str | Path) -> list[Path]:
    """Draws plots/*.png of a run folder and returns their paths; none where no step was recorded yet.

    A panel of which the run recorded nothing gets no file of its own, and says so in the overview.
    """
    curves = load(Path(run_dir) / "metrics.jsonl")
    if not curves.train and not curves.held_out:
        return []
    folder = Path(run_dir) / "plots"
    folder.mkdir(exist_ok=True)
    paths = []
    with matplotlib.rc_context(STYLE):
        overview = Figure(figsize=(12, 6.4), layout="constrained")
        for (name, panel), overview_ax in zip(PANELS.items(), overview.subplots(2, 3).flat, strict=True):
            if not panel(overview_ax, curves):
                _say_nothing_recorded(overview_ax)
                continue
            single = Figure(figsize=(5.2, 3.4), layout="constrained")
            panel(single.subplots(), curves)
            paths.append(_save(single, folder / f"{name}.png"))
        paths.append(_save(overview, folder / "overview.png"))
    return paths


def _reward(ax: Axes, curves: Curves) -> bool:
    _label(ax, "Reward", "reward per response")
    drawn = _line(ax, curves, "critic/score/mean", BLUE, "training")
    return _points(ax, curves, "val/score", VERMILION) or drawn


def _kl(ax: Axes, curves: Curves) -> bool:
    _label(ax, "Reverse KL to the teacher", "KL, nats per token")
    drawn = _line(ax, curves, "actor/kl_loss", BLUE, "training")
    drawn = _points(ax, curves, "val/kl", VERMILION) or drawn
    ax.set_ylim(bottom=0)
    return drawn


def _gradients(ax: Axes, curves: Curves) -> bool:
    _label(ax, "Gradient norms", "norm (log scale)")
    ax.set_yscale("log")
    drawn = [
        _line(ax, curves, "actor/grad_norm", GREY, "whole, in parameters", positive=True),
        _line(ax, curves, "actor/grad_norm_dense", BLUE, "dense (imitation), in logits", positive=True),
        _line(ax, curves, "actor/grad_norm_sparse", ORANGE, "sparse (policy), in logits", positive=True),
    ]
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** 0.3)  # room for the legend
    return any(drawn)


def _entropy(ax: Axes, curves: Curves) -> bool:
    _label(ax, "Entropy of the student", "entropy, nats per token")
    drawn = _line(ax, curves, "actor/entropy", BLUE, "training")
    drawn = _points(ax, curves, "val/entropy", VERMILION) or drawn
    ax.set_ylim(bottom=0)
    return drawn


def _length(ax: Axes, curves: Curves) -> bool:
    _label(ax, "Response length", "tokens")
    if {"response_length/min", "response_length/max"} <= curves.train.keys():
        steps, low = curves.train["response_length/min"]
        _, high = curves.train["response_length/max"]
        if len(low) == len(high):
            ax.fill_between(steps, low, high, color=BLUE, alpha=0.10, linewidth=0, label="shortest to longest")
    drawn = _line(ax, curves, "response_length/mean", BLUE, "training, mean")
    drawn = _points(ax, curves, "val/response_length", VERMILION) or drawn
    ax.set_ylim(0, 1.35 * ax.get_ylim()[1])  # room for the legend, which has no other place than on the band
    return drawn


def _timing(ax: Axes, curves: Curves) -> bool:
    """Shares of the stages; what the whole step took beyond them is `other`."""
    _label(ax, "Where the time goes", "share of a step, %")
    found = [(stage, colour) for stage, colour in STAGES if f"timing_s/{stage}" in curves.train]
    if not found:
        return False
    times = [_by_step(curves, f"timing_s/{stage}") for stage, _ in found]
    steps = sorted(set.union(*map(set, times)))
    seconds = np.array([[of_stage.get(step, 0.0) for step in steps] for of_stage in times])
    seconds = np.maximum([smoothed(row) for row in np.nan_to_num(seconds)], 0.0)
    whole = _by_step(curves, "timing_s/step")
    step_s = smoothed(np.array([whole.get(step, np.nan) for step in steps]))
    other = np.maximum(np.nan_to_num(step_s - seconds.sum(axis=0)), 0.0)
    total = np.maximum(seconds.sum(axis=0) + other, 1e-12)
    rows, labels, colours = list(100 * seconds / total), [s for s, _ in found], [c for _, c in found]
    if (other > 0.005 * total).any():  # below half a percent it is rounding, not a stage
        rows, labels, colours = [*rows, 100 * other / total], [*labels, "other"], [*colours, "#C9C9C9"]
    where: list[float] = list(steps)
    if len(steps) == 1:  # an area needs a width
        where, rows = [steps[0] - 0.5, steps[0] + 0.5], [np.repeat(row, 2) for row in rows]
    ax.stackplot(where, rows, labels=labels, colors=colours, linewidth=0.4, edgecolor="white")
    ax.set_ylim(0, 100)
    ax.margins(x=0)
    handles, names = ax.get_legend_handles_labels()
    # Beside the area, top entry on top of the stack: over it the text would be unreadable.
    ax.legend(handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.0)
    return True


PANELS: dict[str, Callable[[Axes, Curves], bool]] = {
    "reward": _reward,
    "kl": _kl,
    "gradient_norms": _gradients,
    "entropy": _entropy,
    "response_length": _length,
    "timing": _timing,
}
"""File name to what draws it on given axes and says whether there was anything to draw."""


def _by_step(curves: Curves, name: str) -> dict[int, float]:
    steps, values = curves.train.get(name, (np.zeros(0), np.zeros(0)))
    return dict(zip(steps.tolist(), values.tolist(), strict=True))


def _line(ax: Axes, curves: Curves, name: str, colour: str, label: str, *, positive: bool = False) -> bool:
    """The raw steps, pale, and their trend; `positive`: smoothed in the log, where values <= 0 have no place."""
    if name not in curves.train:
        return False
    steps, values = curves.train[name]
    if positive:
        values = np.where(values > 0, values, np.nan)
    smooth = np.exp(smoothed(np.log(values))) if positive else smoothed(values)
    if not np.isfinite(smooth).any():
        return False
    marker = "o" if len(steps) == 1 else None
    ax.plot(steps, values, color=colour, alpha=0.28, linewidth=0.8)
    ax.plot(steps, smooth, color=colour, linewidth=1.8, marker=marker, markersize=4, label=label)
    _legend(ax)
    return True


def _points(ax: Axes, curves: Curves, name: str, colour: str) -> bool:
    if name not in curves.held_out or not np.isfinite(curves.held_out[name][1]).any():
        return False
    ax.plot(
        *curves.held_out[name],
        color=colour,
        linewidth=1.0,
        linestyle=(0, (4, 2)),
        marker="o",
        markersize=4.5,
        markeredgecolor="white",
        markeredgewidth=0.7,
        label="held-out",
        zorder=3,
    )
    _legend(ax)
    return True


def _label(ax: Axes, title: str, unit: str) -> None:
    ax.set_title(title)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(unit)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10], integer=True))


def _legend(ax: Axes) -> None:
    ax.legend(loc="best", handlelength=1.6)


def _say_nothing_recorded(ax: Axes) -> None:
    ax.text(0.5, 0.5, "not recorded", transform=ax.transAxes, ha="center", va="center", color=GREY)
    ax.set_xticks([])
    ax.set_yticks([])


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    return path
