"""Where the fused LM head leaves dW: Megatron's main_grad and its convention, by hand and in real models."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hybrid.ops.lm_head import linear_hybrid_loss
from tests.distributed.gradient import assert_same, shards, whole
from tests.ops.lm_head_problem import assert_close, judged, problem

VOCAB, B, S = 61, 3, 8
MODES = [False, True]


def with_main_grad(dtype: torch.dtype = torch.float32, **attributes: Any) -> tuple[Tensor, Tensor]:
    """The problem's weight as Megatron's DDP prepares it, and what its main_grad held before."""
    weight = torch.nn.Parameter(problem().weight.clone())
    before = torch.randn(weight.shape, dtype=dtype)
    weight.main_grad = before.clone()
    for name, value in attributes.items():
        setattr(weight, name, value)
    return weight, before


def loss_of(weight: Tensor, hidden: Tensor | None = None, **options: Any) -> Tensor:
    p = problem()
    hidden = p.hidden.clone().requires_grad_() if hidden is None else hidden
    weights = {"imitation_weight": p.imitation_weight, "advantage": p.advantage}
    return linear_hybrid_loss(hidden, weight, p.teacher, p.target, chunk_size=5, **weights, **options).loss.sum()


@pytest.mark.parametrize("one_pass", MODES)
def test_the_gradient_is_added_to_main_grad_and_megatron_is_told(one_pass: bool):
    weight, before = with_main_grad(grad_added_to_main_grad=False)
    buffer = weight.main_grad
    (loss_of(weight, one_pass=one_pass) * 4).backward()
    assert weight.main_grad is buffer and weight.grad_added_to_main_grad is True
    assert weight.grad is not None, "Megatron's overlapped reduction asserts that there is one"
    assert_close(buffer - before, judged(problem(), arriving=4.0)[2])


@pytest.mark.parametrize("one_pass", MODES)
def test_micro_batches_add_up(one_pass: bool):
    weight, before = with_main_grad(grad_added_to_main_grad=False)
    for _ in range(3):
        loss_of(weight, one_pass=one_pass).backward()
        weight.grad = None
    assert_close(weight.main_grad - before, 3 * judged(problem())[2])


@pytest.mark.parametrize("one_pass", MODES)
def test_without_megatrons_flag_autograd_is_told_nothing(one_pass: bool):
    weight, before = with_main_grad()
    loss_of(weight, one_pass=one_pass).backward()
    assert weight.grad is None and not hasattr(weight, "grad_added_to_main_grad")
    assert_close(weight.main_grad - before, judged(problem())[2])


@pytest.mark.parametrize("one_pass", MODES)
def test_a_bf16_main_grad_gets_one_rounded_sum_of_all_chunks(one_pass: bool):
    weight, _ = with_main_grad(torch.bfloat16, grad_added_to_main_grad=False)
    weight.main_grad.zero_()
    loss_of(weight, one_pass=one_pass).backward()
    expected = judged(problem())[2]
    error = (weight.main_grad.double() - expected).abs()
    assert (error <= 2**-8 * expected.abs() + 1e-5 * expected.norm()).all()  # one rounding of bf16, and fp32's


@pytest.mark.parametrize("one_pass", MODES)
def test_a_tied_weight_gets_its_embeddings_gradient_too(one_pass: bool):
    p = problem()
    tokens = torch.arange(len(p.target)) % len(p.weight)

    def hidden_of(weight: Tensor) -> Tensor:
        return torch.tanh(torch.nn.functional.embedding(tokens, weight))

    weight = p.weight.double().requires_grad_()
    _, hidden_grad, head_grad = judged(p._replace(hidden=hidden_of(weight).detach()))
    (embedding_grad,) = torch.autograd.grad(hidden_of(weight), weight, hidden_grad)
    expected = head_grad + embedding_grad

    plain = p.weight.clone().requires_grad_()
    loss_of(plain, hidden_of(plain), one_pass=one_pass).backward()
    assert_close(plain.grad, expected)

    fused, before = with_main_grad(grad_added_to_main_grad=False, zero_out_wgrad=True)
    loss_of(fused, hidden_of(fused), one_pass=one_pass).backward()
    assert_close(fused.grad, embedding_grad)  # what Megatron's hook then adds
    assert_close(fused.main_grad - before + fused.grad, expected)


def model_gradient(overrides: dict[str, Any], through: str) -> dict[str, Any]:
    """On each rank: shards of a real model's finalized gradient, its loss made from logits or by the fused head."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.utils import get_model_config

    from megatron_hybrid.mcore.groups import parallel_context
    from megatron_hybrid.mcore.model import head_logits, model_forward, response_hidden
    from megatron_hybrid.mcore.training import get_forward_backward_func
    from megatron_hybrid.ops.api import vocab_parallel_hybrid_loss
    from tests.tiny import megatron, set_weights, start

    generator = torch.Generator().manual_seed(8)
    tokens = torch.randint(1, VOCAB, (B, S), generator=generator)
    rows, target = torch.randperm(S * B, generator=generator)[:10], torch.randint(0, VOCAB, (10,), generator=generator)
    states, head = torch.randn(10, 16, generator=generator), torch.randn(64, 16, generator=generator)
    advantage = torch.randn(10, generator=generator)
    losses: list[Tensor] = []
    with megatron(**overrides, no_check_for_nan_in_loss_and_grad=True) as args:
        model = start(args, ddp=True)
        set_weights(model)
        tp = parallel_context().tp
        config = get_model_config(model[0])
        config.finalize_model_grads_func = finalize_model_grads

        def processor(
            *, hidden_states: Tensor, output_layer: Any, output_weight: Any, scale_logits: Any, context: Any, **_: Any
        ) -> Tensor:
            hidden = response_hidden(hidden_states, rows, output_layer)
            weight = output_layer.weight if output_weight is None else output_weight
            first = tp.rank * len(weight)
            teacher = states, head[first : first + len(weight)]
            options = {"advantage": advantage, "vocab_size": VOCAB, "group": tp.group}
            if through == "logits":
                student = head_logits(hidden, output_layer, output_weight, scale_logits)
                out = vocab_parallel_hybrid_loss(student, teacher[0] @ teacher[1].T, target, **options)
            else:
                options |= {"chunk_size": 4, "one_pass": through == "one_pass"}
                out = linear_hybrid_loss(hidden, weight, teacher, target, **options)
            losses.append(out.loss.detach())
            return out.loss

        def forward(iterator: Any, chunk: Any) -> Any:
            output = model_forward(chunk, tokens, torch.arange(S).expand(B, -1), output_processor=processor)
            return output, lambda loss: (loss.sum(), torch.tensor(10, dtype=torch.int32), {})

        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter([None, None]),
            model=model[0],
            num_microbatches=2,
            seq_length=S,
            micro_batch_size=B,
            forward_only=False,
        )
        return {"shards": shards(model), "losses": losses}


@pytest.mark.parametrize("through", ["two_passes", "one_pass"])
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({}, id="tied"),
        pytest.param({"untie_embeddings_and_output_weights": True, "sequence_parallel": True}, id="untied, SP"),
        pytest.param({"overlap_grad_reduce": True}, id="tied, overlapped reduction"),
    ],
)
def test_a_real_models_gradient_is_the_one_through_its_own_head(rank_pool, layout: dict[str, Any], through: str):
    overrides = {"tensor_model_parallel_size": 2} | layout
    pool = rank_pool(2, init=False)
    want, got = pool.run(model_gradient, overrides, "logits"), pool.run(model_gradient, overrides, through)
    torch.testing.assert_close(got[0]["losses"], want[0]["losses"], rtol=1e-5, atol=1e-5)  # fp32 sums in another order
    assert_same(whole(got), whole(want))
