"""One rank of 8, 64 and 1024: nothing that it holds or sends grows with the job.

The other ranks are made up (torch's fake process group): a collective has its real shapes and sizes and leaves whatever
memory held in the others' places. So shapes, bytes and counts are looked at, never values.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

WORLDS = (8, 64, 1024)
N, COLUMNS = 512, 16
STATS_BYTES = 4 * 8
MERGED_BYTES_PER_RANK = 57
"""What a token takes for each rank of its group while statistics are merged: [tp, n, 8] gathered, and five fp32 numbers
and a boolean of [tp, n] that rescale them. Linear in tp, and in nothing else."""


def op(world: int, tp: int) -> dict[str, Any]:
    """On the last rank of a made-up world: the op in its group of tp, weighed and counted."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_hybrid.ops import eager
    from megatron_hybrid.ops.api import vocab_parallel_hybrid_loss
    from megatron_hybrid.parallel import GroupView
    from tests.memory import peak_bytes
    from tests.tools.plan_jobs import counted

    rank = world - 1
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    group = [dist.new_group(list(range(first, first + tp))) for first in range(0, world, tp)][rank // tp]
    student = torch.randn(N, COLUMNS).requires_grad_() * 1
    teacher, target = torch.randn(N, COLUMNS), torch.full((N,), rank % tp * COLUMNS)
    options: dict[str, Any] = {"advantage": 1.0, "inplace": True, "ignore_index": None, "group": group}
    shapes: list[tuple[int, ...]] = []

    def step() -> None:
        out = vocab_parallel_hybrid_loss(student * 1, teacher, target, **options)
        shapes.extend(tuple(value.shape) for value in out)
        out.loss.sum().backward(inputs=[student])

    # Blocks so small that the merge of the ranks' statistics weighs most.
    with counted() as calls, mock.patch.dict(eager._BLOCK_ELEMENTS, {"cpu": 4 * COLUMNS}):
        peak = peak_bytes(step)
    return {"calls": calls, "peak": peak, "shapes": shapes, "view": numbers(GroupView.of(group))}


def numbers(view: Any) -> dict[str, Any]:
    """What a GroupView holds beside torch's own group."""
    return {name: value for name, value in vars(view).items() if name != "group"}


def report(world: int) -> Any:
    """On the last rank of a made-up world: metrics of a step reduced over all of it, counted and weighed."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_hybrid.metrics import MEANINGS, Metrics
    from tests.memory import peak_bytes
    from tests.tools.plan_jobs import counted

    dist.init_process_group("fake", rank=world - 1, world_size=world, store=FakeStore())
    metrics = Metrics()
    for name in MEANINGS:
        metrics.mean(name, 1.0)
        metrics.max(f"{name}/max", 1.0)
    values: list[dict[str, float]] = []
    with counted() as calls:
        peak = peak_bytes(lambda: values.append(metrics.reduce(dist.group.WORLD)))
    return calls, peak, len(values[0])


def test_the_op_of_one_rank_does_not_grow_with_the_world(rank_pool):
    pool = rank_pool(1, init=False)
    small, *larger = (pool.run(op, world, 8)[0] for world in WORLDS)
    assert small["calls"] == {("megatron_hybrid.collectives", "all_gather_into_tensor"): (1, N * STATS_BYTES)}
    assert small["view"] == {"rank": 7, "size": 8}
    assert small["peak"] >= 8 * N * STATS_BYTES, "the gathered statistics must be seen, or this sees nothing"
    for other in larger:
        assert other == small


def test_with_the_tensor_parallel_group_only_what_it_gathers_grows(rank_pool):
    pool = rank_pool(1, init=False)
    by_tp = {tp: pool.run(op, 1024, tp)[0] for tp in (8, 16, 64)}
    for found in by_tp.values():  # what a rank sends, and what it gives, is the same
        assert (found["calls"], found["shapes"]) == (by_tp[8]["calls"], by_tp[8]["shapes"])
    for tp in (16, 64):
        assert by_tp[tp]["peak"] - by_tp[8]["peak"] == (tp - 8) * N * MERGED_BYTES_PER_RANK


@pytest.mark.parametrize("world", WORLDS[1:])
def test_reducing_metrics_costs_two_calls_of_one_size_on_any_number_of_ranks(rank_pool, world: int):
    pool = rank_pool(1, init=False)
    (small,), (large,) = pool.run(report, WORLDS[0]), pool.run(report, world)
    assert large == small
    assert small[0][("megatron_hybrid.metrics", "all_reduce")][0] == 2
