"""The command itself: its help comes at once."""

import os
import subprocess
import sys
from pathlib import Path

from megatron_hybrid.cli.train import main

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
