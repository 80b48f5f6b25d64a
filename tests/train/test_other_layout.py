"""A run goes on under another layout: with equal weights, with the same prompts, and it says what is not exact."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.online_jobs import run, steps, with_teacher


@contextlib.contextmanager
def weights_written_before_the_first_step(folder: str) -> Iterator[None]:
    """As soon as Megatron has loaded them."""
    from megatron_hybrid.mcore.second_model import save_weights
    from megatron_hybrid.train.loop import OnlineLoop

    begin = OnlineLoop._begin

    def beginning(self: OnlineLoop, student: list[torch.nn.Module]) -> Any:
        save_weights(student, folder)
        return begin(self, student)

    with mock.patch.object(OnlineLoop, "_begin", beginning):
        yield


def go_on(folder: str, flags: dict[str, Any], loaded: str) -> list[str]:
    """The run on this rank, and what it has logged."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    ours = logging.getLogger("megatron_hybrid")
    ours.addHandler(handler)
    try:
        with weights_written_before_the_first_step(loaded):
            run(folder, flags)
    finally:
        ours.removeHandler(handler)
    return said


@pytest.mark.parametrize(
    "layout", [{"pipeline_model_parallel_size": 2}, pytest.param({}, marks=pytest.mark.slow)], ids=["PP 2", "DP 2"]
)
def test_from_tp_2_weights_are_equal_and_prompts_and_noise_go_on(rank_pool, folder: Path, layout: dict[str, Any]):
    from megatron_hybrid.mcore.checkpoint_io import load_megatron_state

    name = "-".join(layout) or "dp"
    common = {"save": f"{folder}/{name}-checkpoints", "save_interval": 2, "train_iters": 4, "lr_decay_iters": 4}
    common = with_teacher(folder, name) | common
    pool = rank_pool(2, init=False)
    tp = common | {"tensor_model_parallel_size": 2}
    whole = tp | {"save": f"{folder}/{name}-whole", "hybrid_run_dir": f"{folder}/{name}-whole-run"}
    pool.run(run, str(folder), whole)
    pool.run(run, str(folder), tp | {"exit_interval": 2})
    saved, _ = load_megatron_state(folder / f"{name}-checkpoints" / "iter_0000002")
    load = {"load": f"{folder}/{name}-checkpoints"}
    said = pool.run(go_on, str(folder), common | layout | load, f"{folder}/{name}-loaded")
    loaded, _ = load_megatron_state(folder / f"{name}-loaded")
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[key], loaded[key]) for key in saved)
    assert any("from step 2 on another layout: TP 2 x PP 1" in line and "not" in line.lower() for line in said[0])
    assert not any("another layout" in line for line in said[1]), "one rank says it for all"
    for ours, theirs in zip(steps(folder, name), steps(folder, f"{name}-whole-run"), strict=True):
        for key in ("critic/score/mean", "actor/kl_loss", "actor/grad_norm", "response_length/mean"):
            # The same responses, Adam's moments and gradients, up to fp32 sums in another order over two steps.
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-6), (ours["step"], key)
