"""Our ops on this machine beside autograd, torch.compile of it, other libraries, and what the hardware allows.

make bench                                           # everything, with the other libraries installed; minutes
python tools/bench_ops.py --parts logits limits      # some of it
python tools/bench_ops.py --peers "$(tools/bench_peers.sh)" --out runs/bench

logits    forward and backward from logits on one rank: time, memory, error of the gradient against float64
parallel  the same with the vocabulary split over ranks (--tp), and what they send
heads     the fused LM head beside its four matrix products alone
returns   cost-to-go beside a loop and a matrix
growth    exponents of our time, with tokens and with vocabulary
limits    this machine's bandwidth; what the op's bytes would take on an H100: computed, not measured

With --out also bench_ops.md, .json and .png. Contenders take turns and medians count, but timings are only as good as
the machine is quiet: its load is printed. A library that is missing is a row that says so. Ctrl-C ends with the tables
of what was measured.
"""

import argparse
import json
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench_measure import Progress, Record

PARTS = ("logits", "parallel", "heads", "returns", "growth", "limits")


def _folder(text: str) -> Path | None:
    """None where bench_peers.sh failed and printed nothing: rows will say that the libraries are missing."""
    return Path(text) if text else None


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--vocab", type=int, nargs="+", default=[32768, 131072, 151936], help="columns of the logits")
    parser.add_argument("--elements", type=int, default=1 << 23, help="tokens x vocabulary of every batch of logits")
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--tp", type=int, nargs="+", default=[2, 4], help="tensor-parallel sizes beside 1")
    head = parser.add_argument("--head", type=int, nargs=4, metavar=("TOKENS", "HIDDEN", "VOCAB", "CHUNK"))
    head.default = [1024, 1024, 32768, 512]
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096], help="positions of the returns")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of timing")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0: as it finds them")
    parser.add_argument("--peers", type=_folder, help="folder of other libraries, as bench_peers.sh prints it")
    parser.add_argument("--out", type=Path, help="folder for bench_ops.md, bench_ops.json and bench_ops.png")
    return parser.parse_args()


def run(options: argparse.Namespace, say: "Progress", shapes: list[tuple[int, int]], records: "list[Record]") -> None:
    """The chosen parts, one after the other, into `records`."""
    import bench_heads
    import bench_logits
    import bench_parallel
    import bench_returns

    if "logits" in options.parts:
        say("starting", 15.0)
        bench_parallel.single_rank()
        for dtype in options.dtype:
            for tokens, vocab in shapes:
                records += bench_logits.table(tokens, vocab, dtype, options.repeats, say)
    if "heads" in options.parts:
        for dtype in options.dtype:
            records += bench_heads.table(tuple(options.head), dtype, options.repeats, say)
    if "returns" in options.parts:
        records += bench_returns.table(8, options.lengths, options.repeats, say)
    if "growth" in options.parts:
        records += bench_logits.growth(*shapes[0], options.repeats, say)
    if "parallel" in options.parts:
        halves = [(max(1, tokens // 2), vocab) for tokens, vocab in shapes]  # every rank judges in float64
        for rows in bench_parallel.tables(options.tp, halves, options.dtype, options.repeats, options.peers, say):
            records += rows


def cost(options: argparse.Namespace) -> float:
    """Of all steps, in the measure of what they say: about a second each."""
    tables = len(options.dtype) * len(options.vocab)
    costs = {
        "logits": 15.0 + tables * (11 + options.repeats),
        "parallel": 15.0 + 4.0 * sum(options.tp) * tables,
        "heads": len(options.dtype) * 3 * (16 + options.repeats),
        "returns": len(options.lengths) * (3 + options.repeats) / 4,
        "growth": 8.0,
        "limits": 0.0,
    }
    return sum(costs[part] for part in options.parts)


def main() -> int:
    """Measures, prints the tables, and writes them with --out."""
    options = arguments()
    sys.path.insert(0, str(Path(__file__).parents[1]))  # so that a checkout needs no installation
    # Other libraries' advice, and the profiler's about a missing GPU; the ranks take the variables from here.
    os.environ |= {"KINETO_LOG_LEVEL": "6", "PYTHONWARNINGS": "ignore", "TRL_EXPERIMENTAL_SILENCE": "1"}
    warnings.simplefilter("ignore")
    import bench_limits
    import bench_peers
    import bench_report
    import torch
    from bench_measure import Progress

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.peers is not None:
        bench_peers.use(options.peers)
    shapes = [(max(4, options.elements // vocab), vocab) for vocab in options.vocab]
    bandwidth = bench_limits.bandwidth() if "limits" in options.parts else None
    say = Progress(cost(options))
    records: list[Record] = []
    try:
        run(options, say, shapes, records)
        say("done")
    except KeyboardInterrupt:
        say("interrupted: what was measured until here")

    of = {part: [record for record in records if record.part == part] for part in PARTS}
    tables = []
    if of["logits"] or of["parallel"]:
        triad = bandwidth["triad"] if bandwidth else None
        tables.append(bench_report.logits(of["logits"] + of["parallel"], triad))
    makers = {"heads": bench_report.heads, "returns": bench_report.returns, "growth": bench_report.growth}
    tables += [make(of[part]) for part, make in makers.items() if of[part]]
    if bandwidth:
        tables.append(bench_report.limits(bandwidth, shapes, options.dtype))
    for table in tables:
        table.show()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    machine = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores; load of the machine now {load:.1f}"
    print(machine)
    if options.out is not None:
        save(options.out, records, bandwidth, machine, [table.markdown() for table in tables])
    return 0


def save(
    folder: Path, records: "list[Record]", bandwidth: dict[str, float] | None, machine: str, tables: list[str]
) -> None:
    """The same as text, numbers and a picture."""
    import bench_plot

    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(record) | {"time_s": record.time_s, "wrong": record.wrong} for record in records]
    content = {"machine": machine, "bandwidth_bytes_per_s": bandwidth, "records": rows}
    (folder / "bench_ops.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "bench_ops.md").write_text("\n".join([*tables, machine, ""]))
    if records:
        bench_plot.save(records, folder / "bench_ops.png")
    print(folder / "bench_ops.md")


if __name__ == "__main__":
    sys.exit(main())
