"""Where the hybrid method has nothing to add, the run is Megatron's own, to the last digit that is logged."""

from __future__ import annotations

import pytest

from tests.pretrain_jobs import run

LAYOUTS = [
    pytest.param(1, {}, id="one rank"),
    pytest.param(2, {"tensor_model_parallel_size": 2}, id="TP 2"),
    pytest.param(2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, id="TP 2, sequence parallel"),
    pytest.param(2, {"context_parallel_size": 2}, id="CP 2"),
    pytest.param(
        4,
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "num_virtual_stages_per_pipeline_rank": 2,
        },
        id="TP 2 x PP 2 interleaved",
    ),
]


@pytest.mark.parametrize(("size", "overrides"), LAYOUTS)
def test_demonstrations_through_the_op_are_megatrons_own_training(rank_pool, size, overrides):
    pool = rank_pool(size, init=False)
    stock, ours = pool.run(run, "stock", overrides)[-1], pool.run(run, "demonstrations", overrides)[-1]
    assert len(stock) == 4
    assert len({loss for loss, _ in stock}) == 4
    for mine, theirs in zip(ours, stock, strict=True):
        # Seven digits are logged; sums in another order may round the last of them the other way.
        assert [float(x) for x in mine] == pytest.approx([float(x) for x in theirs], rel=1e-6)


def test_without_hybrid_the_run_is_bit_identical_to_one_without_the_package(rank_pool):
    pool = rank_pool(1, init=False)
    assert pool.run(run, "off", {})[-1] == pool.run(run, "stock", {})[-1]
