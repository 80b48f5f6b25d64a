"""Whatever goes wrong in a reward's own process is an error of that response alone, and the next one is scored."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.errors import ConfigError, RewardError
from megatron_hybrid.records import Prompt
from megatron_hybrid.rewards import worker_output
from megatron_hybrid.rewards.sandbox import Limits
from megatron_hybrid.rewards.worker_output import WorkerOutput
from megatron_hybrid.rewards.worker_pool import WorkerPool

OBEY = "tests.rewards.faulty_rewards:obey"
PROMPT = Prompt(7, (1,), "question", "sums", "42", {"record": {"level": 10}})
LIMITS = Limits(seconds=60, memory_gib=4)
"""Seconds: enough for any answer on a busy machine."""


def pool(folder: Path, *, name: str = OBEY, size: int = 1, limits: Limits = LIMITS) -> WorkerPool:
    output = WorkerOutput(folder / "output.log")
    return WorkerPool(name, name, size=size, file_reward="exact_match", limits=limits, output=output)


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> WorkerPool:
    return pool(tmp_path_factory.mktemp("shared"))


def judged(of: WorkerPool, *responses: str) -> list[Any]:
    return of.score_all([PROMPT] * len(responses), responses)


def gone(pid: int) -> bool:
    """Within ten seconds: a process that was killed takes a moment to be gone, and may wait for its parent."""
    for _ in range(1000):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "raise nothing",
            r"obey, on prompt 7 \(task 'sums': 'question'\).*raised KeyError: 'nothing' \(.*faulty_r",
        ),
        ("text", "returned a str, 'good': expected a number"),
        ("none", "returned a NoneType, None: expected a number"),
        ("list", r"returned a list, \[1.0, 2.0\]: expected a number"),
        ("huge", "returned a int, .*: expected a number"),
        ("hoard 5", "raised MemoryError"),
        ("exit", "raised SystemExit: 3"),
        ("leave", "ended its process with exit code 4"),
        ("crash", "ended its process by the signal SIGSEGV"),
    ],
)
def test_a_fault_is_named_and_the_responses_around_it_are_scored(shared, fault, message):
    before, error, after = judged(shared, "1.5", fault, "2")
    assert (before, after) == (1.5, 2)
    assert isinstance(error, RewardError)
    with pytest.raises(RewardError, match=message):
        raise error


@pytest.mark.parametrize("fault", ["hang", "spin"])
def test_what_hangs_is_ended_even_if_it_never_lets_the_interpreter_go(tmp_path, fault):
    ours = pool(tmp_path, limits=Limits(0.5, 4))
    error, after = judged(ours, fault, "2")
    assert "took longer than 0.5 s" in str(error) and after == 2
    output, deadline = tmp_path / "output.log", time.monotonic() + 10  # a thread writes it
    while not (output.exists() and "faulty_rewards.py" in output.read_text()):
        assert time.monotonic() < deadline, "where it was is in its output"
        time.sleep(0.05)


def test_numbers_that_are_not_finite_arrive_for_the_rubric_to_refuse(shared):
    found = judged(shared, "nan", "infinity")
    assert str(found) == "[nan, -inf]"


def test_what_a_hanging_reward_has_started_ends_with_it(tmp_path):
    (error,) = judged(pool(tmp_path, limits=Limits(2, 4)), f"orphan {tmp_path}/pids")
    assert "took longer" in str(error)
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_a_process_is_used_again_until_it_is_lost(shared):
    first, again = judged(shared, "pid", "pid")
    assert first == again != os.getpid()
    assert judged(shared, "pid") == [first]
    _, other = judged(shared, "leave", "pid")
    assert other != first and gone(int(first))


def test_several_processes_score_at_a_time(tmp_path):
    found = judged(pool(tmp_path, size=2), *["pid"] * 20)
    assert 1 <= len(set(found)) <= 2
    slow = judged(pool(tmp_path, size=2, limits=Limits(1, 4)), "hang", "1", "2", "3")
    assert slow[1:] == [1, 2, 3]


def test_a_million_lines_fill_neither_the_log_nor_the_disk(tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setattr(worker_output, "LARGEST_FILE_BYTES", 10_000)
    ours = pool(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert judged(ours, "print 1000000", "2") == [1.0, 2.0]
    assert (tmp_path / "output.log").stat().st_size == 10_000
    assert [record.message for record in caplog.records].count(
        f"nothing more of what rewards print is kept in {tmp_path}/output.log: it is full, at 10000 bytes"
    ) == 1
    assert capfd.readouterr().out == ""


def test_output_that_cannot_be_kept_costs_no_score(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    output = WorkerOutput(tmp_path / "file" / "output.log")
    ours = WorkerPool(OBEY, OBEY, size=1, file_reward="exact_match", limits=LIMITS, output=output)
    assert judged(ours, "print 3", "print 3") == [1.0, 1.0]


def test_other_rewards_can_be_made_in_processes_too(tmp_path):
    ours = pool(tmp_path, name="math_answer")
    assert judged(ours, "42.0", "41") == [1.0, 0.0]


def test_a_reward_that_cannot_be_made_there_ends_the_run_with_what_was_wrong(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere:f cannot be made: the reward 'nowhere:f' cannot be imported"):
        judged(pool(tmp_path, name="nowhere:f"), "1")


def test_a_mistake_in_a_reward_of_ours_is_not_a_failed_sample(tmp_path):
    broken = Prompt(7, (1,), "question", "sums", "42", {"source": "jsonl", "record": None})
    ours = pool(tmp_path, name="python_tests")
    with pytest.raises(RuntimeError, match=r"python_tests is broken, in its own process:\nTraceback"):
        ours.score_all([broken], ["x = 1"])


RUN = """
import sys, time
from pathlib import Path
from tests.rewards.test_worker_pool import judged, pool
judged(pool(Path(sys.argv[1])), f"orphan {sys.argv[1]}/pids")
"""


def test_no_process_outlives_a_run_that_is_killed(tmp_path):
    run = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)], cwd=Path(__file__).parents[2])
    try:
        for _ in range(3000):
            if (tmp_path / "pids").exists() and " " in (tmp_path / "pids").read_text():
                break
            time.sleep(0.02)
        worker, child = map(int, (tmp_path / "pids").read_text().split())
        run.send_signal(signal.SIGKILL)
        assert gone(worker)
        os.kill(child, signal.SIGKILL)  # what a reward starts is its own business where the run is killed
    finally:
        run.kill()
        run.wait()
