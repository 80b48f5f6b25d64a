"""The fused LM head on a vocabulary split over real gloo ranks: the whole vocabulary's loss, dh and dW."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_hybrid.ops.lm_head import linear_hybrid_loss
from tests.ops.lm_head_problem import Problem, assert_close, judged, problem
from tests.ranks import Ranks

Pools = Callable[..., Ranks]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"student_temperature": 0.7, "vocab_size": 43, "logit_softcap": 3.0, "logit_scale": 1.5},
    {"divergence": "jsd", "one_pass": True},
    {"one_pass": True, "vocab_size": 23},  # ranks that hold padding only
]


def run_shard(p: Problem, options: dict[str, Any], chunk_size: int = 7) -> dict[str, Tensor]:
    """On each rank: outputs, dh and its own rows of dW."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    states, head = p.teacher
    hidden = p.hidden.clone().requires_grad_()
    weight = p.weight.chunk(ranks)[rank].clone().requires_grad_()
    out = linear_hybrid_loss(
        hidden,
        weight,
        (states, head.chunk(ranks)[rank]),
        p.target,
        imitation_weight=p.imitation_weight,
        advantage=p.advantage,
        group=dist.group.WORLD,
        chunk_size=chunk_size,
        **options,
    )
    out.loss.sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return {name: value.detach() for name, value in out._asdict().items()} | {
        "hidden_grad": hidden.grad,
        "weight_grad": weight.grad,
    }


def collectives(p: Problem, one_pass: bool, sum_hidden_grad: bool) -> tuple[list[str], list[str]]:
    """On each rank: names of the collectives in a forward of four chunks, and in its backward."""
    hidden, weight = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
    options = {"one_pass": one_pass, "sum_hidden_grad": sum_hidden_grad, "group": dist.group.WORLD, "chunk_size": 6}

    def during(run: Callable[[], Any]) -> tuple[Any, list[str]]:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            result = run()
        return result, [event.name for event in seen.events() or [] if event.name.startswith("c10d::")]

    out, forwards = during(lambda: linear_hybrid_loss(hidden, weight, None, p.target, advantage=1.0, **options))
    _, backwards = during(out.loss.sum().backward)
    return forwards, backwards


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_vocabulary_shards_give_the_whole_heads_loss_and_gradients(rank_pool: Pools, ranks: int, options: dict):
    p = problem()
    if "vocab_size" in options:
        p.target.remainder_(options["vocab_size"])
    shards = rank_pool(ranks).run(run_shard, p, options)
    loss, hidden_grad, weight_grad = judged(p, **{k: v for k, v in options.items() if k != "one_pass"})
    for shard in shards:
        assert all(torch.equal(shard[name], shards[0][name]) for name in shard if name != "weight_grad")
    assert_close(shards[0]["loss"], loss)
    assert_close(shards[0]["hidden_grad"], hidden_grad)
    assert_close(torch.cat([shard["weight_grad"] for shard in shards]), weight_grad)


def test_skipped_rows_and_no_rows_at_all_need_the_same_collectives_on_every_rank(rank_pool: Pools):
    p = problem()
    p.target[::3] = -100
    kept = p.target != -100
    shards = rank_pool(2).run(run_shard, p, {})
    _, hidden_grad, weight_grad = judged(p.take(kept))
    assert_close(shards[1]["hidden_grad"][kept], hidden_grad)
    assert_close(torch.cat([shard["weight_grad"] for shard in shards]), weight_grad)
    p.target.fill_(-100)
    for shard in rank_pool(2).run(run_shard, p, {}):
        assert shard["weight_grad"].eq(0).all() and shard["hidden_grad"].eq(0).all()


def test_a_partial_gradient_is_left_to_whoever_sums_it(rank_pool: Pools):
    p = problem()
    first, second = rank_pool(2).run(run_shard, p, {"sum_hidden_grad": False})
    _, hidden_grad, _ = judged(p)
    assert_close(first["hidden_grad"] + second["hidden_grad"], hidden_grad)
    assert not torch.equal(first["hidden_grad"], second["hidden_grad"])


@pytest.mark.parametrize("one_pass", [False, True])
def test_each_chunk_gathers_once_and_sums_its_hidden_gradient_once(rank_pool: Pools, one_pass: bool):
    for forwards, backwards in rank_pool(2).run(collectives, problem(), one_pass, True):
        gathers, sums = ([name for name in forwards + backwards if kind in name] for kind in ("allgather", "allreduce"))
        assert len(gathers) == len(sums) == 4 and len(forwards + backwards) == 8
        assert len(backwards) == (0 if one_pass else 4)
    for forwards, backwards in rank_pool(2).run(collectives, problem(), one_pass, False):
        assert len(forwards) == 4 and backwards == []
