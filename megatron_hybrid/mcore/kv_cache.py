"""Megatron's static KV cache with rows that branch and leave, and whether a model can skip positions.

    prompts ── forward ──► one row each ── select ──► one row per response ── select ──► those that still write

Megatron's cache keeps its batch for life. `select` makes any rows of it the batch that goes on, by copying what each
layer has stored. No collective but the agreement of `honours_masks` over the pipeline.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.parallel import ParallelContext


class KVCache(StaticInferenceContext):
    """The cache of one decoding batch, given to Megatron's layers as their inference context.

    chunks   the bare model on this rank
    rows     sequences at the start
    columns  positions of each
    """

    def __init__(self, chunks: list[torch.nn.Module], rows: int, columns: int) -> None:
        super().__init__(rows, columns)
        self._attention = {m.layer_number for chunk in chunks for m in chunk.modules() if isinstance(m, Attention)}

    def select(self, rows: Tensor) -> None:
        """Goes on with `rows` [n] int64, indices into the batch so far, which may repeat."""
        for layer, stored in self.key_value_memory_dict.items():
            # Keys and values [columns, b, groups, d]; the states of recurrent layers are [b, ...].
            dim = 1 if layer in self._attention else 0
            self.key_value_memory_dict[layer] = tuple(_select(tensor, dim, rows) for tensor in stored)
        self.max_batch_size = len(rows)


def _select(tensor: Tensor, dim: int, rows: Tensor) -> Tensor:
    """`index_select` that leaves the dimensions in the order they have in memory, whatever it is."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    back = sorted(range(tensor.dim()), key=order.__getitem__)
    return tensor.permute(order).index_select(order.index(dim), rows).permute(back)


def honours_masks(chunks: list[torch.nn.Module], parallel: ParallelContext) -> bool:
    """Whether positions that a mask hides change nothing, also while decoding: the same on every stage.

    Megatron's own attention does. Transformer Engine's is told that there is none, and recurrent layers cannot. Experts
    of limited capacity would take padding in the place of tokens.

    chunks  the bare model on this rank

    Raises:
        ConfigError: under --flash-decode Megatron leaves the rotary embedding to an inference engine.

    One all-reduce of one number over pp.
    """
    modules = [module for chunk in chunks for module in chunk.modules()]
    if any(getattr(getattr(module, "config", None), "flash_decode", False) for module in modules):
        raise ConfigError(
            "--flash-decode is for Megatron's inference engines: without one, attention layers would leave out the "
            "rotary embedding, and responses would come from another model. Train without it."
        )
    obeys = all(_masked(m.core_attention) for m in modules if isinstance(m, Attention))
    obeys &= not any(_recurrent(module) or _drops_tokens(module) for module in modules)
    if parallel.pp.size == 1:
        return obeys
    device = next(chunks[0].parameters()).device
    agreed = torch.tensor(int(obeys), device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=parallel.pp.group)
    return bool(agreed)


def _masked(core: torch.nn.Module) -> bool:
    if not isinstance(core, DotProductAttention):
        return False
    softmax = core.scale_mask_softmax
    # A sliding window, and Megatron's fused causal softmax, make a mask of their own.
    return softmax.window_size is None and not softmax.scaled_masked_softmax_fusion


def _recurrent(module: torch.nn.Module) -> bool:
    shapes = getattr(module, "mamba_state_shapes_per_request", None)
    return shapes is not None and shapes() is not None


def _drops_tokens(module: torch.nn.Module) -> bool:
    return getattr(getattr(module, "config", None), "moe_expert_capacity_factor", None) is not None
