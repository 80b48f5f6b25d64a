"""Where the time of a training step goes: a profile that Megatron's own profiler wrote, as a table of shares.

    NPROC=1 examples/6_smollm2_recovery.sh --train-iters 8 --profile --use-pytorch-profiler \
        --profile-step-start 4 --profile-step-end 7
    python tools/profile_step.py runs/smollm2_recovery/torch_profile/rank-0.json.gz

Each moment of the profiled steps belongs to one stage (a row) and is spent in one way (a column): in matrix products,
in other operations of torch, or between them, in Python and in waiting. For profiles of CPU runs: beside a GPU, the
host's time says little, and the same spans (hybrid/rollout, hybrid/teacher, ...) are read in a viewer instead.
"""

import argparse
import gzip
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_scaled_dot_product",
    "mkldnn::",
    "onednn::",
)
WAYS = ("products", "other torch", "python")
STAGES = {
    "hybrid/rollout": "rollout: model",
    "hybrid/sampling": "rollout: sampling and bookkeeping",
    "hybrid/teacher": "teacher pass",
    "hybrid/reward": "waiting for rewards",
    "hybrid/credit": "credit",
    "LinearHybridLossFunction": "LM heads and op",
    "HybridLossFunction": "op",
    "Optimizer.step": "optimizer",
    "hybrid/report": "report",
    "ProfilerStep": "student and Megatron's step",
}
"""Beginnings of the spans' names; the innermost counts. `...Function` also names its backward."""
SHARED = 0.10
"""The part of a step that all but the models and the optimizer may take."""


def stage_of(name: str) -> str | None:
    """The stage that a span begins; None where it belongs to the one around it."""
    return next((stage for prefix, stage in STAGES.items() if name.startswith(prefix)), None)


def times(events: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Microseconds by stage and way, of the thread that trains.

    A span's own time is what no span inside it covers; own time of torch's operations is theirs, all other is Python's.
    """
    steps = [e for e in events if e.get("name", "").startswith("ProfilerStep")]
    if not steps:
        raise SystemExit(
            "profile_step: the profile has no step in it. Profile at least one whole step after the first."
        )
    thread = steps[0]["tid"]
    spans = [e for e in events if e.get("ph") == "X" and e.get("tid") == thread and "dur" in e]
    spans.sort(key=lambda e: (e["ts"], -e["dur"]))
    spent: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(WAYS, 0.0))
    open_spans: list[tuple[float, str, str]] = []  # (end, stage, way)
    now = 0.0

    def pass_until(moment: float) -> None:
        nonlocal now
        while open_spans and open_spans[-1][0] <= moment:
            end, stage, way = open_spans.pop()
            spent[stage][way] += max(end - now, 0.0)
            now = max(now, end)
        if open_spans:
            _, stage, way = open_spans[-1]
            spent[stage][way] += max(moment - now, 0.0)
        now = max(now, moment)

    for span in spans:
        stage = stage_of(span["name"])
        if not open_spans and stage is None and not _inside(span, steps):
            continue
        pass_until(span["ts"])
        around = open_spans[-1][1] if open_spans else STAGES["ProfilerStep"]
        open_spans.append((span["ts"] + span["dur"], stage or around, _way(span)))
    pass_until(float("inf") if not open_spans else max(end for end, _, _ in open_spans))
    return spent


def _inside(span: dict[str, Any], steps: list[dict[str, Any]]) -> bool:
    return any(s["ts"] <= span["ts"] < s["ts"] + s["dur"] for s in steps)


def _way(span: dict[str, Any]) -> str:
    if span.get("cat") != "cpu_op":
        return "python"
    return "products" if span["name"].startswith(PRODUCTS) else "other torch"


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "profile", type=Path, help="torch_profile/rank-N.json.gz beside the TensorBoard folder of a run"
    )
    options = parser.parse_args()
    from rich.console import Console
    from rich.table import Table

    opened = gzip.open if options.profile.suffix == ".gz" else open
    with opened(options.profile, "rt") as file:
        events = json.load(file)["traceEvents"]
    if any(e.get("cat") == "kernel" for e in events):
        raise SystemExit("profile_step: the profile holds kernels of a GPU, beside which the host's time says little.")
    spent = times(events)
    total = sum(sum(ways.values()) for ways in spent.values())
    shown = Table("share of the step, %", *WAYS, "all", title=str(options.profile))
    for stage in dict.fromkeys(STAGES.values()):
        if stage in spent:
            ways = spent[stage]
            cells = [f"{100 * ways[way] / total:.1f}" for way in WAYS]
            shown.add_row(stage, *cells, f"{100 * sum(ways.values()) / total:.1f}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
