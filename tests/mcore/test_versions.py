"""Versions beside the pinned one, each in a folder of its own: what they have of what is borrowed, and real runs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.mcore.symbols import ALSO_SEEN

ROOT = Path(__file__).parents[2]
COMPLETE = {"0.17.0": "0.17", "0.17.1": "0.17", "0.18.0": "0.18", "0.18.2": "0.18", "0.19.0": "0.19"}
"""Versions that have all that is asked of their generation, as README.md of the room says."""
REFUSED = {"0.16.1": "megatron.training.training.pretrain (No module named 'megatron."}
"""What the first lack is of those that do not: it has no `training`, and the pinned version's, found beside it, has not
its core."""
LOOK = """
import megatron.core
from megatron_hybrid.errors import MegatronMismatch
from megatron_hybrid.mcore import symbols

print(megatron.core.__file__)
try:
    symbols.check_megatron()
    print("complete", symbols.generation())
except MegatronMismatch as error:
    print("refused", error)
"""


@pytest.fixture(scope="module")
def run_on(tmp_path_factory) -> Callable[..., str]:
    """`run_on(version, *arguments of python)`: what it prints where `import megatron` finds that version."""
    folders: dict[str, Path] = {}

    def install(version: str) -> Path:
        if version not in folders:
            folder = tmp_path_factory.mktemp(version)
            install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
            done = subprocess.run([*install, f"megatron-core=={version}"], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"megatron-core {version} does not install here: {done.stderr.strip().splitlines()[-1]}")
            folders[version] = folder
        return folders[version]

    def run(version: str | None, *arguments: Any) -> str:
        path = {} if version is None else {"PYTHONPATH": str(install(version))}
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=ROOT, env=os.environ | path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-5000:]
        return done.stdout

    return run


@pytest.mark.slow
@pytest.mark.parametrize("version", [*COMPLETE, *REFUSED])
def test_a_version_has_what_its_generation_needs_or_is_refused_by_what_it_lacks(run_on, version):
    where, said = run_on(version, "-c", LOOK).splitlines()
    assert version in where
    if version in COMPLETE:
        assert said == f"complete {COMPLETE[version]}"
    else:
        assert said.startswith(f"refused megatron-core {version} has no {REFUSED[version]}")
        assert ". This package was seen to work with megatron-core 0.19.2: " in said
        assert said.endswith("A pretrain script of one's own also runs on 0.18.2 and 0.17.1.")


def last_line(printed: str) -> dict[str, Any]:
    """Behind what the ranks log."""
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def on_the_pinned_one(run_on, tmp_path_factory) -> dict[str, Any]:
    return last_line(run_on(None, "-m", "tests.mcore.version_jobs", tmp_path_factory.mktemp("pinned"), 2))


@pytest.mark.slow
@pytest.mark.parametrize("version", ALSO_SEEN)
def test_a_script_in_the_shape_of_its_version_trains_as_on_the_pinned_one(run_on, on_the_pinned_one, version, tmp_path):
    seen = last_line(run_on(version, "-m", "tests.mcore.version_jobs", tmp_path, 2))
    assert len(seen["stock"]) == 4
    assert seen["off"] == seen["stock"] == seen["own"]
    for mine, theirs in zip(seen["demonstrations"], seen["stock"], strict=True):
        # Seven digits are logged; sums in another order may round the last of them the other way.
        assert [float(x) for x in mine] == pytest.approx([float(x) for x in theirs], rel=1e-6)

    for run, teacher in (("checkpoint", "of another depth"), ("copy", "of the student")):
        records = seen[run]
        assert [record["kind"] for record in records] == ["step"] * 3 + ["eval"] * 2, teacher
        assert records[2]["actor/kl_loss"] > 1e-6 and records[2]["actor/grad_norm"] > 1e-3, teacher
        for mine, pinned in zip(records, on_the_pinned_one[run], strict=True):
            # Equal to the bit where it was seen; versions may sum in another order.
            assert mine == {
                name: pytest.approx(value, rel=1e-5, abs=1e-7, nan_ok=True) if isinstance(value, float) else value
                for name, value in pinned.items()
            }, (run, teacher)


@pytest.mark.slow
def test_where_pretrain_parses_the_program_of_ours_says_what_does_run(run_on):
    program = "import sys; from megatron_hybrid.cli.train import main; sys.argv = ['', '--hybrid']\ntry: main()"
    said = run_on("0.17.1", "-c", f"{program}\nexcept SystemExit as end: print(end)").splitlines()[-1]
    assert said.startswith("error: megatron-core 0.17.1 has no megatron.training.arguments.parse_and_validate_args (")
    assert said.endswith("A pretrain script of one's own also runs on 0.18.2 and 0.17.1.")
