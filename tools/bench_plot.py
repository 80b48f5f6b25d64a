"""One picture of the benchmark: what takes how long, holds how much, and how that grows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_heads import PRODUCTS
from bench_measure import Record
from bench_report import PRODUCT_FIGURE, geometric_mean, unit_s
from matplotlib.axes import Axes
from matplotlib.figure import Figure

OURS, OTHERS, SECOND = "#0072B2", "#8C8C8C", "#D55E00"


def save(records: list[Record], path: Path) -> None:
    """A panel for each part that was run."""
    parts = {part: [r for r in records if r.part == part] for part in dict.fromkeys(r.part for r in records)}
    panels: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
    if "logits" in parts:
        dtypes = dict.fromkeys(r.dtype for r in parts["logits"])
        panels += [(_times, (parts["logits"], dtype)) for dtype in dtypes]
        panels.append((_memory, (parts["logits"],)))
    for part, *draws in (
        ("parallel", _parallel_times, _collectives),
        ("heads", _heads),
        ("growth", _growth),
        ("returns", _returns),
    ):
        panels += [(draw, (parts[part],)) for draw in draws if part in parts]
    columns, rows = min(2, len(panels)), -(-len(panels) // 2)
    figure = Figure(figsize=(7.2 * columns, 3.8 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, (draw, data) in zip(axes, panels, strict=False):
        draw(ax, *data)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    figure.savefig(path, dpi=130)


def _bars(ax: Axes, names: list[str], values: list[float], form: str) -> None:
    bars = ax.barh(names, values, color=[OURS if name.startswith("ours") else OTHERS for name in names])
    ax.bar_label(bars, fmt=form, padding=3, fontsize=8)
    ax.tick_params(axis="y", labelsize=8)
    ax.margins(x=0.12)
    ax.invert_yaxis()


def _label(record: Record) -> str:
    return record.name if record.job == "all" or record.job in record.name else f"{record.name} ({record.job})"


def _grouped(records: list[Record]) -> dict[str, list[Record]]:
    measured = [record for record in records if record.time_s is not None]
    names = dict.fromkeys(_label(record) for record in measured)
    return {name: [record for record in measured if _label(record) == name] for name in names}


def _times(ax: Axes, records: list[Record], dtype: str) -> None:
    rows = [record for record in records if record.dtype == dtype]
    ratios = {
        name: geometric_mean([(r.time_s or 0) / unit_s(r, rows) for r in mine]) for name, mine in _grouped(rows).items()
    }
    _bars(ax, list(ratios), list(ratios.values()), "%.1f")
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_xlabel("time, x our fastest with that job")
    ax.set_title(f"from logits, {dtype}", loc="left")


def _memory(ax: Axes, records: list[Record]) -> None:
    held = {name: max(r.memory or 0 for r in mine) for name, mine in _grouped(records).items()}
    _bars(ax, list(held), list(held.values()), "%.1f")
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_xlabel("beside the inputs, x student logits (the gradient is 1)")
    ax.set_title("memory, the larger of the types", loc="left")


def _series(ax: Axes, names: list[str], series: dict[str, list[float]], form: str = "%.1f") -> None:
    """Bars side by side: one value a name in each series."""
    height = 0.8 / len(series)
    for place, ((label, values), colour) in enumerate(zip(series.items(), (OURS, SECOND, OTHERS), strict=False)):
        at = [k + (place - (len(series) - 1) / 2) * height for k in range(len(names))]
        ax.bar_label(ax.barh(at, values, 0.95 * height, color=colour, label=label), fmt=form, padding=3, fontsize=7)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.legend(fontsize=8, loc="upper right")
    ax.margins(x=0.12)
    ax.invert_yaxis()


def _parallel_times(ax: Axes, records: list[Record]) -> None:
    grouped = _grouped(records)
    series = {
        f"TP {tp}": [
            geometric_mean([(r.time_s or 0) / unit_s(r, records) for r in mine if r.tp == tp])
            for mine in grouped.values()
        ]
        for tp in dict.fromkeys(record.tp for record in records)
    }
    _series(ax, list(grouped), series)
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_xlabel("time, x our fastest with that job, both types")
    ax.set_title("tensor parallel, gloo on this machine", loc="left")


def _collectives(ax: Axes, records: list[Record]) -> None:
    counts = {name: max(r.collectives or 0 for r in mine) for name, mine in _grouped(records).items()}
    _bars(ax, list(counts), list(counts.values()), "%d")
    for place, mine in enumerate(_grouped(records).values()):
        sent = f"{max(r.sent_bytes or 0 for r in mine):.0f} bytes"
        sent += ", WRONG" if any(r.wrong for r in mine) else ""
        ax.annotate(sent, (0, place), (4, 0), textcoords="offset points", va="center", fontsize=7, color="white")
    ax.set_xlabel("collectives; in the bars: bytes per token and rank")
    ax.set_title("tensor parallel, what is sent", loc="left")


def _heads(ax: Axes, records: list[Record]) -> None:
    grouped = _grouped(records)
    dtypes = dict.fromkeys(record.dtype for record in records)
    series = {
        dtype: [next((r.extra["x_products"] for r in mine if r.dtype == dtype), 0.0) for mine in grouped.values()]
        for dtype in dtypes
    }
    _series(ax, [name.replace(f" ({PRODUCTS.name})", "") for name in grouped], series, "%.2f")
    ax.axvline(PRODUCT_FIGURE, color="black", linewidth=0.8, linestyle="--")
    ax.set_xlabel(f"time, x the four products in chunks (dashed: {PRODUCT_FIGURE})")
    ax.set_title("from hidden states", loc="left")


def _growth(ax: Axes, records: list[Record]) -> None:
    for r in records:
        share = [size / max(r.extra["sizes"]) for size in r.extra["sizes"]]
        style = "-" if r.extra["along"] == "tokens" else "--"
        label = f"{r.name}, {r.extra['along']}: exponent {r.extra['exponent']:.2f}"
        colour = OURS if "compile" in r.name else SECOND
        ax.loglog(share, [1e3 * t for t in r.extra["time_s"]], style, marker="o", color=colour, label=label)
    ax.legend(fontsize=8)
    ax.set_xticks(share, [f"{x:g}" for x in share], minor=False)
    ax.set_xticks([], minor=True)
    ax.set_xlabel("share of the tokens, or of the vocabulary")
    ax.set_ylabel("ms, fp32")
    ax.set_title("growth", loc="left")


def _returns(ax: Axes, records: list[Record]) -> None:
    for (name, mine), colour in zip(_grouped(records).items(), (OURS, SECOND, OTHERS), strict=False):
        label = name.replace(" (cost-to-go)", "")
        slope = mine[-1].extra.get("exponent")
        label += f": exponent {slope:.2f}" if slope is not None else ""
        ax.loglog(
            [r.tokens for r in mine], [1e3 * (r.time_s or 0) for r in mine], marker="o", color=colour, label=label
        )
    ax.legend(fontsize=8)
    lengths = sorted({record.tokens for record in records})
    ax.set_xticks(lengths, list(map(str, lengths)), minor=False)
    ax.set_xticks([], minor=True)
    ax.set_xlabel("positions")
    ax.set_ylabel("ms")
    ax.set_title("cost-to-go, fp32", loc="left")
