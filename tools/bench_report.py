"""The tables of the benchmark, from its records: printed as they are, and as Markdown."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import bench_heads
import numpy as np
from bench_limits import h100_s, op_bytes
from bench_measure import ALL, KL, POLICY, Record
from rich.console import Console
from rich.table import Table as Printed

PRODUCT_FIGURE = 1.25
"""The fused head is to take at most so many times its four matrix products."""
SAME_WORK = {ALL.name: ALL.name, KL.name: ALL.name, POLICY.name: POLICY.name}
"""Of which job our fastest is the unit of time: we have no cheaper one for the KL alone."""


@dataclass
class Table:
    """Cells are text; an empty list among the rows is a line between sections."""

    title: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    caption: str = ""

    def show(self) -> None:
        console = Console(width=None if sys.stdout.isatty() else 178)
        printed = Printed(*self.header, title=self.title, caption=self.caption or None, caption_justify="left")
        for row in self.rows:
            if row:
                printed.add_row(*row)
            else:
                printed.add_section()
        console.print(printed)

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", "| " + " | ".join(self.header) + " |", "|" + "---|" * len(self.header)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self.rows if row]
        return "\n".join([*lines, *(["", self.caption] if self.caption else []), ""])


def logits(records: list[Record], triad: float | None) -> Table:
    """One row for each contender at each tensor-parallel size and type, one column of times for each vocabulary."""
    vocabs = sorted({record.vocab for record in records})
    shapes = "; ".join(
        f"TP {tp}: " + ", ".join(dict.fromkeys(f"{r.tokens} x {r.vocab}" for r in records if r.tp == tp))
        for tp in dict.fromkeys(record.tp for record in records)
    )
    table = Table(
        "from logits: forward + backward, ms",
        ["TP", "type", "", "job", *map(str, vocabs), "x ours", "memory", "error", "coll.", "B/token", "of triad"],
        caption=(
            "job: all = KL, policy term, log-probability, entropy; no teacher = the same without KL. x ours: our "
            "fastest with the same job, or with all; geometric mean. memory: largest beside the inputs, x the "
            "student's logits; the gradient is 1. error: of the gradient, against float64, relative, worst token. "
            "coll. and B/token: collectives, and bytes handed to them by a rank. of triad: bytes that the op must "
            f"move, over time, over the bandwidth of a triad. Tokens x vocabulary: {shapes}."
        ),
    )
    for (tp, dtype), section in groupby(records, lambda r: (r.tp, r.dtype)):
        table.rows.append([])
        rows = list(section)
        for name in dict.fromkeys(record.name for record in rows):
            mine = [record for record in rows if record.name == name]
            table.rows.append([str(tp), dtype, *_logits_row(mine, rows, vocabs, triad if tp == 1 else None)])
    return table


def _logits_row(mine: list[Record], rows: list[Record], vocabs: list[int], triad: float | None) -> list[str]:
    by_vocab = {record.vocab: record for record in mine}
    cells = [mine[0].name, mine[0].job]
    for vocab in vocabs:
        record = by_vocab.get(vocab)
        times = None if record is None or record.time_s is None else (record.forward_s, record.backward_s)
        cells.append("" if times is None else " + ".join(f"{1e3 * (t or 0):.1f}" for t in times))
    measured = [record for record in mine if record.time_s is not None]
    if not measured:
        return [*cells[:2], mine[0].note, *[""] * (len(vocabs) + 5)]
    ratio = geometric_mean([(r.time_s or 0) / unit for r in measured if (unit := unit_s(r, rows))])
    error = max(record.error or 0.0 for record in measured)
    share = [op_bytes(r) / (r.time_s or 1) / triad for r in measured] if triad else []
    return [
        *cells,
        f"{ratio:.2f}",
        _most(measured, "memory", "{:.2f}"),
        f"{error:.0e}{' WRONG' if any(record.wrong for record in measured) else ''}",
        _most(measured, "collectives", "{:d}"),
        _most(measured, "sent_bytes", "{:.0f}"),
        f"{100 * geometric_mean(share):.0f} %" if share else "",
    ]


def unit_s(record: Record, rows: Iterable[Record]) -> float:
    """Time of our fastest that does at least this job, on the same problem."""
    same = (record.tp, record.dtype, record.vocab, SAME_WORK[record.job])
    return min(
        (r.time_s for r in rows if r.name.startswith("ours") and r.time_s and (r.tp, r.dtype, r.vocab, r.job) == same),
        default=float("nan"),
    )


def geometric_mean(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values)))) if values else float("nan")


def _most(records: list[Record], name: str, form: str) -> str:
    values: list[Any] = [getattr(record, name) for record in records if getattr(record, name) is not None]
    return form.format(max(values)) if values else ""


def heads(records: list[Record]) -> Table:
    """Times as multiples of the four products alone, memory at n and at 4 n tokens."""
    first = records[0]
    sizes = f"hidden size {first.extra['hidden_size']}, vocabulary {first.vocab}, chunks of {first.extra['chunk_size']}"
    more = bench_heads.MEMORY_TIMES * first.tokens
    table = Table(
        f"from hidden states: {first.tokens} tokens, {sizes}",
        ["type", "", "job", "forward + backward, ms", "x four products"]
        + [f"MB beside inputs, {first.tokens} tokens", f"{more} tokens", "error of dh, dW"],
        caption=f"The figure of the product: at most {PRODUCT_FIGURE} x its four products. dh and dW are in the MB.",
    )
    for dtype, section in groupby(records, lambda r: r.dtype):
        table.rows.append([])
        for r in section:
            if r.time_s is None:
                table.rows.append([dtype, r.name, r.job, r.note, "", "", "", ""])
                continue
            ratio = r.extra["x_products"]
            verdict = ""
            if r.name.startswith("ours"):
                verdict = " (within)" if ratio <= PRODUCT_FIGURE else " (beyond)"
            error = f"{r.error:.0e}{' WRONG' if r.wrong else ''}" if r.job != bench_heads.PRODUCTS.name else ""
            times = f"{1e3 * (r.forward_s or 0):.0f} + {1e3 * (r.backward_s or 0):.0f}"
            held = [f"{b / 1e6:.0f}" for b in (r.memory_bytes or 0, r.extra["memory_bytes_longer"])]
            table.rows.append([dtype, r.name, r.job, times, f"{ratio:.2f}{verdict}", *held, error])
    return table


def returns(records: list[Record]) -> Table:
    """Times at every length, with the exponent fitted to them."""
    lengths = sorted({record.tokens for record in records})
    table = Table(
        "cost-to-go: forward, ms", ["", *(f"{n} positions" for n in lengths), "exponent", "memory, x costs", "error"]
    )
    for name in dict.fromkeys(record.name for record in records):
        mine = sorted((record for record in records if record.name == name), key=lambda r: r.tokens)
        times = [f"{1e3 * (record.time_s or 0):.2f}" for record in mine]
        slope = mine[-1].extra.get("exponent")
        shown = "" if slope is None else f"{slope:.2f}"
        error = f"{max(record.error or 0 for record in mine):.0e}"
        table.rows.append([name, *times, shown, f"{mine[-1].memory:.1f}", error])
    return table


def growth(records: list[Record]) -> Table:
    """Exponents of time: 1 is linear."""
    table = Table("growth of forward and backward, fp32", ["", "with", "sizes", "ms", "exponent (1: linear)"])
    for r in records:
        sizes, times = ", ".join(map(str, r.extra["sizes"])), ", ".join(f"{1e3 * t:.1f}" for t in r.extra["time_s"])
        table.rows.append([r.name, r.extra["along"], sizes, times, f"{r.extra['exponent']:.2f}"])
    return table


def limits(bandwidth: dict[str, float], shapes: list[tuple[int, int]], dtypes: list[str]) -> Table:
    """Bandwidth measured here, and the time that the op's bytes take at it and at an H100's."""
    table = Table("limits", ["", "", "this machine's triad, ms", "an H100 at its peak, us: COMPUTED from bytes"])
    for name, rate in bandwidth.items():
        table.rows.append([f"{name}, measured here", f"{rate / 1e9:.1f} GB/s", "", ""])
    for tokens, vocab in [*shapes, (4096, 151936)]:
        for dtype in dtypes:
            computed = h100_s(tokens, vocab, dtype)
            record = Record("", ALL.name, "limits", dtype, 1, vocab, tokens)
            here = f"{1e3 * op_bytes(record) / bandwidth['triad']:.1f}"
            table.rows.append([f"the op at {tokens} x {vocab}", dtype, here, f"{1e6 * computed:.0f}"])
    return table
