"""What the plan says of the LM head and the op against what they hold, weighed alone."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "tools"))

import plan_head  # noqa: E402
from plan_model import Layout, Plan, Step  # noqa: E402
from plan_shapes import Shape  # noqa: E402


def op_peak(tp: int, columns: int, tokens: int, dtype: torch.dtype, block: int) -> int:
    """Peak of one forward and backward of the op in place, beside both logits; the other ranks are made up."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_hybrid.ops import eager
    from megatron_hybrid.ops.api import vocab_parallel_hybrid_loss
    from tests.memory import peak_bytes

    torch.distributed.init_process_group("fake", rank=0, world_size=tp, store=FakeStore())
    student = torch.randn(tokens, columns).to(dtype).requires_grad_() * 1
    teacher, target = torch.randn(tokens, columns).to(dtype), torch.zeros(tokens, dtype=torch.long)
    options: Any = {"group": torch.distributed.group.WORLD, "inplace": True, "ignore_index": None}

    def run() -> None:
        out = vocab_parallel_hybrid_loss(student, teacher, target, advantage=1.0, **options)
        torch.autograd.grad(out.loss.sum(), student)

    with mock.patch.dict(eager._BLOCK_ELEMENTS, {"cpu": block}):
        return peak_bytes(run)


def head_peak(hidden_size: int, columns: int, tokens: int, block: int, *, norms: bool, method: dict[str, Any]) -> int:
    """Peak of a micro-batch's loss, norms and backward in fp32 as the forward step makes them, beside their inputs."""
    from megatron_hybrid.config import HybridConfig
    from megatron_hybrid.mcore.head_parts import HeadParts
    from megatron_hybrid.ops import eager
    from megatron_hybrid.parallel import GroupView
    from megatron_hybrid.records import HiddenPayload
    from megatron_hybrid.returns.corrections import Correction
    from megatron_hybrid.returns.weights import make_weigh
    from megatron_hybrid.schedule.forward_step import HybridForwardStep
    from megatron_hybrid.schedule.response_loss import ResponseLoss, Runtime
    from tests.memory import peak_bytes

    config = HybridConfig(**method)
    hidden, weight = (torch.randn(n, hidden_size).requires_grad_() for n in (tokens, columns))
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(columns, hidden_size), False  # type: ignore[attr-defined]
    of_teacher = torch.randn(columns, 5)
    weigh = make_weigh(
        reward_advantage=torch.ones(1),
        row_of_token=torch.zeros(tokens, dtype=torch.long),
        position_of_token=torch.arange(tokens),
        num_positions=tokens,
        discount=config.discount,
        future_cost=config.future_cost,
        reward_weight=1.0,
        imitation_weight=1.0,
        sampled_logprobs=torch.zeros(tokens),
        correction=Correction.from_config(config),
    )
    batch: Any = SimpleNamespace(
        teacher=HiddenPayload(torch.randn(tokens, 5), lambda rows: rows @ of_teacher.T),
        targets=torch.zeros(tokens, dtype=torch.long),
        weigh=weigh,
        token_scale=torch.ones(tokens),
    )
    head = HeadParts(torch.nn.Identity(), weight, 1.0)
    step = HybridForwardStep(config)

    def logits_of(rows: slice) -> torch.Tensor:
        return hidden[rows] @ weight.T

    def run() -> None:
        loss = ResponseLoss(config, Runtime(GroupView(), columns), batch)
        fused = config.lm_head == "fused"
        made = (loss.fused(hidden, head) if fused else loss.from_logits(logits_of(slice(None)))).loss
        if norms:
            step._measure_gradients(loss, loss.used_weights(), logits_of, loss.chunk_size(weight) if fused else tokens)
        torch.autograd.grad(made.sum(), hidden)

    with mock.patch.dict(eager._BLOCK_ELEMENTS, {"cpu": block}):
        return peak_bytes(run)


def small(*, tp: int = 1, hidden: int = 64, columns: int = 1024, tokens: int = 512, **changes: Any) -> Plan:
    """A head by itself, and enough tokens to weigh it."""
    shape = Shape("head", 1, hidden, 8, 8, 8, 8, columns * tp)
    return Plan(shape, shape, Layout(tp, tp), Step(1, tokens + 1, tokens, vocab_multiple=1, dtype_bytes=4, **changes))


@pytest.mark.procs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "columns", "block"),
    [pytest.param(512, 1024, 1 << 15, id="blocks weigh most"), pytest.param(2048, 64, 1 << 11, id="the merge does")],
)
@pytest.mark.parametrize("tp", [1, 2])
def test_what_the_op_holds_is_as_planned(rank_pool, tp: int, tokens: int, columns: int, block: int, dtype: torch.dtype):
    plan = small(tp=tp, tokens=tokens, columns=columns)
    (peak,) = rank_pool(1, init=False).run(op_peak, tp, columns, tokens, dtype, block)
    assert 0.98 < peak / plan_head.op(plan, block=block) < 1.01  # scalars, and numbers of a row rounded


@pytest.mark.parametrize("norms", [False, True], ids=["", "norms"])
@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        ({"lm_head_chunk_size": 128}, {}),
        ({"lm_head_chunk_size": 512}, {}),
        ({"lm_head_chunk_size": 300}, {"tokens": 700}),
        ({"lm_head_chunk_size": 32}, {"hidden": 512, "columns": 64}),
        ({"lm_head_chunk_size": 128, "prefix_correction": True}, {}),
        ({"lm_head_chunk_size": 300, "prefix_correction": True}, {"tokens": 700}),
        ({"lm_head_chunk_size": 32, "prefix_correction": True}, {"hidden": 512, "columns": 64}),
        ({"lm_head": "logits"}, {}),
    ],
    ids=lambda given: ", ".join(f"{name} {value}" for name, value in given.items()),
)
def test_what_the_head_holds_is_as_planned(method: dict[str, Any], sizes: dict[str, int], norms: bool):
    names = {"lm_head": "head", "lm_head_chunk_size": "chunk"}
    options = {names.get(name, name): value for name, value in method.items()}
    plan, block = small(**sizes, **options, gradient_norms=norms), 1 << 14
    peak = head_peak(plan.student.hidden, plan.columns, plan.tokens, block, norms=norms, method=method)
    assert 0.98 < peak / plan_head.peak(plan, block=block) < 1.01  # some numbers of a token more or fewer


def test_a_chunk_is_the_largest_that_the_trainer_takes():
    plan = small(tokens=20000)
    assert [chunk.stop - chunk.start for chunk in plan_head.chunks(plan)] == [6666, 6667, 6667]
    assert plan_head.one_pass(plan)
