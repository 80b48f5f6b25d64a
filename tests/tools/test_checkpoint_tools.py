import argparse
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def load(name):
    spec = spec_from_file_location(name, TOOLS / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["convert_checkpoint", "inspect_checkpoint", "prune_checkpoint"])
def test_help_is_answered_without_torch(name):
    code = (
        f"import sys, runpy; sys.argv = ['{name}.py', '--help']\n"
        f"try: runpy.run_path({str(TOOLS / f'{name}.py')!r}, run_name='__main__')\n"
        "except SystemExit as end: code = end.code\n"
        "sys.exit(code or ('torch' in sys.modules and 9))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert any(flag in done.stdout for flag in ("--save", "hf-to-megatron", "--all"))


def test_layer_numbers_take_ranges():
    layer_numbers = load("prune_checkpoint").layer_numbers
    assert layer_numbers("3,12-14") == [3, 12, 13, 14]
    with pytest.raises(argparse.ArgumentTypeError, match="3,12-14"):
        layer_numbers("3;4")


def test_a_wrong_folder_is_one_sentence_not_a_traceback(tmp_path):
    command = [
        sys.executable,
        TOOLS / "convert_checkpoint.py",
        "hf-to-megatron",
        "--load",
        tmp_path,
        "--save",
        tmp_path / "x",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error:" in done.stderr and "config.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_inspecting_a_folder_without_a_model_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["inspect_checkpoint.py", str(tmp_path)])
    assert load("inspect_checkpoint").main() == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]  # torch has its own to say
    assert said.startswith("error:") and "torch_dist" in said
