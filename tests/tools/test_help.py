"""A tool's `--help` is there at once: it loads no torch."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.mark.parametrize(
    ("tool", "flag"),
    [
        ("bench_ops.py", "--vocab"),
        ("bench_rollouts.py", "--never-stop"),
        ("plan_memory.py", "--teacher-load"),
        ("precompute_teacher.py", "--store"),
        ("preprocess_data.py", "--output-prefix"),
        ("profile_step.py", "profile"),
        ("soak.py", "--ranks"),
        ("study_training.py", "--seeds"),
        ("study_variance.py", "--reference-batches"),
        ("train_tokenizer.py", "--vocab-size"),
    ],
)
def test_help_loads_no_torch(tool: str, flag: str):
    start = f"runpy.run_path({str(TOOLS / tool)!r}, run_name='__main__')"
    code = f"import runpy, sys\nsys.argv = [{tool!r}, '--help']\ntry: {start}\nexcept SystemExit: pass\n"
    code += "print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert flag in shown and shown.endswith("False\n")
