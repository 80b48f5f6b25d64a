"""The study of variance as a user starts it, on a world made for it: the direction, not the figure."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))

from study_estimators import OURS  # noqa: E402
from study_report import load  # noqa: E402

COMMAND = [sys.executable, str(ROOT / "tools" / "study_variance.py"), "--quick", "--threads", "1"]

pytestmark = pytest.mark.procs


def run(folder: Path, *flags: str) -> str:
    """What a start in a folder says of its progress."""
    page = folder / "README.md"
    page.write_text("<!-- variance -->\n<!-- end of variance -->\n")
    command = [*COMMAND, "--out", str(folder / "out"), "--readme", str(page), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def results(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "out" / "results.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a whole quick study."""
    path = tmp_path_factory.mktemp("study")
    run(path)
    return path


def test_ours_is_unbiased_with_less_noise_than_the_kl_in_the_reward(folder: Path):
    at_one = {r["estimator"]: r for r in results(folder) if r["lambda"] == 1 and r["discount"] == 1}
    for label, record in at_one.items():
        bias = record["bias"]
        if record["unbiased"]:
            # Against the sum over every response; twice the interval: nine of them, each wrong one time in twenty.
            assert bias["value"] - 2 * (bias["value"] - bias["low"]) < 0, (label, bias)
    ours, paper = at_one["ours: closed form, RLOO, group baseline"], at_one["paper's hybrid: sampled future"]
    assert ours["ratio"]["high"] < 0.35
    assert ours["ratio"]["high"] < paper["ratio"]["low"]
    assert at_one["GRPO, k3 in the loss"]["bias"]["low"] > 0.1, "a bias that is there is seen"
    assert "| paper's hybrid: sampled future |" in (folder / "README.md").read_text()
    assert (folder / "variance.png").stat().st_size > 10_000


def test_one_loud_batch_is_left_out_of_the_column_that_does_without(folder: Path):
    measured = load(folder / "out" / "small, 3 tokens")
    assert measured is not None
    parts = measured.parts.copy()
    parts[5] *= 100
    quiet = replace(measured, parts=parts).without_loudest()
    assert len(quiet.parts) == len(parts) - 2, "5 % of 32, one at least"
    assert np.square(quiet.parts).max() < np.square(parts[5]).max()
    assert quiet.ratio(OURS).value < 0.35 < replace(measured, parts=parts).ratio(OURS).high


@pytest.mark.slow
def test_a_batch_that_is_there_is_not_measured_again_and_one_that_is_lost_comes_back_the_same(folder: Path):
    before = results(folder)
    last = sorted((folder / "out" / "small, 3 tokens").glob("batch-*.npz"))[-1]
    last.unlink()
    assert "batch 1/1" in run(folder)
    for old, new in zip(before, results(folder), strict=True):
        assert new["ratio"]["value"] == pytest.approx(old["ratio"]["value"], rel=1e-4)  # fp32, sums in another order
