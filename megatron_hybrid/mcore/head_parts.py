"""Megatron's LM head taken apart: the weight and the logit scale that a loss with the head fused in asks for.

    output_layer, output_weight, scale_logits  ->  HeadParts, or None and one line in the log where there is more to it

A head can be taken apart where logits are logit_scale * hidden W^T: a ColumnParallelLinear without bias, in no other
class's hands, under Megatron's own MuP scaling. Adapters, heads of one's own and deferred weight gradients are
declined.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from megatron_hybrid.mcore.model import forward_replaced

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True)
class HeadParts:
    """An LM head that is a plain product."""

    layer: Any
    weight: Tensor
    """[v/tp, h]: the layer's own, or the embedding's."""
    logit_scale: float
    """MuP's output multiplier; 1 without it."""

    def run(self, compute: Callable[[], Result]) -> Result:
        """`compute()` as a call of the layer: what Megatron hooks onto it, such as the wait for an overlapped gather of
        its weight, happens as ever."""
        with forward_replaced(self.layer, compute):
            result: Result = self.layer()
        return result


def head_parts(
    output_layer: Any, output_weight: Tensor | None, scale_logits: Callable[[Tensor], Tensor]
) -> HeadParts | None:
    """The parts of the head that an output processor is given; None where it is no plain product."""
    reason = _not_plain(output_layer, scale_logits)
    if reason is not None:
        _say_why(reason)
        return None
    config = scale_logits.__self__.config  # type: ignore[attr-defined]  # a bound method, see _not_plain
    weight = output_layer.weight if output_weight is None else output_weight
    return HeadParts(output_layer, weight, float(config.mup_output_mult) if config.use_mup else 1.0)


def _not_plain(layer: Any, scale_logits: Any) -> str | None:
    methods = ("forward", "_forward_impl")
    if any(_function(getattr(layer, name, None)) is not getattr(ColumnParallelLinear, name) for name in methods):
        return f"the output layer is a {type(layer).__name__} with a forward of its own"
    if layer.bias is not None:
        return "the output layer has a bias"
    if layer.disable_grad_reduce or layer.explicit_expert_comm or getattr(layer, "gtp_remat_size", 1) > 1:
        return "the output layer shares its gradient out in a way of its own"
    if layer.config.defer_embedding_wgrad_compute:
        return "--defer-embedding-wgrad-compute wants the output layer to keep its activations"
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        return "autocast decides the types of products"
    if _function(scale_logits) is not GPTModel._scale_logits:
        return "the model scales its logits by a function of its own"
    return None


def _function(method: Any) -> Any:
    """What a bound method calls; None for anything else."""
    return getattr(method, "__func__", None)


@functools.cache
def _say_why(reason: str) -> None:
    logger.warning("the hybrid loss is made from whole logits, not with the LM head fused in: %s", reason)
