"""A run outlives a disk that fills up, and holds no more after sixty steps than after twenty."""

from __future__ import annotations

import functools
import gc
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.full_disk import SmallDisk, small_disk
from tests.online_jobs import run, steps, with_teacher


def run_on_a_disk_that_fills(folder: str, overrides: dict[str, Any], disk: str, full: range) -> int:
    """A run whose disk is full after some of its steps; returns the steps that this rank has seen the end of."""
    import torch.distributed as dist
    from megatron.training import training

    small, seen = SmallDisk(Path(disk), ""), []

    @functools.wraps(training.training_log)
    def log(*args: Any, **kwargs: Any) -> Any:
        seen.append(len(seen) + 1)
        if dist.get_rank() == dist.get_world_size() - 1:
            if seen[-1] == full.start:
                small.fill()
            if seen[-1] == full.stop:
                small.free()
        return training_log(*args, **kwargs)

    training_log = training.training_log
    with mock.patch.object(training, "training_log", log):
        run(folder, overrides, plots=True)
    return len(seen)


def test_a_disk_that_fills_up_ends_no_rank_and_no_line_is_lost(rank_pool, folder, tmp_path):
    with small_disk(tmp_path / "disk", "2m") as disk:
        flags = with_teacher(folder, "", hybrid_run_dir=str(disk.path / "run"), hybrid_samples_interval=1)
        flags |= {"tensorboard_dir": str(disk.path / "tb"), "tensorboard_log_interval": 1, "tensorboard_queue_size": 1}
        job = (run_on_a_disk_that_fills, str(folder), flags, str(disk.path), range(2, 5))
        assert rank_pool(2, init=False).run(*job) == [6, 6]
        assert [step["step"] for step in steps(disk.path, "run")] == [1, 2, 3, 4, 5, 6]
        assert "after step 6" in (disk.path / "run" / "samples.md").read_text()
        assert (disk.path / "run" / "plots" / "overview.png").exists()


def held_after_steps(folder: str, overrides: dict[str, Any], looks: list[int]) -> tuple[list[int], list[str]]:
    """Tensors alive after some steps, and what of a step's payloads and micro-batches outlived it."""
    from megatron_hybrid.teachers.frozen import FrozenTeacher
    from megatron_hybrid.train.loop import OnlineLoop

    made: list[tuple[str, weakref.ref[Any]]] = []
    tensors, outlived = [], []
    annotate, after_step = FrozenTeacher.annotate, OnlineLoop.after_step

    def watched_annotate(self: FrozenTeacher, batches: Any) -> Any:
        payloads = annotate(self, batches)
        for payload in payloads:
            if payload is not None:
                made.extend([("payload", weakref.ref(payload)), ("hidden states", weakref.ref(payload.hidden))])
        made.extend(("micro-batch", weakref.ref(batch)) for batch in batches)
        return payloads

    def watched_step(self: OnlineLoop, record: dict[str, Any]) -> None:
        after_step(self, record)
        outlived.extend(f"{what} of step {record['iteration']}" for what, ref in made if ref() is not None)
        made.clear()
        if record["iteration"] in looks:
            gc.collect()
            tensors.append(sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects()))

    with (
        mock.patch.object(FrozenTeacher, "annotate", watched_annotate),
        mock.patch.object(OnlineLoop, "after_step", watched_step),
    ):
        run(folder, overrides)
    return tensors, outlived


def test_payloads_are_gone_after_their_step_and_nothing_is_left_of_sixty(rank_pool, folder):
    flags = with_teacher(folder, "held", train_iters=60, hybrid_samples_interval=10)
    ((tensors, outlived),) = rank_pool(1, init=False).run(held_after_steps, str(folder), flags, [20, 40, 60])
    assert outlived == []
    assert len(tensors) == 3
    assert max(tensors) == min(tensors), tensors
