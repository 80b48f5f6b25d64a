"""When Megatron's LM head is a plain product, what its parts are, and when the loss must be made from its logits."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hybrid.mcore import head_parts as module
from megatron_hybrid.mcore.head_parts import HeadParts, head_parts
from tests.model_step import HYBRID, MUP, UNTIED

SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


def logits_both_ways(overrides: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """On each rank of the last stage: logits of all positions by Megatron's layer, and by the head's parts."""
    from megatron_hybrid.mcore.model import head_logits, model_forward, whole_hidden
    from tests.tiny import megatron, set_weights, start

    found: list[tuple[Tensor, Tensor]] = []

    def processor(
        *, hidden_states: Tensor, output_layer: Any, output_weight: Any, scale_logits: Any, **_: Any
    ) -> Tensor:
        hidden = whole_hidden(hidden_states, output_layer, sum_gradient=False).flatten(0, 1)
        head = head_parts(output_layer, output_weight, scale_logits)
        assert head is not None
        logits = head_logits(hidden, output_layer, output_weight, scale_logits)
        found.append((logits, head.run(lambda: head.logit_scale * hidden @ head.weight.T)))
        return logits

    with megatron(**overrides) as args:
        (model,) = start(args)
        set_weights([model])
        tokens = torch.arange(16).view(2, 8)
        with torch.no_grad():
            model_forward(model, tokens, torch.arange(8).expand(2, -1), output_processor=processor)
    return found[0]


@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        pytest.param(1, {}, id="tied"),
        pytest.param(1, UNTIED, id="untied"),
        pytest.param(2, UNTIED | SP, id="untied, TP 2 + SP"),
        pytest.param(1, HYBRID, id="HybridModel"),
        pytest.param(1, MUP, id="MuP"),
    ],
)
def test_the_parts_make_the_models_own_logits(rank_pool, size: int, overrides: dict[str, Any]):
    for own, parts in rank_pool(size, init=False).run(logits_both_ways, overrides):
        # One product of fp32 in another blocking, numbers of order 10.
        torch.testing.assert_close(parts, own, rtol=0, atol=1e-5)


class Model(torch.nn.Module):
    """As much of a GPTModel as its head is asked about."""

    def __init__(self, **layer: Any) -> None:
        from megatron.core.models.gpt import GPTModel
        from megatron.core.tensor_parallel import ColumnParallelLinear

        super().__init__()
        head = ColumnParallelLinear.__new__(ColumnParallelLinear)
        torch.nn.Module.__init__(head)
        self.config = type("Config", (), {"use_mup": False, "defer_embedding_wgrad_compute": False})()
        plain = {"bias": None, "disable_grad_reduce": False, "explicit_expert_comm": False, "config": self.config}
        for name, value in (plain | {"weight": torch.nn.Parameter(torch.ones(4, 2))} | layer).items():
            setattr(head, name, value)
        self.output_layer = head
        self._scale_logits = GPTModel._scale_logits.__get__(self)

    def head(self) -> HeadParts | None:
        return head_parts(self.output_layer, None, self._scale_logits)


def wrapped(model: Model) -> None:
    inner = model.output_layer

    class Adapter(torch.nn.Module):
        def forward(self, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
            return inner(hidden)

    model.output_layer = Adapter()


def overridden(model: Model) -> None:
    class Own(type(model.output_layer)):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden

    model.output_layer.__class__ = Own


def scaled(model: Model) -> None:
    model._scale_logits = lambda logits: 2 * logits


def biased(model: Model) -> None:
    model.output_layer.bias = torch.nn.Parameter(torch.zeros(4))


def deferred(model: Model) -> None:
    model.config.defer_embedding_wgrad_compute = True


def not_reduced(model: Model) -> None:
    model.output_layer.disable_grad_reduce = True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (wrapped, "Adapter with a forward of its own"),
        (overridden, "Own with a forward of its own"),
        (scaled, "scales its logits by a function"),
        (biased, "has a bias"),
        (deferred, "--defer-embedding-wgrad-compute"),
        (not_reduced, "shares its gradient out"),
    ],
)
def test_a_head_with_more_to_it_is_left_whole_and_the_log_says_why(caplog, change, reason):
    model = Model()
    assert model.head() is not None
    change(model)
    module._say_why.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert model.head() is None and model.head() is None
    (said,) = [record.getMessage() for record in caplog.records]
    assert reason in said


def test_under_autocast_a_head_is_left_whole():
    model = Model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.head() is None
    assert model.head() is not None


def test_hooks_of_the_layer_run_before_its_weight_is_read():
    # Megatron's overlapped gather of parameters waits in such a hook.
    model, order = Model(), []
    model.output_layer.register_forward_pre_hook(lambda layer, inputs: order.append("gathered"))
    head = model.head()
    assert head is not None and head.run(lambda: order.append("read") or "result") == "result"
    assert order == ["gathered", "read"]
    assert "forward" not in vars(model.output_layer)
