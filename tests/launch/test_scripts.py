"""Every shell script of the repository passes shellcheck, and those of slurm/ say what a job script has to say."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRACKED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
).stdout.split("\n")
SHELL = [name for name in TRACKED if name.endswith((".sh", ".sbatch")) or name == ".ci/run"]
JOBS = [name for name in SHELL if name.endswith(".sbatch")]


@pytest.mark.parametrize("script", SHELL)
def test_shellcheck_finds_nothing(script):
    shellcheck = Path(sys.executable).with_name("shellcheck")  # where pip puts a program
    done = subprocess.run([shellcheck, "--external-sources", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", JOBS)
def test_a_job_stops_at_the_first_error_and_is_told_in_time_to_save(script):
    text = (ROOT / script).read_text()
    assert "\nset -euo pipefail\n" in text
    assert "\n#SBATCH --requeue\n" in text
    (told,) = [line for line in text.splitlines() if line.startswith("#SBATCH --signal=")]
    grace = (ROOT / "slurm" / "env.sh").read_text().partition("GRACE_S:-")[2].partition("}")[0]
    assert told == "#SBATCH --signal=TERM@300" and int(grace) < 300


def test_there_are_scripts():
    assert len(JOBS) == 4 and len(SHELL) > len(JOBS)
