"""The Triton backend without a GPU: the op's own tests with interpreted kernels, and what it declines.

The interpreter must be asked for before triton is imported, so what needs it runs in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.ops.api import vocab_parallel_hybrid_loss

ROOT = Path(__file__).parents[2]


def run_interpreted(*arguments: str) -> None:
    """pytest with these arguments and the plugin of `interpreter.py`; fails as its tests do."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.ops.interpreter", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert " passed" in done.stdout


@pytest.mark.procs
def test_kernels_give_the_torch_backends_numbers_for_every_type_width_and_split():
    run_interpreted("tests/ops/interpreted_triton.py")


@pytest.mark.procs
@pytest.mark.slow
def test_the_ops_own_tests_pass_with_these_kernels():
    # Left out: 32 rows of 500, which interpreted take minutes (`interpreted_triton.py` has smaller ones), and equal
    # bits of rows that begin within a vector and of others that do not: these are summed in another order.
    run_interpreted("tests/ops/test_api.py", "-k", "not keeps_its_digits and not padded_columns_get")


@pytest.mark.procs
@pytest.mark.slow
def test_the_tests_of_the_other_divergences_pass_with_these_kernels():
    kept_out = "keep_their_digits or padded_columns or blocks_of_rows"  # as above
    run_interpreted("tests/ops/test_divergences.py", "-k", f"not compile and not ({kept_out})", "--timeout=1500")


@pytest.mark.procs
@pytest.mark.slow
def test_drawn_problems_on_drawn_shards_are_the_judges_with_these_kernels():
    run_interpreted("tests/ops/test_properties.py", "-k", "judges", "--timeout=1500")


def test_ground_truth_and_infinities_hold_with_these_kernels():
    run_interpreted("tests/ops/test_api.py", "-k", "ground_truth or one_rounding or forbidden or infinite or ignored")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")
def test_logits_on_a_cpu_are_declined_with_what_to_do():
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("interpreted kernels take them")
    with pytest.raises(ConfigError, match="logits are on cpu.*'torch'.*TRITON_INTERPRET"):
        vocab_parallel_hybrid_loss(torch.randn(2, 8), None, torch.zeros(2, dtype=torch.long), backend="triton")


def test_a_missing_triton_is_named(monkeypatch):
    from megatron_hybrid import ops

    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "megatron_hybrid.ops.triton_kernels", raising=False)
    monkeypatch.delattr(ops, "triton_kernels", raising=False)
    with pytest.raises(ConfigError, match="needs the package triton.*'torch'"):
        vocab_parallel_hybrid_loss(torch.randn(2, 8), None, torch.zeros(2, dtype=torch.long), backend="triton")


@pytest.mark.procs
def test_triton_is_not_imported_before_it_is_chosen():
    code = "import sys, megatron_hybrid.ops.api; sys.exit('megatron_hybrid.ops.triton_kernels' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
