"""Groups as a rank sees them: no group is a group of one, and the ends of the pipeline know themselves."""

import pytest
import torch.distributed as dist

from megatron_hybrid.parallel import GroupView, ParallelContext


def view_of_world_and_of_nothing() -> tuple[tuple[int, int], tuple[int, int]]:
    world, nothing = GroupView.of(dist.group.WORLD), GroupView.of(None)
    return (world.rank, world.size), (nothing.rank, nothing.size)


def ranks_in_a_group_of_rank_one_alone() -> int:
    group = dist.new_group([1])
    return GroupView.of(group).rank if dist.get_rank() == 1 else -1


def test_a_group_tells_each_rank_its_place(rank_pool) -> None:
    assert rank_pool(2).run(view_of_world_and_of_nothing) == [((0, 2), (0, 1)), ((1, 2), (0, 1))]


def test_the_rank_is_the_one_inside_the_group(rank_pool) -> None:
    assert rank_pool(2).run(ranks_in_a_group_of_rank_one_alone) == [-1, 0]


def test_without_groups_one_rank_is_everything() -> None:
    context = ParallelContext()
    for axis in (context.tp, context.pp, context.dp, context.cp):
        assert (axis.group, axis.rank, axis.size) == (None, 0, 1)
    assert context.is_last_stage


@pytest.mark.parametrize(("rank", "last"), [(0, False), (1, False), (2, True)])
def test_only_the_end_of_the_pipeline_is_last(rank: int, last: bool) -> None:
    context = ParallelContext(pp=GroupView(rank=rank, size=3))
    assert context.is_last_stage == last
