"""The command itself: its help comes at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hybrid.cli.train import main
from tests.tiny import command_line

ROOT = Path(__file__).parents[2]


def test_help_lists_our_flags_and_says_whose_the_others_are(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["megatron-hybrid-train", "--num-layers", "2", "--help"])
    main()
    printed = capsys.readouterr().out
    for flag in ("--hybrid-reward-weight", "--hybrid-teacher-load", "--hybrid-run-dir"):
        assert flag in printed
    assert "Every other flag is Megatron's own" in printed


def test_help_loads_neither_torch_nor_megatron():
    code = (
        "import sys; from megatron_hybrid.cli.train import main; sys.argv = ['train', '-h']; main(); "
        "assert not {'torch', 'megatron'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flags", [["--hybrid"], []], ids=["no prompts", "not hybrid"])
def test_without_prompts_the_command_says_what_it_needs(flags):
    argv = [*command_line(tokenizer_type="NullTokenizer")[1:], *flags]
    code = f"import sys; sys.argv[1:] = {argv!r}; from megatron_hybrid.cli.train import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "error: this program trains on rollouts and has no data of its own: give --hybrid, and" in done.stderr
