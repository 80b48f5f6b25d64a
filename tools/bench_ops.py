"""Forward and backward of the op on this machine beside autograd, torch.compile of autograd and other libraries.

python tools/bench_ops.py                            # 256 x 32768, fp32 and bf16; about two minutes on two cores
python tools/bench_ops.py --rows 512 --vocab 151936 --dtype bf16 --repeats 7 --out runs/bench

One table: median time of repeats that take turns, the same as a multiple of our fastest in this run, largest memory
beside the inputs in multiples of the student's logits (the gradient is 1 of them), error of the gradient against
float64. Then collectives with --tp, growth with tokens and vocabulary, this machine's bandwidth, and what the bytes of
the op would take on an H100: computed, not measured. Timings are only as good as the machine is quiet: its load is
printed. Other libraries are used where they can be imported (PYTHONPATH reaches a folder of `pip install --target`).
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench_contenders import Problem, Row, Run
    from torch import Tensor


def peak_memory(run: "Run", problem: "Problem") -> float:
    """Largest memory that torch's allocator held beside what it held before, in multiples of the student's logits."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run(problem)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = largest = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        largest = max(largest, held)
    return largest / (problem.student.numel() * problem.student.element_size())


def gradient_error(row: "Row", gradient: "Tensor", problem: "Problem") -> float:
    """Largest over the rows of |gradient - float64 gradient| / |float64 gradient|."""
    from megatron_hybrid.ops.reference import reference_hybrid_loss

    worst = 0.0
    for start in range(0, len(problem.target), 64):  # float64 in pieces: the judge holds many copies
        part = slice(start, start + 64)
        expected = reference_hybrid_loss(
            problem.student.detach()[part],
            problem.teacher[part],
            problem.target[part],
            advantage=problem.advantage[part] if row.whole_job else 0.0,
        ).gradient
        error = (gradient[part].double() - expected).norm(dim=-1) / expected.norm(dim=-1)
        worst = max(worst, error.max().item())
    return worst


def measure(rows: "list[Row]", problem: "Problem", repeats: int, say: Callable[[str], None]) -> None:
    """Fills in the rows: one run each for warmth, error and memory, then `repeats` rounds in which they take turns."""
    for row in rows:
        if row.run is None:
            continue
        say(f"{row.name}: compiling, error, memory")
        try:
            row.error = gradient_error(row, row.run(problem), problem)
            row.memory = peak_memory(row.run, problem)
        except Exception as error:
            row.run, row.note = None, f"failed: {type(error).__name__}: {error}".splitlines()[0]
    for repeat in range(repeats):
        say(f"timing, round {repeat + 1} of {repeats}")
        for row in rows:
            if row.run is not None:
                started = time.perf_counter()
                row.run(problem)
                row.times_s.append(time.perf_counter() - started)


def main() -> int:
    """Measures, prints the tables, and draws them with --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256, help="tokens")
    parser.add_argument("--vocab", type=int, default=32768, help="columns of the logits")
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, default=5, help="rounds of timing")
    parser.add_argument("--tp", type=int, default=0, help="count collectives on this many ranks; 0: leave it out")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0: as it finds them")
    parser.add_argument("--no-growth", action="store_true", help="leave out growth with tokens and vocabulary")
    parser.add_argument("--out", type=Path, help="folder for bench_ops.png and bench_ops.json")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))  # so that a checkout needs no installation
    import bench_report as report
    import torch
    from bench_contenders import Problem, contenders

    if options.threads:
        torch.set_num_threads(options.threads)
    say = report.progress()
    tables: dict[str, list[Row]] = {}
    for dtype in options.dtype:
        problem, rows = Problem.draw(options.rows, options.vocab, dtype), contenders()
        measure(rows, problem, options.repeats, lambda text, dtype=dtype: say(f"{dtype}: {text}"))
        tables[dtype] = rows
        report.table(rows, f"{options.rows} x {options.vocab}, {dtype}, forward and backward")
    report.limits(options.rows, options.vocab, options.dtype)
    if not options.no_growth:
        report.growth(options.rows, options.vocab, options.repeats, say)
    if options.tp:
        report.collectives(options.tp, options.rows, options.vocab)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores; load of the machine now {load:.1f}")
    if options.out is not None:
        report.save(tables, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
