"""The fused LM head against a teacher's top k: float64 autograd through the coarse KL and the head, also on shards."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hybrid.errors import ConfigError, ShapeError
from megatron_hybrid.ops.lm_head import linear_hybrid_loss
from megatron_hybrid.ops.topk import vocab_parallel_topk_hybrid_loss
from megatron_hybrid.records import TopKPayload
from tests.ops.lm_head_problem import Problem, assert_close, problem
from tests.ops.topk_cases import coarse_loss
from tests.ranks import Ranks

V = 43
OPTIONS = {"vocab_size": V, "student_temperature": 0.7, "logit_scale": 1.5}
MODES = pytest.mark.parametrize("one_pass", [False, True])


def top_k(p: Problem, k: int = 6) -> TopKPayload:
    states, head = p.teacher
    log_probs, ids = torch.log_softmax((states @ head.T)[:, :V].double(), dim=-1).topk(k)
    return TopKPayload(ids, log_probs.float())


def run(p: Problem, payload: TopKPayload, rank: int = 0, ranks: int = 1, **options: Any) -> dict[str, Tensor]:
    """Outputs, dh and this rank's rows of dW."""
    hidden = p.hidden.clone().requires_grad_()
    weight = p.weight.chunk(ranks)[rank].clone().requires_grad_()
    weights = {"imitation_weight": p.imitation_weight, "advantage": p.advantage}
    out = linear_hybrid_loss(hidden, weight, payload, p.target, **{"chunk_size": 5} | OPTIONS | weights | options)
    out.loss.sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    grads = {"hidden_grad": hidden.grad, "weight_grad": weight.grad}
    return {name: value.detach() for name, value in out._asdict().items()} | grads


def run_shard(p: Problem, payload: TopKPayload, one_pass: bool) -> dict[str, Tensor]:
    where = {"rank": dist.get_rank(), "ranks": dist.get_world_size(), "group": dist.group.WORLD}
    return run(p, payload, one_pass=one_pass, **where)


def judged(p: Problem, payload: TopKPayload) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [n], dh, dW) in float64."""
    hidden, weight = (x.double().requires_grad_() for x in (p.hidden, p.weight))
    case = {
        "student_temperature": OPTIONS["student_temperature"],
        "teacher_ids": payload.ids,
        "teacher_log_probs": payload.log_probs,
        "imitation_weight": p.imitation_weight,
        "advantage": p.advantage,
        "target": p.target,
    }
    loss = coarse_loss((OPTIONS["logit_scale"] * hidden @ weight.T)[:, :V], case)
    return loss.detach(), *torch.autograd.grad(loss.sum(), (hidden, weight))


@MODES
@pytest.mark.parametrize("chunk_size", [1, 5, 1000])
def test_loss_and_both_gradients_are_those_of_float64_autograd(chunk_size: int, one_pass: bool):
    p = problem()
    got, expected = run(p, top_k(p), chunk_size=chunk_size, one_pass=one_pass), judged(p, top_k(p))
    for name, want in zip(("loss", "hidden_grad", "weight_grad"), expected, strict=True):
        assert_close(got[name], want)
    assert got["weight_grad"][V:].eq(0).all()


@MODES
@pytest.mark.parametrize("ranks", [2, 4])
def test_vocabulary_shards_give_the_whole_heads_loss_and_gradients(
    rank_pool: Callable[..., Ranks], ranks: int, one_pass: bool
):
    p = problem()
    shards = rank_pool(ranks).run(run_shard, p, top_k(p), one_pass)
    loss, hidden_grad, weight_grad = judged(p, top_k(p))
    for shard in shards:
        assert all(torch.equal(shard[name], shards[0][name]) for name in shard if name != "weight_grad")
    assert_close(shards[0]["loss"], loss)
    assert_close(shards[0]["hidden_grad"], hidden_grad)
    assert_close(torch.cat([shard["weight_grad"] for shard in shards]), weight_grad)


def test_every_output_is_the_logits_ops_own():
    p = problem()
    p.target[2::3] = -100
    got, payload = run(p, top_k(p)), top_k(p)
    want = vocab_parallel_topk_hybrid_loss(
        OPTIONS["logit_scale"] * p.hidden @ p.weight.T,
        payload.ids,
        payload.log_probs,
        p.target,
        imitation_weight=p.imitation_weight,
        advantage=p.advantage,
        vocab_size=V,
        student_temperature=OPTIONS["student_temperature"],
    )
    for name, value in want._asdict().items():
        assert_close(got[name], value)


@MODES
def test_skipped_rows_are_never_read_and_their_slots_neither(one_pass: bool):
    p = problem()
    payload = top_k(p)
    kept = torch.ones(23, dtype=torch.bool).index_fill_(0, torch.tensor([0, 3, 4, 5, 22]), False)
    expected = run(p.take(kept), TopKPayload(payload.ids[kept], payload.log_probs[kept]), one_pass=one_pass)
    p.target[~kept], p.hidden[~kept], payload.ids[~kept] = -100, torch.nan, 10**6
    got = run(p, payload, one_pass=one_pass)
    assert_close(got["loss"][kept], expected["loss"])
    assert_close(got["hidden_grad"][kept], expected["hidden_grad"])
    assert_close(got["weight_grad"], expected["weight_grad"])
    assert got["loss"][~kept].eq(0).all() and got["hidden_grad"][~kept].eq(0).all()


def test_mistakes_are_named():
    p = problem()
    with pytest.raises(ConfigError, match="top k tokens gives the reverse KL only, got divergence 'jsd'"):
        run(p, top_k(p), divergence="jsd")
    with pytest.raises(ShapeError, match="integer ids and float log-probs"):
        run(p, replace(top_k(p), ids=top_k(p).ids[:-1]))
