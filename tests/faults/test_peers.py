"""Where one rank dies, hangs or fails, the others stop with one sentence that says which, and where it was."""

from __future__ import annotations

import os
import re
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from megatron_hybrid.errors import RewardError
from megatron_hybrid.train import journal
from megatron_hybrid.train import peers as peers_module
from megatron_hybrid.train.peers import Entry, Peers, _space, explanation, is_broken_off
from tests.faults.kills import SIZE, settings
from tests.faults.traps import At, Kill

HERE = Entry(7, 3, "update", 1000.0, "here", os.getpid(), _space())


def test_who_has_an_error_of_its_own_is_named_with_it():
    entries = {0: replace(HERE, error=""), 1: replace(HERE, error="RewardError: 3 is no text."), 2: HERE}
    said = explanation(0, 3, entries)
    assert "rank 0 waited in stage update of step 3, and rank 1 had ended in stage update of step 3" in said
    assert "with RewardError: 3 is no text." in said


def test_who_is_furthest_behind_is_named_and_not_who_waits_for_it():
    behind = replace(HERE, number=5, stage="reward", since=930.0, host="there", pid=4, space="elsewhere")
    entries = {0: replace(HERE, error=""), 1: HERE, 2: behind, 3: replace(HERE, error="")}
    said = explanation(0, 4, entries, now=1000.0)
    assert "and rank 2 (pid 4 on there) did not come: last seen entering stage reward of step 3, 70 s ago, dead" in said
    assert "one of ranks 1, 2 (" in explanation(0, 4, entries | {1: behind}, now=1000.0)


def test_a_process_of_this_machine_is_known_to_be_gone_stopped_or_running():
    process = subprocess.Popen(["sleep", "60"])
    entries = {0: replace(HERE, error=""), 1: replace(HERE, pid=process.pid)}
    try:
        assert "its process is running" in explanation(0, 2, entries)
        process.send_signal(19)
        while "T" not in Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]:
            time.sleep(0.01)
        assert "its process is stopped" in explanation(0, 2, entries)
    finally:
        process.kill()
    while "its process is" in (said := explanation(0, 2, entries)):  # until it is a zombie, which holds nothing
        time.sleep(0.01)
    assert f"its peer has died, rank 1 (pid {process.pid} on here) in stage update of step 3" in said
    process.wait()
    assert "its peer has died, rank 1" in explanation(0, 2, entries)


def test_nobody_is_accused_where_all_waited_or_somebody_never_came():
    assert "so did every other rank" in explanation(0, 2, {0: HERE, 1: replace(HERE, error="")})
    assert "rank 1 had not come as far as the first step" in explanation(0, 2, {0: HERE})


def test_an_error_of_our_own_is_no_broken_collective():
    assert not is_broken_off(RewardError("gloo is not a number"))
    assert not is_broken_off(ValueError("Connection closed"))
    assert is_broken_off(dist.DistBackendError("NCCL"))
    assert is_broken_off(RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:4"))


def warned_while_waiting() -> list[str]:
    """What the thread of a rank says that waits for the others: as under NCCL, where no exception comes."""
    said: list[str] = []
    # Not a handler: jobs before this one may have changed what loggers let through.
    peers_module.logger = SimpleNamespace(error=lambda text, *given: said.append(text % given))  # type: ignore[assignment]
    peers = Peers(timeout_s=1.0, by_itself=True)
    if dist.get_rank() == 0:
        peers.enter(1, "reward")
    dist.barrier()
    if dist.get_rank() == 1:
        peers.enter(1, "update")
        while not said:
            time.sleep(0.05)
    dist.barrier()
    return said


def test_where_no_exception_will_come_a_thread_says_it(rank_pool):
    _, said = rank_pool(2).run(warned_while_waiting)
    assert re.search(
        r"rank 1 waited in stage (start|update) of step [01], and rank 0 .*stage \w+ of step [01]", said[-1]
    )


@pytest.mark.procs
def test_a_rank_that_stops_is_named_within_the_timeout_and_the_journal_is_whole(ask, campaign):
    flags = settings(campaign.folder, "hangs", "DP 2") | {"distributed_timeout_seconds_after_init": 15}
    ends = ask(campaign.folder, "hangs", flags, SIZE, At(1, 5, "reward", "stop"))
    assert ends.codes == (1, -9), f"the launcher's part: whoever hangs is killed\n{ends.logs[0][-3000:]}"
    assert not ends.left
    *_, said = ends.logs[0].splitlines()
    assert re.match(
        r"error: rank 0 waited in stage \w+ of step 5, and rank 1 \(pid \d+ on .*\) did not come: last seen entering "
        r"stage reward of step 5, \d+ s ago, its process is stopped\.",
        said,
    )
    records = journal.read(campaign.folder / "hangs" / "metrics.jsonl")
    assert [record["step"] for record in records if record["kind"] == "step"] == [1, 2, 3, 4]


@pytest.mark.procs
def test_an_error_of_one_rank_is_told_by_the_other(ask, campaign):
    ends = ask(campaign.folder, "fails", settings(campaign.folder, "fails", "DP 2"), SIZE, At(1, 1, "teacher", "fail"))
    assert ends.codes == (1, 1)
    assert "rank 1 had ended in stage teacher of step 1 with ZeroDivisionError: of this rank alone" in ends.logs[0]
    assert "error: of this rank alone" in ends.logs[1] and "PeerError" not in ends.logs[1]


@pytest.mark.procs
def test_the_death_of_the_rank_that_keeps_the_store_is_told_too(ask, campaign):
    folder, trap = campaign.folder, Kill(f"{campaign.folder}/first.killed", 0, 1, "update")
    ends = ask(folder, "first", settings(folder, "first", "PP 2"), SIZE, trap)
    assert ends.codes == (-9, 1) and not ends.left
    *_, said = ends.logs[1].splitlines()
    assert re.match(
        r"error: rank 1 waited in stage \w+ of step 1, and rank 0 is dead or stopped, last seen in stage \w+ of", said
    )
