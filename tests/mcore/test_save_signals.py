"""Whichever save is a run's first, the helper that Megatron's writer starts in it outlives the signal to stop."""

from __future__ import annotations

import os
import signal

from megatron_hybrid.mcore.checkpoint_io import checkpoint_folder


def save_twice_around_a_signal(folder: str) -> int:
    """Helpers that were signalled between a save of weights, this process's first, and the next."""
    import psutil
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_hybrid.mcore.second_model import save_weights
    from tests.tiny import megatron, start

    filesystem_async._results_queue = None  # an earlier job of this process may have saved
    with megatron(num_layers=1) as args:
        model = start(args)
        before = {child.pid for child in psutil.Process().children()}
        save_weights(model, f"{folder}/first")
        helpers = {child.pid for child in psutil.Process().children()} - before
        for helper in helpers:
            os.kill(helper, signal.SIGTERM)
        save_weights(model, f"{folder}/second")
    return len(helpers)


def test_weights_can_be_saved_again_after_the_signal_that_stops_the_job(rank_pool, tmp_path):
    (signalled,) = rank_pool(1, init=False).run(save_twice_around_a_signal, str(tmp_path))
    assert signalled, "else nothing was tried"
    assert checkpoint_folder(tmp_path / "second").is_dir()
