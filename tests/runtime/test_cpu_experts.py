"""Mixture-of-experts models on the CPU: both of Megatron's gloo-capable dispatchers give the gradient of one rank."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.gradient import assert_same, whole
from tests.model_step import logits_of, step

EXPERTS = {"num_experts": 4, "moe_router_topk": 2, "moe_router_load_balancing_type": "none"}
SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}  # training with tp demands it
EP = {"expert_model_parallel_size": 2}


@pytest.fixture(scope="module")
def one_rank(rank_pool):
    ranks = rank_pool(1, init=False).run(step, EXPERTS | {"moe_token_dispatcher_type": "allgather"}, "model")
    return logits_of(ranks), whole(ranks)


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
@pytest.mark.parametrize(
    ("size", "layout"),
    [
        pytest.param(1, {}, id="one rank"),
        pytest.param(2, SP, id="TP 2 + SP"),
        pytest.param(2, {"pipeline_model_parallel_size": 2}, id="PP 2"),
        pytest.param(2, EP, id="DP 2, EP 2"),
        pytest.param(2, SP | EP | {"expert_tensor_parallel_size": 1}, id="TP 2 + SP, EP 2"),
    ],
)
def test_experts_on_every_layout_give_the_gradient_of_one_rank(rank_pool, one_rank, size, layout, dispatcher):
    ranks = rank_pool(size, init=False).run(step, EXPERTS | layout | {"moe_token_dispatcher_type": dispatcher})
    logits, gradient = one_rank
    of_one_replica = ranks if "tensor_model_parallel_size" in layout else ranks[-1:]  # replicas see the same batch
    torch.testing.assert_close(logits_of(of_one_replica), logits, rtol=0, atol=5e-5)  # fp32 sums, logits of order 10
    # The router's gradient is a difference of the chosen experts' outputs, which cancel: twice the usual roundings.
    assert_same(whole(ranks), gradient, 2e-5)
