"""Every rollout of a collection is learnt from once per epoch, in whole groups."""

import pytest

from megatron_hybrid.train.updates import Updates


def test_one_step_per_collection_takes_all_rows_in_order():
    updates = Updates(1, 1)
    for step in (0, 1, 17):
        assert updates.is_first(step)
        assert updates.rows(step, num_rows=8, group_size=4, seed=1) == list(range(8))
        assert updates.prompts_before(step, 2) == 2 * step


@pytest.mark.parametrize(("mini_batches", "epochs"), [(3, 1), (1, 2), (3, 2)])
def test_an_epoch_goes_through_every_row_once(mini_batches, epochs):
    updates = Updates(mini_batches, epochs)
    rows, size = 24, 4
    for collection in range(2):
        first = collection * updates.steps
        assert [updates.is_first(first + i) for i in range(updates.steps)] == [True] + [False] * (updates.steps - 1)
        for epoch in range(epochs):
            seen: list[int] = []
            for part in range(mini_batches):
                taken = updates.rows(first + epoch * mini_batches + part, num_rows=rows, group_size=size, seed=1)
                assert len(taken) == rows // mini_batches
                groups = [taken[i : i + size] for i in range(0, len(taken), size)]
                assert all(group == list(range(group[0], group[0] + size)) and group[0] % size == 0 for group in groups)
                seen += taken
            assert sorted(seen) == list(range(rows))


def test_epochs_and_collections_are_dealt_out_differently_and_repeatably():
    updates = Updates(2, 2)
    deals = [tuple(updates.rows(step, num_rows=64, group_size=2, seed=1)) for step in range(8)]
    assert len({deals[0], deals[2], deals[4], deals[6]}) == 4
    assert deals[3] == tuple(updates.rows(3, num_rows=64, group_size=2, seed=1))
    assert deals[3] != tuple(updates.rows(3, num_rows=64, group_size=2, seed=2))


def test_the_steps_of_a_first_epoch_are_those_that_see_their_rollouts_first():
    assert [Updates(2, 3).in_first_epoch(step) for step in range(8)] == [True, True, *[False] * 4, True, True]
    assert all(Updates(1, 1).in_first_epoch(step) for step in range(4))


def test_prompts_go_on_where_the_last_collection_ended():
    updates = Updates(3, 2)
    assert [updates.prompts_before(step, 5) for step in (0, 5, 6, 11, 12)] == [0, 0, 15, 15, 30]
