"""The table of a profile: every moment once, under the innermost stage, by a trace made by hand and a real one."""

import gzip
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_hybrid.ops.lm_head import linear_hybrid_loss

TOOL = Path(__file__).parents[2] / "tools" / "profile_step.py"
times = runpy.run_path(str(TOOL))["times"]


def span(name: str, start: float, end: float, cat: str = "cpu_op", tid: int = 1) -> dict[str, Any]:
    return {"ph": "X", "name": name, "ts": start, "dur": end - start, "cat": cat, "tid": tid}


TRACE = [
    span("aten::mm", 0, 9),  # before the profiled step
    span("ProfilerStep#4", 10, 110, "user_annotation"),
    span("hybrid/rollout", 12, 50, "user_annotation"),
    span("aten::linear", 15, 35),
    span("aten::addmm", 20, 30),
    span("LinearHybridLossFunction", 60, 80),
    span("hybrid/credit", 62, 66, "user_annotation"),
    span("aten::add", 63, 65),
    span("aten::mm", 70, 75),
    span("aten::mul", 90, 100),
    span("aten::mm", 12, 100, tid=2),  # another thread
]


def test_every_moment_counts_once_by_hand():
    spent = times(TRACE)
    assert spent["rollout: model"] == {"products": 10, "other torch": 10, "python": 18}
    assert spent["LM heads and op"] == {"products": 5, "other torch": 11, "python": 0}
    assert spent["credit"] == {"products": 0, "other torch": 2, "python": 2}
    assert spent["student and Megatron's step"] == {"products": 0, "other torch": 10, "python": 32}
    assert sum(sum(ways.values()) for ways in spent.values()) == 100


def test_a_profile_without_a_step_is_refused():
    with pytest.raises(SystemExit, match="no step in it"):
        times(TRACE[:1])


def test_the_names_of_a_real_profile_are_known_forward_and_backward(tmp_path: Path):
    hidden, weight = torch.randn(40, 8).requires_grad_(), torch.randn(64, 8).requires_grad_()
    with profile(activities=[ProfilerActivity.CPU]) as profiled, record_function("ProfilerStep#1"):
        loss = linear_hybrid_loss(hidden, weight, None, torch.zeros(40, dtype=torch.long), advantage=1.0).loss
        with record_function("between"):
            total = loss.sum()
        total.backward()
    path = tmp_path / "rank-0.json"
    profiled.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    spent = times(events)["LM heads and op"]
    # Of the four products there is none of a teacher's: one forward, two backward.
    products = [e for e in events if e.get("name") in ("aten::mm", "aten::addmm_") and e.get("cat") == "cpu_op"]
    assert len(products) == 3 and spent["products"] == pytest.approx(sum(e["dur"] for e in products), rel=0.1)

    packed = tmp_path / "rank-0.json.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    shown = subprocess.run([sys.executable, str(TOOL), str(packed)], capture_output=True, text=True, check=True).stdout
    assert "LM heads and op" in shown
