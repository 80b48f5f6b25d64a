"""The benchmark as a user starts it, small and without other libraries: its rows, errors and memory, and no times."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "bench_ops.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, list[dict[str, Any]]], Path]:
    """What one small run of every part printed, its records by part, and its folder."""
    out = tmp_path_factory.mktemp("bench")
    options = ["--elements", "32768", "--vocab", "1024", "--repeats", "1", "--dtype", "fp32", "--threads", "1"]
    options += ["--tp", "2", "--head", "16", "8", "1024", "8", "--lengths", "32", "128", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(TOOL), *options],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"COLUMNS": "178"},
    )
    assert done.returncode == 0, done.stderr
    records = json.loads((out / "bench_ops.json").read_text())["records"]
    return done.stdout, {part: [r for r in records if r["part"] == part] for part in {r["part"] for r in records}}, out


def by_name(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {record["name"]: record for record in records}


@pytest.mark.procs
def test_one_table_names_every_contender_and_a_missing_library_says_so(run: Any):
    printed, records, out = run
    for name in (
        "ours, compile",
        "torch.compile of autograd",
        "trl",
        "liger",
        "modelopt",
        "ms-swift",
        "verl",
        "COMPUTED",
    ):
        assert name in printed and name in (out / "bench_ops.md").read_text()
    assert (out / "bench_ops.png").stat().st_size > 0
    for record in records["logits"]:
        assert record["note"] or record["time_s"] > 0


@pytest.mark.procs
def test_from_logits_ours_are_right_and_lean(run: Any):
    rows = by_name(run[1]["logits"])
    for backend in ("torch", "compile"):
        for name in (f"ours, {backend}", f"ours, {backend}, no teacher"):
            assert rows[name]["error"] < 1e-5 and not rows[name]["wrong"]  # the product's figure
    # The gradient is 1; the rest are the numbers of each of the 32 tokens, large only beside 1024 columns.
    assert 1 <= rows["ours, compile"]["memory"] < 1.5 < rows["autograd"]["memory"]


@pytest.mark.procs
def test_on_two_ranks_ours_send_32_bytes_once_and_autograd_sends_six_times(run: Any):
    rows = by_name(run[1]["parallel"])
    for backend in ("torch", "compile"):
        row = rows[f"ours, {backend}"]
        assert (row["tp"], row["collectives"], row["sent_bytes"]) == (2, 1, 32)
        assert row["error"] < 1e-5
    # Two maxima, two sums and the values forward, the student's sum backward: 4, 4, 4, 4, 12 and 4 bytes.
    assert (rows["autograd"]["collectives"], rows["autograd"]["sent_bytes"]) == (6, 32)
    assert rows["autograd"]["error"] < 1e-5


@pytest.mark.procs
def test_from_hidden_states_ours_are_right_and_hold_no_more_for_more_tokens(run: Any):
    rows = by_name(run[1]["heads"])
    assert {"four products, in chunks", "liger fused linear JSD, beta 1"} <= rows.keys()
    logits = 16 * 1024 * 4
    for passes in ("two passes", "one pass"):
        row = rows[f"ours, {passes}, compile"]
        assert row["error"] < 1e-5
        # 16 tokens more, each with a few numbers and 8 of dh in a few copies, where their logits would be 3 * logits
        assert row["extra"]["memory_bytes_longer"] - row["memory_bytes"] < 0.5 * logits
    row = rows["head, then ours from logits, compile"]
    assert row["extra"]["memory_bytes_longer"] - row["memory_bytes"] > 2.5 * logits  # the test can see logits


@pytest.mark.procs
def test_cost_to_go_is_right_beside_a_loop_and_a_matrix_that_grows(run: Any):
    records = run[1]["returns"]
    assert {record["tokens"] for record in records} == {32, 128}
    for record in records:
        assert record["error"] < 1e-5  # sums of 128 numbers in fp32
    longest = by_name([record for record in records if record["tokens"] == 128])
    assert longest["ours, cost_to_go"]["memory"] < 8 < longest["matrix of discounts"]["memory"]


@pytest.mark.procs
def test_growth_has_a_fitted_exponent_for_tokens_and_for_the_vocabulary(run: Any):
    seen = {(record["name"], record["extra"]["along"]) for record in run[1]["growth"]}
    assert seen == {(f"ours, {b}", along) for b in ("torch", "compile") for along in ("tokens", "vocabulary")}
    assert all(isinstance(record["extra"]["exponent"], float) for record in run[1]["growth"])
