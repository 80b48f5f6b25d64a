"""The list of borrowed symbols against every megatron-core that installs here, each in a folder of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LACKS = {"0.18.2": {"megatron.training.argument_utils.gpt_config_from_args"}, "0.19.0": set()}
"""What README.md of the room says of versions beside the pinned one."""
LOOK = """
import sys
sys.path.insert(0, sys.argv[1])
import megatron.core
from megatron_hybrid.errors import MegatronMismatch

assert megatron.core.__file__.startswith(sys.argv[1]), megatron.core.__file__
for module, name in symbols.BORROWED:
    try:
        symbols.borrow(module, name)
    except MegatronMismatch:
        print("lacks", f"{module}.{name}")
try:
    symbols.check_megatron()
    print("checked")
except MegatronMismatch as error:
    print("refused", error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", LACKS)
def test_a_version_has_what_the_readme_says_and_a_lack_is_told_before_anything_else(version, tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        tmp_path,
        f"megatron-core=={version}",
    ]
    installed = subprocess.run(command, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"megatron-core {version} does not install here: {installed.stderr.strip().splitlines()[-1]}")
    seen = subprocess.run([sys.executable, "-c", LOOK, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert seen.returncode == 0, seen.stderr
    said = seen.stdout.splitlines()
    assert {line.removeprefix("lacks ") for line in said if line.startswith("lacks ")} == LACKS[version]
    if LACKS[version]:
        assert any(line.startswith(f"refused megatron-core {version} has no ") for line in said)
    else:
        assert "checked" in said
