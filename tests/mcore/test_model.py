"""The seam into Megatron's models: response rows, the LM head, and models that do not hand over hidden states."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.mcore.model import head_logits, model_forward, response_hidden
from megatron_hybrid.mcore.unsliced import unsliced
from megatron_hybrid.runtime import cpu
from tests.distributed.gradient import assert_same, whole
from tests.model_step import HYBRID, logits_of, step

SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.fixture(scope="module", params=[{}, HYBRID], ids=["GPTModel", "HybridModel"])
def plain(request, rank_pool):
    """The model's own logits and autograd, on one rank."""
    return request.param, rank_pool(1, init=False).run(step, request.param, "model")


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        pytest.param(1, {}, id="one rank"),
        pytest.param(2, {"tensor_model_parallel_size": 2}, id="TP 2"),
        pytest.param(2, SP, id="TP 2 + SP"),
        pytest.param(2, {"pipeline_model_parallel_size": 2}, id="PP 2"),
    ],
)
def test_logits_and_gradient_through_the_seam_are_those_of_plain_autograd(rank_pool, plain, size, layout):
    model, reference = plain
    if model and "pipeline_model_parallel_size" in layout:
        layout = layout | {"hybrid_layer_pattern": "*-|*-"}
    ranks = rank_pool(size, init=False).run(step, model | layout, "processor")
    # fp32 sums in another order, logits of order 10: a few roundings.
    torch.testing.assert_close(logits_of(ranks), logits_of(reference), rtol=0, atol=2e-5)
    assert_same(whole(ranks), whole(reference))


@pytest.mark.parametrize("model", [{}, HYBRID], ids=["GPTModel", "HybridModel"])
def test_under_mixed_precision_the_processor_meets_the_models_own_numbers(rank_pool, model):
    through_model, through_seam = (
        rank_pool(1, init=False).run(step, model | {"bf16": True}, how)[0]["logits"] for how in ("model", "processor")
    )
    # The same matrix products on fewer rows: fp32 sums in another order, 1e-5 for logits of order 10, of which some
    # round to neighbouring numbers of bf16, 2**-7 apart.
    torch.testing.assert_close(through_seam, through_model, rtol=2**-7, atol=1e-5)
    assert torch.equal(through_seam, through_seam.bfloat16().float())


# The fallback on the output layer, on a model of a few lines.


class Head(torch.nn.Module):
    sequence_parallel = False

    def forward(
        self, hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        return 3 * hidden, None


class Model(torch.nn.Module):
    """Hands no hidden states over; scales, transposes and casts what its output layer gives, `calls` times."""

    def __init__(self, *, calls: int = 1, post_process: bool = True) -> None:
        super().__init__()
        self.calls, self.post_process = calls, post_process
        if post_process:
            self.output_layer = Head()

    def forward(self, tokens: Tensor, position_ids: Tensor, attention_mask: Any, **options: Any) -> Tensor:
        hidden = tokens.T.float().unsqueeze(-1).requires_grad_()
        if not self.post_process:
            return hidden
        for _ in range(self.calls):
            logits, _ = self.output_layer(hidden, weight=None)
        return self._scale_logits(logits).transpose(0, 1).contiguous().double()

    def _scale_logits(self, logits: Tensor) -> Tensor:
        return 5 * logits


def processor(
    *, hidden_states: Tensor, output_layer: Any, output_weight: Any, scale_logits: Any, context: Tensor
) -> Tensor:
    hidden = response_hidden(hidden_states, context, output_layer)
    return head_logits(hidden, output_layer, output_weight, scale_logits)


TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])
ROWS = torch.tensor([0, 3])


def call(model: Model, with_processor: Callable[..., Tensor] = processor, **options: Any) -> Tensor:
    return model_forward(model, TOKENS, TOKENS, output_processor=with_processor, context=ROWS, **options)


def test_what_the_model_makes_of_its_logits_does_not_touch_the_processors_result():
    result = call(Model())
    assert result.tolist() == [
        [1 * 3 * 5],
        [5 * 3 * 5],
    ]  # the scaling once, by the processor; positions 0 and 3 of [s, b]
    assert result.dtype == torch.float32 and result.requires_grad


def test_the_output_layer_is_as_it_was_after_the_call():
    model = Model()
    call(model)
    assert "forward" not in vars(model.output_layer)

    def failing(**_: Any) -> Tensor:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        call(model, failing)
    assert "forward" not in vars(model.output_layer)

    mine = model.output_layer.forward
    model.output_layer.forward = mine  # somebody else's, put on the layer before
    call(model)
    assert vars(model.output_layer)["forward"] == mine


def test_a_stage_without_an_output_layer_gives_its_hidden_states():
    assert call(Model(post_process=False)).tolist() == [[[1], [4]], [[2], [5]], [[3], [6]]]


@pytest.mark.parametrize("calls", [0, 2])
def test_an_output_layer_that_is_not_called_once_is_refused(calls):
    model = Model(calls=calls)
    model._scale_logits = lambda logits: torch.zeros(1, 1, 1)  # whatever happens to be there
    if calls == 0:
        model.forward = lambda *args, **options: torch.zeros(1)
    with pytest.raises(ConfigError, match=f"Model called its output layer {calls} times.*--mtp-num-layers"):
        call(model)


def test_a_schedule_plan_of_such_a_model_is_refused():
    with pytest.raises(ConfigError, match="combined 1F1B .* but Model hands its hidden states over only while it runs"):
        call(Model(), schedule_plan=True)


def test_a_schedule_plan_of_a_gpt_is_megatrons_own():
    class Planned(torch.nn.Module):
        def forward(self, tokens: Any, position_ids: Any, attention_mask: Any, output_processor: Any = None) -> None:
            raise AssertionError("a plan was asked for")

        def build_schedule_plan(self, *args: Any, **options: Any) -> Any:
            return args, options

    args, options = call(Planned(), schedule_plan=True)  # type: ignore[arg-type]
    assert args == (TOKENS, TOKENS, None)
    assert options == {"output_processor": processor, "output_processor_context": ROWS}


# Whole sequences for generation.


class Sliced(torch.nn.Module):
    """What sequence and context parallelism switch on, in one layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        group = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
        self.config = SimpleNamespace(sequence_parallel=True, context_parallel_size=2)
        self.embedding = torch.nn.Identity()
        self.embedding.config, self.embedding.reduce_scatter_embeddings = self.config, True
        self.linear = torch.nn.Identity()
        self.linear.config, self.linear.sequence_parallel = self.config, True
        self.untouched = torch.nn.Identity()
        self.untouched.sequence_parallel = False
        self.attention = FromTransformerEngine(group)
        self.cp_group, self.pg_collection = group, SimpleNamespace(cp=group)


class FromTransformerEngine(torch.nn.Module):
    def __init__(self, group: Any) -> None:
        super().__init__()
        self.set_context_parallel_group(group, [0, 1], "stream", "p2p")

    def set_context_parallel_group(self, group: Any, ranks: Any, stream: Any, comm_type: Any) -> None:
        self.cp_group, self.cp_global_ranks, self.cp_stream, self.cp_comm_type = group, ranks, stream, comm_type


def switches(model: Sliced) -> list[Any]:
    te = model.attention
    return [
        model.config.sequence_parallel,
        model.config.context_parallel_size,
        model.embedding.reduce_scatter_embeddings,
        model.linear.sequence_parallel,
        model.untouched.sequence_parallel,
        model.cp_group.size(),
        model.pg_collection.cp.size(),
        te.cp_group,
        te.cp_global_ranks,
        te.cp_stream,
        te.cp_comm_type,
    ]


def test_slicing_is_off_inside_and_as_it_was_afterwards():
    model = Sliced()
    before = switches(model)
    with pytest.raises(ArithmeticError), unsliced([model]):
        assert switches(model) == [False, 1, False, False, False, 1, 1, None, None, None, "p2p"]
        raise ArithmeticError
    assert switches(model) == before
    assert model.cp_group is model.pg_collection.cp is model.attention.cp_group


def test_rotary_embeddings_forget_the_positions_of_the_other_mode():
    """They remember what they computed by its length alone."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    model = Sliced()
    model.rotary = RotaryEmbedding(4, 1.0, use_cpu_initialization=True, cp_group=model.cp_group)
    with cpu.enabled():
        mine = model.rotary(8)
        with unsliced([model]):
            everyones = model.rotary(8)
        assert torch.equal(mine, everyones[2:6])  # rank 1 of 2 holds chunks 1 and 2 of 4
        assert torch.equal(model.rotary(8), mine)


def test_layers_that_share_their_weights_over_context_parallel_ranks_are_refused():
    model = Sliced()
    model.untouched.cp = SimpleNamespace(cp_size=2)
    before = switches(model)
    with (
        pytest.raises(ConfigError, match="Identity shares its weights out .* --context-parallel-size 1"),
        unsliced([model]),
    ):
        pass
    assert switches(model) == before
