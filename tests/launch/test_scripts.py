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


STOPPED = """
export SLURM_JOB_NAME=run SLURM_JOB_ID=7 SLURM_JOB_NODELIST=n SLURM_JOB_NUM_NODES=1 SLURM_RESTART_COUNT="$2"
scontrol() { printf 'scontrol %s\\n' "$*"; }
srun() { printf '%s' "$saves" > "$RUN_DIR/own/latest_checkpointed_iteration.txt"; return "$ends"; }
RUN_DIR="$1" saves="$3" ends="$4"
mkdir -p "$RUN_DIR/own"
source slurm/env.sh
train --save "$RUN_DIR/own"
"""
"""An attempt that is stopped after it has saved; srun and scontrol are stand-ins, of a Slurm that is not asked here."""


def stopped(folder, attempt, saves, status=75):
    """Status and words of the attempt whose last checkpoint is `saves` when its ranks end with `status`."""
    command = ["bash", "-euo", "pipefail", "-c", STOPPED, "job", str(folder), str(attempt), saves, str(status)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout


def test_a_job_that_is_stopped_again_and_again_without_a_new_checkpoint_is_given_up(tmp_path):
    for attempt, saves in enumerate(["4", "4", "9", "9", "9"]):  # never three in a row that saved nothing
        returncode, said = stopped(tmp_path, attempt, saves)
        assert returncode == 0 and "scontrol requeue 7" in said, attempt
    returncode, said = stopped(tmp_path, 5, "9")
    assert returncode == 75 and "requeue" not in said
    assert "given up: 3 attempts in a row have left no new checkpoint" in said
    # Stopped before its ranks were there: nothing that a save has to do with.
    assert "scontrol requeue 7" in stopped(tmp_path, 6, "9", status=143)[1]
    assert stopped(tmp_path, 7, "9", status=3)[0] == 3


def test_there_are_scripts():
    assert len(JOBS) == 4 and len(SHELL) > len(JOBS)
