"""The figures of the studies."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study_estimators import ESTIMATORS, OURS, UNIT
from study_report import GOAL, Measured, by_layer

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C8C8C", "#E69F00", "#56B4E9")


def draw_variance(settings: list[Measured], records: list[dict[str, Any]], path: Path) -> None:
    """Estimators beside one another, variance against bias along gamma, and the layers."""
    figure = Figure(figsize=(14.4, 4.2 + 0.5 * len(ESTIMATORS)), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[0.5 * len(ESTIMATORS), 4.2])
    bars, trade, layers = figure.add_subplot(grid[0, :]), figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])
    _bars(bars, settings, records)
    for measured, colour in zip(settings, COLOURS, strict=False):
        _trade(trade, measured, records, colour)
        ratios = by_layer(measured, OURS)
        places = [k / max(1, len(ratios) - 1) for k in range(len(ratios))]
        layers.semilogy(places, [r.value for r in ratios], marker=".", color=colour, label=measured.title)
    trade.set(xlabel="bias, share of the norm of dJ (0 and below: none seen)", ylabel="variance, x KL in the reward")
    trade.set_title("ours, gamma from 0 to 1, lambda 1", loc="left")
    layers.set(xlabel="layers, from the embedding to the head", ylabel="variance, x KL in the reward")
    layers.set_title("ours by layer, gamma 1, lambda 1", loc="left")
    for ax in (bars, trade, layers):
        ax.axhline(GOAL, color="black", linewidth=0.8, linestyle=":") if ax is not bars else None
        ax.spines[["top", "right"]].set_visible(False)
    trade.legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=110)


def _bars(ax: Axes, settings: list[Measured], records: list[dict[str, Any]]) -> None:
    """One group for each estimator, one bar for each setting; lambda 1, gamma 1."""
    labels = [label for label in ESTIMATORS if label != UNIT]
    height = 0.8 / len(settings)
    for place, (measured, colour) in enumerate(zip(settings, COLOURS, strict=False)):
        for row, label in enumerate(labels):
            for r in records:
                if (r["setting"], r["estimator"], r["lambda"], r["discount"]) != (measured.title, label, 1, 1):
                    continue
                ratio = r["ratio"]
                error = [[ratio["value"] - ratio["low"]], [ratio["high"] - ratio["value"]]]
                at = row + (place - (len(settings) - 1) / 2) * height
                ax.barh(at, ratio["value"], 0.9 * height, xerr=error, color=colour, error_kw={"linewidth": 0.8})
        ax.barh(0, 0, color=colour, label=measured.title)
    ax.set_xscale("log")
    ax.set_yticks(range(len(labels)), labels, fontsize=8)
    ax.axvline(1, color="black", linewidth=0.8)
    ax.axvline(GOAL, color="black", linewidth=0.8, linestyle=":")
    ax.invert_yaxis()
    ax.legend(fontsize=7, loc="lower right")
    ax.set_xlabel(f"variance, x KL in the reward (dotted: {GOAL}); bootstrap intervals of 95 %")
    ax.set_title("trace of the covariance of the gradient, lambda 1, gamma 1", loc="left")


def _trade(ax: Axes, measured: Measured, records: list[dict[str, Any]], colour: str) -> None:
    mine = [r for r in records if (r["setting"], r["estimator"], r["lambda"]) == (measured.title, OURS, 1)]
    mine.sort(key=lambda r: r["discount"])
    ax.semilogy(
        [max(0.0, r["bias"]["value"]) for r in mine],
        [r["ratio"]["value"] for r in mine],
        marker="o",
        color=colour,
        label=measured.title,
    )
    for r in mine:
        place = (max(0.0, r["bias"]["value"]), r["ratio"]["value"])
        ax.annotate(f"{r['discount']:g}", place, (3, 3), textcoords="offset points", fontsize=6)
