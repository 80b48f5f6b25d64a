"""The pool of ranks: what a job finds, what comes back, and what is left after each way of failing."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_hybrid.errors import ShapeError
from megatron_hybrid.runtime.spawn import RankPool

pytestmark = pytest.mark.procs


def environment() -> dict[str, str]:
    return dict(os.environ)


def process_id() -> int:
    return os.getpid()


def summed_rank(offset: int, *, scale: int) -> torch.Tensor:
    value = torch.tensor([scale * (dist.get_rank() + offset)])
    dist.all_reduce(value)
    return value


def fail_on_rank_one_while_others_wait() -> None:
    if os.environ["RANK"] == "1":
        raise ShapeError("rank one has the wrong shape")
    dist.barrier()


def hang_on_rank_zero() -> None:
    if os.environ["RANK"] == "0":
        time.sleep(60)


def die_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


class Stubborn(Exception):
    """Cannot be made again from what pickle keeps of it."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def raise_stubborn() -> None:
    raise Stubborn("two", "words")


def make_own_group() -> tuple[bool, str, int]:
    had_group = dist.is_initialized()
    dist.init_process_group("gloo")
    total = torch.ones(1)
    dist.all_reduce(total)
    return had_group, os.environ["MASTER_PORT"], int(total)


def initialise_megatron(tensor_parallel: int) -> tuple[bool, int]:
    from megatron.core import parallel_state

    was_initialised = parallel_state.model_parallel_is_initialized()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_parallel)
    return was_initialised, parallel_state.get_tensor_model_parallel_world_size()


def groups_in_a_cycle_and_a_cache() -> None:
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_hybrid.runtime import cpu

    initialise_megatron(1)
    assert parallel_state.model_parallel_is_initialized()
    cycle: list[Any] = [ProcessGroupCollection.use_mpu_process_groups()]
    cycle.append(cycle)
    with cpu.enabled():
        RotaryEmbedding(8, rotary_percent=1.0, use_cpu_initialization=True, cp_group=cycle[0].cp)(4)


def polling_threads() -> int:
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return names.count("gloo_tcp_loop")


def is_running(pid: int) -> bool:
    """False for a zombie too: whoever inherited it has not read its exit code, but it holds nothing."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int], seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@pytest.fixture(scope="module")
def pools(rank_pool: Callable[..., Any]) -> Iterator[dict[bool, Any]]:
    """Two ranks each, by `init`: a pool that makes a group for its life, and that of the session, which makes none."""
    with RankPool(2) as with_group:
        yield {True: with_group, False: rank_pool(2, init=False)}


def test_a_job_finds_what_torchrun_would_set(pools: dict[bool, Any]) -> None:
    for rank, seen in enumerate(pools[True].run(environment)):
        assert seen["RANK"] == seen["LOCAL_RANK"] == str(rank)
        assert seen["WORLD_SIZE"] == seen["LOCAL_WORLD_SIZE"] == "2"
        assert seen["MASTER_ADDR"] == "127.0.0.1"
        assert int(seen["MASTER_PORT"]) > 0
        assert seen["OMP_NUM_THREADS"] == "1"


def test_results_come_by_value_in_rank_order_through_one_gloo_group(pools: dict[bool, Any]) -> None:
    # ranks 0 and 1, each 10 * (rank + 3): 30 + 40
    assert [int(total) for total in pools[True].run(summed_rank, 3, scale=10)] == [70, 70]


def test_the_same_processes_serve_every_job(pools: dict[bool, Any]) -> None:
    first = pools[True].run(process_id)
    assert pools[True].run(process_id) == first
    assert len({os.getpid(), *first}) == 3


def test_the_parents_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with RankPool(1, init=False) as pool:
        assert pool.run(environment)[0]["OMP_NUM_THREADS"] == "1"
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_a_failing_rank_is_reported_at_once_though_others_wait_and_the_pool_is_dead() -> None:
    pool = RankPool(2)
    pids = pool.run(process_id)
    begin = time.monotonic()
    with pytest.raises(ShapeError, match="rank one has the wrong shape") as caught:
        pool.run(fail_on_rank_one_while_others_wait)
    assert time.monotonic() - begin < 30, "rank 0 waits 300 s in its barrier: nobody may wait for it"
    note = "\n".join(caught.value.__notes__)
    assert "rank 1 of 2" in note and "fail_on_rank_one_while_others_wait" in note
    assert not pool.alive
    assert wait_until_gone(pids, seconds=5) == []
    with pytest.raises(RuntimeError, match="make a new RankPool"):
        pool.run(process_id)


def test_an_error_that_cannot_be_sent_arrives_as_its_traceback() -> None:
    with RankPool(1, init=False) as pool, pytest.raises(RuntimeError, match=r"(?s)rank 0 of 1.*Stubborn: twowords"):
        pool.run(raise_stubborn)


def test_a_job_over_its_time_is_ended_and_says_which_ranks_were_late(capfd: pytest.CaptureFixture[str]) -> None:
    with RankPool(2, timeout_s=3) as pool:
        pids = pool.run(process_id)
        with pytest.raises(TimeoutError, match=r"hang_on_rank_zero took longer than 3 s on rank\(s\) \[0\] of 2"):
            pool.run(hang_on_rank_zero)
    stacks = capfd.readouterr().err
    assert "in hang_on_rank_zero" in stacks.partition("rank 1 of 2:")[0], "the stack of the rank that hangs"
    assert wait_until_gone(pids, seconds=5) == []


def test_a_rank_that_dies_is_named_with_its_signal() -> None:
    with RankPool(2) as pool, pytest.raises(RuntimeError, match="rank 1 of 2 died .* exit code -9"):
        pool.run(die_on_rank_one)


def test_a_rank_killed_between_jobs_is_named_by_the_next_one() -> None:
    with RankPool(1, init=False) as pool:
        (pid,) = pool.run(process_id)
        os.kill(pid, signal.SIGKILL)
        assert wait_until_gone([pid], seconds=5) == []
        with pytest.raises(RuntimeError, match="rank 0 of 1 died"):
            pool.run(process_id)


def test_jobs_may_make_their_own_group_one_after_another(pools: dict[bool, Any]) -> None:
    first, second = (pools[False].run(make_own_group) for _ in range(2))
    assert [(had, total) for had, _, total in first + second] == [(False, 2)] * 4
    assert first[0][1] != second[0][1], "a fresh port each time: the last group's store may still hold its own"


@pytest.mark.parametrize("init", [True, False])
def test_megatron_starts_fresh_in_every_job(pools: dict[bool, Any], init: bool) -> None:
    assert pools[init].run(initialise_megatron, 2) == [(False, 2)] * 2
    assert pools[init].run(initialise_megatron, 1) == [(False, 1)] * 2
    # A group has a thread that polls, and Megatron makes twenty groups.
    idle = pools[init].run(polling_threads)
    pools[init].run(groups_in_a_cycle_and_a_cache)
    assert all(now <= before for now, before in zip(pools[init].run(polling_threads), idle, strict=True))


SCRIPT = """
import os, sys, time
from multiprocessing import get_context
from megatron_hybrid.runtime.spawn import RankPool

def say_and_hang():
    helper = get_context("spawn").Manager()  # as Megatron's checkpoint writer keeps one
    os.write(1, f"{os.getpid()} {helper._process.pid}\\n".encode())  # whole lines: both ranks write to one pipe
    time.sleep(0 if sys.argv[1] == "leave" else 60)

if __name__ == "__main__":
    pool = RankPool(2, init=False)
    if sys.argv[1] == "fork" and os.fork() == 0:
        os.write(1, f"{os.getpid()} 0\\n".encode())
        time.sleep(60)
    pool.run(say_and_hang)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def start(script: Path, how: str) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, str(script), how], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root}
    )


def test_a_script_that_forgets_to_close_its_pool_still_ends(script: Path) -> None:
    with start(script, "leave") as process:
        said, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    assert wait_until_gone([int(pid) for pid in said.split()], seconds=5) == []


def test_ranks_and_their_helpers_end_with_a_parent_that_is_killed_in_the_middle_of_a_job(script: Path) -> None:
    with start(script, "hang") as process:
        assert process.stdout is not None
        pids = [int(pid) for _ in range(2) for pid in process.stdout.readline().split()]
        process.kill()
    assert len(pids) == 4
    assert wait_until_gone(pids, seconds=10) == []


def test_ranks_end_though_a_fork_of_their_killed_parent_lives_on(script: Path) -> None:
    with start(script, "fork") as process:
        assert process.stdout is not None
        fork = int(process.stdout.readline().split()[0])
        try:
            pids = [int(pid) for _ in range(2) for pid in process.stdout.readline().split()]
            process.kill()
            assert wait_until_gone(pids, seconds=20) == []
        finally:
            os.kill(fork, signal.SIGKILL)


def test_a_pool_of_no_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one rank"):
        RankPool(0)
