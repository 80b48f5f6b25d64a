"""Rehearsal of the training step on a GPU without one: fake tensors on 'cuda:0' through the output processor.

As in tests/ops/test_fake_device.py, a tensor made on the CPU fails here, and so does reading a value back to the host:
the last stage launches its whole micro-batch without waiting for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.mcore.head_parts import HeadParts
from megatron_hybrid.ops.function import HybridLossFunction
from megatron_hybrid.ops.lm_head_function import LinearHybridLossFunction
from megatron_hybrid.parallel import GroupView
from megatron_hybrid.records import HiddenPayload, HybridMicrobatch, ModelInput, Prompt, TokenStats
from megatron_hybrid.returns.weights import make_weigh
from megatron_hybrid.schedule import forward_step
from megatron_hybrid.schedule.forward_step import HybridForwardStep, _hybrid_loss
from megatron_hybrid.schedule.microbatch import imitation_alone
from megatron_hybrid.schedule.response_loss import Runtime

GPU = torch.device("cuda:0")
S, B, H, TEACHER_H, COLUMNS, VOCAB, N = 9, 4, 16, 24, 50, 45, 12
"""Positions, sequences, hidden sizes, padded and true vocabulary, response tokens."""


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(forward_step, "head_parts", lambda layer, weight, scale: HeadParts(layer, weight, 1.0))
    with FakeTensorMode():
        yield


class Head(torch.nn.Module):
    """Megatron's ColumnParallelLinear as the processor meets it: (hidden [s, b, h], weight=...) to (logits, None)."""

    sequence_parallel = False

    def __init__(self) -> None:
        super().__init__()
        self.logits: list[Tensor] = []

    def forward(self, hidden: Tensor, *, weight: Tensor, runtime_gather_output: bool) -> tuple[Tensor, None]:
        assert hidden.dim() == 3 and runtime_gather_output is False
        self.logits.append(hidden @ weight.T)
        return self.logits[-1], None


def micro_batch(
    config: HybridConfig, dtype: torch.dtype, *, with_teacher: bool = True, grouped: bool = True
) -> HybridMicrobatch:
    index = torch.zeros(N, dtype=torch.long, device=GPU)
    head = torch.randn(COLUMNS, TEACHER_H, device=GPU, dtype=dtype)
    weigh = make_weigh(
        reward_advantage=torch.randn(B, device=GPU),
        row_of_token=index,
        position_of_token=index,
        num_positions=S + 1,
        discount=config.discount,
        future_cost=config.future_cost,
        reward_weight=config.reward_weight,
        imitation_weight=config.imitation_weight,
        group_id=torch.zeros(B, dtype=torch.long, device=GPU) if grouped else None,
    )
    ids = torch.zeros(B, S, dtype=torch.long, device=GPU)
    student = ModelInput(tokens=ids, position_ids=ids, token_rows=index)
    return HybridMicrobatch(
        student=student,
        teacher_input=student,
        sequence_of_token=index,
        position_of_token=index,
        prompts=(Prompt(0, (1,), "", "task"),) * B,
        targets=index,
        weigh=weigh,
        token_scale=torch.ones(N, device=GPU),
        count=torch.zeros((), dtype=torch.int32, device=GPU),
        sampled_logprobs=torch.zeros(N, device=GPU),
        teacher=HiddenPayload(torch.randn(N, TEACHER_H, device=GPU, dtype=dtype), lambda rows: rows @ head.T)
        if with_teacher
        else None,
    )


def last_stage(
    batch: HybridMicrobatch, config: HybridConfig, dtype: torch.dtype
) -> tuple[HybridForwardStep, Tensor, Head]:
    """The output processor as GPTModel calls it on the last stage: (step, loss [n], the head with its logits)."""
    step = HybridForwardStep(config)
    step.runtime = Runtime(tp=GroupView(), vocab_size=VOCAB)
    step.gradient_norms, step.token_numbers = True, []
    head = Head()
    loss = step._hybrid_output(
        hidden_states=torch.randn(S, B, H, device=GPU, dtype=dtype).requires_grad_(),
        output_layer=head,
        output_weight=torch.randn(COLUMNS, H, device=GPU, dtype=dtype).requires_grad_(),
        scale_logits=lambda logits: logits,
        context=batch,
        input_ids=batch.student.tokens,  # and whatever else Megatron hands to a processor
    )
    return step, loss, head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_teacher", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("future_cost", ["closed_form", "sampled"])
@pytest.mark.parametrize("lm_head", [{"lm_head_chunk_size": 5}, {"lm_head": "logits"}], ids=["fused", "logits"])
def test_a_step_of_the_last_stage_stays_on_the_device(dtype, with_teacher, grouped, future_cost, lm_head):
    config = HybridConfig(
        discount=0.9, future_cost=future_cost, student_temperature=0.8, teacher_logit_floor=-40.0, **lm_head
    )
    batch = micro_batch(config, dtype, with_teacher=with_teacher, grouped=grouped)
    step, loss, head = last_stage(batch, config, dtype)
    assert loss.device == GPU and loss.dtype == torch.float32 and loss.shape == (N,)

    total, count, report = _hybrid_loss(batch.count, False, loss)
    assert all(value.device == GPU for value in (total, count, *report.values()))
    # Called directly: autograd's engine wants a real device.
    if config.lm_head == "fused":
        gradients = LinearHybridLossFunction.backward(loss.grad_fn, torch.ones(N, device=GPU))[:2]
        shapes = [(N, H), (COLUMNS, H)]
    else:
        gradients = HybridLossFunction.backward(loss.grad_fn, torch.ones(N, device=GPU))[:1]
        assert head.logits[0].requires_grad  # the head's own backward takes over from here
        shapes = [(N, COLUMNS)]
    for gradient, shape in zip(gradients, shapes, strict=True):
        assert gradient.device == GPU and gradient.dtype == dtype and gradient.shape == shape


def test_metrics_stay_on_the_device_until_they_are_reduced():
    config = HybridConfig(lm_head_chunk_size=5)
    step, _, _ = last_stage(micro_batch(config, torch.bfloat16), config, torch.bfloat16)
    collected = {**step.metrics._sums, **step.metrics._weights, **step.metrics._peaks}
    assert {"actor/kl_loss", "actor/grad_norm_dense", "actor/grad_norm_sparse"} <= collected.keys()
    assert {name: value.device for name, value in collected.items() if value.device != GPU} == {}
    (numbers,) = step.token_numbers or []
    assert {(value.device, value.shape) for value in vars(numbers).values()} == {(GPU, (N,))}


@pytest.mark.parametrize(
    "place", ["token_scale", "token_rows", "targets", "sampled_logprobs", "reward_advantage", "weights"]
)
def test_the_rehearsal_notices_a_tensor_on_the_wrong_device(place):
    config = HybridConfig(lm_head_chunk_size=5)
    batch = micro_batch(config, torch.float32)
    wrong: Any
    if place == "reward_advantage":
        wrong = batch.weigh
        object.__setattr__(wrong, place, torch.zeros(B))
    elif place == "weights":
        object.__setattr__(batch, "weigh", lambda stats: (torch.ones(N), torch.zeros(N)))
    else:
        owner = batch.student if place == "token_rows" else batch
        object.__setattr__(owner, place, torch.zeros_like(getattr(owner, place), device="cpu"))
    with pytest.raises((RuntimeError, ValueError)):
        last_stage(batch, config, torch.float32)


def test_credit_of_evaluation_stays_on_the_device():
    stats = TokenStats(*(torch.zeros(N, device=GPU) for _ in range(4)))
    assert all(weight.device == GPU for weight in imitation_alone(stats))
