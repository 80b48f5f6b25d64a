"""The study of variance as a user starts it, on a world made for it: the direction, not the figure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "study_variance.py"


@pytest.mark.procs
def test_ours_is_unbiased_with_less_noise_than_the_kl_in_the_reward(tmp_path: Path):
    page = tmp_path / "README.md"
    page.write_text("<!-- variance -->\n<!-- end of variance -->\n")
    command = [sys.executable, TOOL, "--quick", "--threads", "1", "--out", tmp_path / "out"]
    done = subprocess.run([*command, "--readme", page], capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]
    records = json.loads((tmp_path / "out" / "results.json").read_text())
    at_one = {r["estimator"]: r for r in records if r["lambda"] == 1 and r["discount"] == 1}
    for label, record in at_one.items():
        bias = record["bias"]
        if record["unbiased"]:
            # Against the sum over every response; twice the interval: eleven of them, each wrong one time in twenty.
            assert bias["value"] - 2 * (bias["value"] - bias["low"]) < 0, (label, bias)
    ours, paper = at_one["ours: closed form, RLOO, group baseline"], at_one["paper's hybrid: sampled future"]
    assert ours["ratio"]["high"] < 0.35
    assert ours["ratio"]["high"] < paper["ratio"]["low"]
    assert at_one["GRPO, k3 in the loss"]["bias"]["low"] > 0.1, "a bias that is there is seen"
    assert "| paper's hybrid: sampled future |" in page.read_text()
    assert (tmp_path / "variance.png").stat().st_size > 10_000

    batch = sorted((tmp_path / "out" / "small, 3 tokens").glob("batch-*.npz"))[-1]
    before, kept = json.dumps(records), batch.read_bytes()
    batch.unlink()
    again = subprocess.run([*command], capture_output=True, text=True, timeout=540)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "batch 1/1" in again.stderr, "what is there is not measured again"
    assert json.dumps(json.loads((tmp_path / "out" / "results.json").read_text())) == before
    assert len(kept) == batch.stat().st_size
