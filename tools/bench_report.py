"""What `bench_ops.py` prints and draws, and the smaller measurements around its table."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_contenders import Problem, Row, ours
from rich.console import Console
from rich.table import Table

from megatron_hybrid.runtime.spawn import RankPool

H100_BYTES_PER_S = 3.35e12
"""HBM3 of an H100 SXM, from its data sheet."""
OP_READS_AND_WRITES = 5
"""Both shards read in each of two passes, the gradient written once."""
WRONG = 0.05
"""Relative error beyond which a gradient is wrong and not just rounded: bf16 throughout gives 1 to 2 %."""

console = Console(width=None if sys.stdout.isatty() else 140)


def progress() -> Callable[[str], None]:
    """One line on stderr that is written over; lines of their own where nobody watches."""
    end = "\r" if sys.stderr.isatty() else "\n"
    return lambda text: print(f"{text:<78.78}", end=end, file=sys.stderr, flush=True)


def table(rows: list[Row], title: str) -> None:
    """The measured rows, fastest of ours as the unit of time."""
    unit = min(row.median_s for row in rows if row.name.startswith("ours") and row.times_s)
    shown = Table("", "job", "ms", "x ours", "extra memory, x logits", "gradient error", title=title)
    for row in rows:
        job = "all" if row.whole_job else "KL alone"
        if not row.times_s or row.memory is None or row.error is None:
            shown.add_row(row.name, job, row.note, "", "", "")
            continue
        wrong = " WRONG" if row.error > WRONG else ""
        ms, ratio = f"{row.median_s * 1e3:.1f}", f"{row.median_s / unit:.1f}"
        shown.add_row(row.name, job, ms, ratio, f"{row.memory:.2f}", f"{row.error:.1e}{wrong}")
    console.print(shown)


def limits(rows: int, vocab: int, dtypes: list[str]) -> None:
    """This machine's bandwidth, measured now, and the time that the op's bytes take at an H100's, computed."""
    copied, factor = torch.empty(1 << 24), torch.empty(1 << 24)
    source = torch.ones(1 << 24)  # 64 MB each: beyond the caches
    shown = Table("bandwidth and bytes", "", title="limits")
    size = source.numel() * source.element_size()
    for name, passes, run in (
        ("copy, measured here", 2, lambda: copied.copy_(source)),
        ("triad, measured here", 3, lambda: torch.add(source, factor, alpha=3.0, out=copied)),
    ):
        run()
        times = [_timed(run) for _ in range(5)]
        shown.add_row(name, f"{passes * size / statistics.median(times) / 1e9:.1f} GB/s")
    for dtype in dtypes:
        size = OP_READS_AND_WRITES * rows * vocab * {"fp32": 4, "bf16": 2}[dtype]
        at_peak = f"{size / 1e6:.0f} MB, {size / H100_BYTES_PER_S * 1e6:.0f} us on an H100 at peak bandwidth"
        shown.add_row(f"the op in {dtype}, COMPUTED from bytes, not measured", at_peak)
    console.print(shown)


def growth(rows: int, vocab: int, repeats: int, say: Callable[[str], None]) -> None:
    """Time of our backends at a quarter, a half and all of the tokens, and of the vocabulary; the fitted exponent."""
    shares = (4, 2, 1)
    shown = Table("fp32, ms at 1/4, 1/2, 1", "tokens", "exponent", "vocabulary", "exponent", title="growth")
    problems = [[Problem.draw(rows // s, vocab, "fp32") for s in shares]]
    problems.append([Problem.draw(rows, vocab // s, "fp32") for s in shares])
    for backend in ("torch", "compile"):
        cells, op = [], ours(backend)
        for along in problems:
            say(f"growth of {backend}")
            times: list[list[float]] = [[] for _ in shares]
            for _ in range(repeats + 1):
                for taken, problem in zip(times, along, strict=True):
                    taken.append(_timed(partial(op, problem)))
            medians = [statistics.median(taken[1:]) for taken in times]  # the first is for warmth
            slope = np.polyfit(np.log([1 / s for s in shares]), np.log(medians), 1)[0]
            cells += [", ".join(f"{m * 1e3:.1f}" for m in medians), f"{slope:.2f}"]
        shown.add_row(f"ours, {backend}", *cells)
    console.print(shown)


def collectives(ranks: int, rows: int, vocab: int) -> None:
    """What each backend sends in one forward and backward on `ranks` local ranks, and how long it takes there."""
    shown = Table(
        "", "collectives", "bytes sent per token and rank", "ms", title=f"tensor parallel, {ranks} ranks, fp32"
    )
    with RankPool(ranks) as pool:
        for backend in ("torch", "compile"):
            count, sent, taken_s = pool.run(_on_rank, rows, vocab, backend)[0]
            shown.add_row(f"ours, {backend}", str(count), f"{sent / rows:.0f}", f"{taken_s * 1e3:.1f}")
    console.print(shown)


def _on_rank(rows: int, vocab: int, backend: str) -> tuple[int, int, float]:
    """(collectives, bytes handed to them, seconds) of one forward and backward on this rank's share of the columns."""
    import torch.distributed as dist

    problem = Problem.draw(rows, vocab // dist.get_world_size(), "fp32")
    sent: list[int] = []
    gather = dist.all_gather_into_tensor

    def counted(out: Any, values: Any, **options: Any) -> Any:
        sent.append(values.numel() * values.element_size())
        return gather(out, values, **options)

    op = ours(backend, dist.group.WORLD)
    op(problem)
    dist.all_gather_into_tensor = counted
    try:
        op(problem)
    finally:
        dist.all_gather_into_tensor = gather
    return len(sent), sum(sent), statistics.median(_timed(lambda: op(problem)) for _ in range(3))


def save(tables: dict[str, list[Row]], folder: Path) -> None:
    """bench_ops.json and bench_ops.png in `folder`: bars of the median times, one panel for each type."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    measured = {dtype: [row for row in rows if row.times_s] for dtype, rows in tables.items()}
    record = {
        dtype: [{"name": r.name, "ms": r.median_s * 1e3, "memory": r.memory, "error": r.error} for r in rows]
        for dtype, rows in measured.items()
    }
    (folder / "bench_ops.json").write_text(json.dumps(record, indent=1) + "\n")
    figure = Figure(figsize=(5.5 * len(measured), 3.2), layout="constrained")
    for ax, (dtype, rows) in zip(figure.subplots(1, len(measured), squeeze=False).flat, measured.items(), strict=True):
        values = [row.median_s * 1e3 for row in rows]
        colours = ["#0072B2" if row.name.startswith("ours") else "#8C8C8C" for row in rows]
        bars = ax.barh([row.name if row.whole_job else f"{row.name} (KL alone)" for row in rows], values, color=colours)
        ax.bar_label(bars, fmt="%.0f", padding=2)
        ax.invert_yaxis()
        ax.set_xlabel("forward and backward, ms")
        ax.set_title(dtype, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "bench_ops.png", dpi=150)
    print(folder / "bench_ops.png")


def _timed(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
