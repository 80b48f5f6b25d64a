"""The scripts in slurm/ on a real Slurm of two nodes: a preempted job is queued again and goes on exactly."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_hybrid.runtime.spawn import free_port
from tests.launch.cluster import Cluster, cluster, why_not
from tests.launch.launched import SAVES_EVERY, STEPS, flags, steps_done
from tests.online_jobs import steps

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "slurm").glob("*.sbatch"))

pytestmark = pytest.mark.procs

WAITS_TO_BE_STOPPED = """
import os, signal, sys, time
attempt, rank, folder = os.environ.get("SLURM_RESTART_COUNT", "0"), os.environ["RANK"], sys.argv[1]
if attempt == "0":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())  # as after a checkpoint
with open(f"{folder}/attempt-{attempt}-rank-{rank}", "w") as file:
    file.write(os.environ["WORLD_SIZE"])
time.sleep(200 if attempt == "0" else 0)
"""
JOB = """#!/usr/bin/env bash
#SBATCH --job-name=waits --nodes=2 --ntasks-per-node=1 --requeue --open-mode=append
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source slurm/env.sh
launch "$@"
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(f"no Slurm: {reason}")
    with cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def knobs(folder: Path, **more: str) -> dict[str, str]:
    """What a user would set in env.sh for these nodes, which have no names and no GPUs."""
    here = {"RENDEZVOUS_HOST": "127.0.0.1", "RENDEZVOUS_PORT": str(free_port()), "NETWORK_INTERFACE": "lo"}
    return here | {"RUN_DIR": str(folder), "GRACE_S": "100"} | more


def submit(slurm: Cluster, script: str | Path, *arguments: str, log: Path, **more: str) -> str:
    """The job's id."""
    return slurm.run("sbatch", "--parsable", "--output", str(log), str(script), *arguments, **more).strip()


def wait_until(slurm: Cluster, what: str, happened: Callable[[], bool], job: str, folder: Path) -> None:
    """Until it has; an error shows what the job and its nodes have said."""
    deadline = time.monotonic() + 240
    while not happened():
        seen = slurm.job(job)
        if seen["JobState"] in ("FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT") or time.monotonic() > deadline:
            logs = "\n".join(f"{log}:\n{log.read_text()[-3000:]}" for log in sorted(folder.rglob("*.log")))
            raise AssertionError(f"{what}: the job is {seen['JobState']}, {seen['Reason']}\n{logs}\n{slurm.logs()}")
        time.sleep(0.3)


@pytest.mark.parametrize("script", SCRIPTS)
def test_slurm_takes_the_script(slurm, script):
    slurm.run("sbatch", "--test-only", f"slurm/{script}", "--train-iters", "1")


def test_a_preempted_job_is_told_goes_back_into_the_queue_and_comes_again_on_all_its_ranks(slurm, tmp_path):
    program, job, log = tmp_path / "waits.py", tmp_path / "job.sbatch", tmp_path / "job.log"
    program.write_text(WAITS_TO_BE_STOPPED)
    job.write_text(JOB)
    job_id = submit(slurm, job, str(program), str(tmp_path), log=log, **knobs(tmp_path, RANKS_PER_NODE="1"))

    def started(attempt: int) -> bool:
        return len(list(tmp_path.glob(f"attempt-{attempt}-rank-*"))) == 2

    wait_until(slurm, "both ranks wait", lambda: started(0), job_id, tmp_path)
    slurm.run("srun", "--partition=urgent", "--nodes=2", "--exclusive", "true")  # needs what the job has
    wait_until(slurm, "the job has ended", lambda: slurm.job(job_id)["JobState"] == "COMPLETED", job_id, tmp_path)
    assert started(1)
    assert (tmp_path / "attempt-1-rank-0").read_text() == "2"
    assert log.read_text().count("ended with status 75") == 1
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == [f"{job_id}.0", f"{job_id}.1"]


@pytest.mark.slow
def test_a_job_that_fails_is_not_tried_again(slurm, tmp_path):
    program, job, log = tmp_path / "fails.py", tmp_path / "job.sbatch", tmp_path / "job.log"
    program.write_text("raise SystemExit(3)")
    job.write_text(JOB)
    job_id = submit(slurm, job, str(program), log=log, **knobs(tmp_path, RANKS_PER_NODE="1", MAX_RESTARTS="0"))
    deadline = time.monotonic() + 120
    while slurm.job(job_id)["JobState"] in ("PENDING", "RUNNING", "COMPLETING"):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.3)
    ended = slurm.job(job_id)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")


@pytest.mark.slow
def test_a_run_on_two_nodes_that_is_preempted_once_ends_with_the_curve_of_an_uninterrupted_one(
    slurm, folder, uninterrupted
):
    expected = uninterrupted(4)
    run_dir = folder / "preempted"
    # The script gives the folders.
    command = flags(folder, "preempted", save=None, load=None, hybrid_run_dir=None)
    more = knobs(run_dir, RANKS_PER_NODE="2", OMP_NUM_THREADS="1")
    job_id = submit(slurm, "slurm/multi_node.sbatch", *command, log=folder / "preempted.log", **more)
    wait_until(
        slurm, "a step behind a checkpoint", lambda: steps_done(folder, "preempted") > SAVES_EVERY, job_id, run_dir
    )
    slurm.run("srun", "--partition=urgent", "--nodes=2", "--exclusive", "true")
    wait_until(slurm, "the job has ended", lambda: slurm.job(job_id)["JobState"] == "COMPLETED", job_id, run_dir)
    (before,) = run_dir.glob("config.before_step_*.json")
    assert SAVES_EVERY < int(before.stem.rpartition("_")[2]) < STEPS, (
        "it saved when it was told, and went on from there"
    )
    assert steps(folder, "preempted") == expected
