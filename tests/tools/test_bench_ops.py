"""The benchmark of the op as a user starts it, at sizes of seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "bench_ops.py"


def test_help_loads_no_torch():
    start = f"runpy.run_path({str(TOOL)!r}, run_name='__main__')"
    code = f"import runpy, sys\nsys.argv = ['bench_ops.py', '--help']\ntry: {start}\nexcept SystemExit: pass\n"
    code += "print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--vocab" in shown and shown.endswith("False\n")


@pytest.mark.procs
def test_one_table_names_every_contender_and_ours_are_right_and_lean(tmp_path: Path):
    options = ["--rows", "32", "--vocab", "1024", "--repeats", "1", "--dtype", "fp32", "--threads", "1", "--no-growth"]
    done = subprocess.run(
        [sys.executable, str(TOOL), *options, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=280,
        env=os.environ | {"COLUMNS": "140"},
    )
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
        assert name in done.stdout
    rows = {row["name"]: row for row in json.loads((tmp_path / "bench_ops.json").read_text())["fp32"]}
    for backend in ("torch", "compile"):
        assert rows[f"ours, {backend}"]["error"] < 1e-5  # the product's figure
    # The gradient is 1; the rest are the numbers of each of the 32 tokens, large only beside 1024 columns.
    assert 1 <= rows["ours, compile"]["memory"] < 1.5 < rows["autograd"]["memory"]
    assert (tmp_path / "bench_ops.png").stat().st_size > 0
