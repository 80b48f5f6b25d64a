"""Under torchrun: several nodes, ranks that die, agents that are asked to stop. The curve is that of one quiet run."""

from __future__ import annotations

import psutil
import pytest

from megatron_hybrid.runtime.spawn import free_port
from tests.launch.launched import SAVES_EVERY, STEPS, TRAIN, flags, rank_process, steps_done, torchrun, wait_for
from tests.online_jobs import steps

pytestmark = pytest.mark.procs


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_rank_restarts_all_from_the_last_checkpoint_and_the_curve_is_the_same(folder, uninterrupted, nodes):
    expected, name = uninterrupted(nodes), f"killed-of-{nodes}"
    node = ["--nnodes", str(nodes), "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--max-restarts", "1"]
    node += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", *TRAIN, *flags(folder, name)]
    logs = [folder / f"{name}-{i}.log" for i in range(nodes)]
    agents = [torchrun(log, *node) for log in logs]
    try:
        wait_for("a step behind a checkpoint", lambda: steps_done(folder, name) > SAVES_EVERY, logs[0], alive=agents)
        victim = rank_process(agents, 0)
        helpers = victim.children(recursive=True)
        victim.kill()
        assert not any(agent.wait(timeout=240) for agent in agents), "".join(log.read_text()[-4000:] for log in logs)
    finally:
        for agent in agents:
            agent.terminate()  # its ranks with it
            agent.wait()
    assert not psutil.wait_procs(helpers, timeout=10)[1], "the checkpoint writer's: nobody else would end it"
    assert nodes == 1 or "waited in stage" in "".join(log.read_text() for log in logs), "who died is named by the other"
    assert (folder / name / f"config.before_step_{SAVES_EVERY}.json").exists(), "it went on from a checkpoint"
    assert steps(folder, name) == expected


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_saves_at_once_and_goes_on_with_the_same_command(folder, uninterrupted):
    expected = uninterrupted(2)
    log, tracker = folder / "stopped.log", folder / "stopped-checkpoints" / "latest_checkpointed_iteration.txt"
    command = ["--standalone", "--nproc-per-node", "2", "--shutdown-timeout", "120", *TRAIN]
    command += flags(folder, "stopped", exit_signal_handler=True)
    agent = torchrun(log, *command)
    try:
        wait_for(f"step {SAVES_EVERY + 1}", lambda: steps_done(folder, "stopped") > SAVES_EVERY, log, alive=[agent])
        agent.terminate()
        agent.wait(timeout=150)
        assert SAVES_EVERY < int(tracker.read_text()) < STEPS, log.read_text()[-4000:]
        agent = torchrun(log, *command)
        assert agent.wait(timeout=240) == 0, log.read_text()[-4000:]
    finally:
        agent.terminate()
        agent.wait()
    assert steps(folder, "stopped") == expected


@pytest.mark.slow
def test_restarts_that_would_meet_stale_addresses_are_refused_before_the_first_start(folder):
    log = folder / "stale.log"
    arguments = ["--standalone", "--max-restarts", "1", *TRAIN, *flags(folder, "stale")]
    assert torchrun(log, *arguments, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="0").wait(timeout=150) == 1
    assert "Start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment." in log.read_text()
