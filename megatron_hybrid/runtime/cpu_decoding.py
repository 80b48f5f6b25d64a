"""Megatron's attention to a KV cache on a machine without a GPU: a new position must not cost a copy of all old ones.

Megatron's static cache holds keys before their rotary embedding, and its torch attention repeats keys and values for
every head of a group: a step of decoding rotates and copies the whole cache in every layer. Its batched products also
change shape with every step, and oneDNN compiles a bf16 product anew for each shape. `stand_ins` gives `cpu.enable`
what to put in their place:

    cache      a new key is rotated before it is stored, an old one never again; positions of a head lie side by side
    attention  to such a cache: torch's fused attention, which while decoding takes the heads of a group as queries

Both compute what the originals do, up to rounding; bf16 scores and probabilities stay fp32 inside the kernel. Whatever
has no cache, training among it, runs the original code.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def stand_ins() -> list[tuple[Any, str, Any]]:
    """(class, attribute, value) of Megatron's attention as it decodes on the CPU."""
    layer = importlib.import_module("megatron.core.transformer.attention").Attention
    core = importlib.import_module("megatron.core.transformer.dot_product_attention").DotProductAttention
    return [
        (layer, "_allocate_memory", _by_head(layer._allocate_memory)),
        (layer, "_adjust_key_value_for_inference", _rotated_once(layer._adjust_key_value_for_inference)),
        (core, "forward", _fused(core.forward)),
    ]


def _by_head(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`Attention._allocate_memory` [positions, b, groups, d] that lies in memory as [b, groups, positions, d]."""

    @functools.wraps(allocate)
    def call(self: Any, positions: int, batch: int, *args: Any, **kwargs: Any) -> Tensor:
        memory = allocate(self, positions, batch, *args, **kwargs)
        return memory.view(batch, -1, positions, memory.shape[-1]).permute(2, 0, 1, 3)

    return call


def _rotated_once(adjust: Callable[..., Any]) -> Callable[..., Any]:
    """`Attention._adjust_key_value_for_inference` that rotates what is new and stores it rotated."""
    attention = importlib.import_module("megatron.core.transformer.attention")

    @functools.wraps(adjust)
    def call(
        self: Any,
        inference_context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary_pos_emb: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if inference_context is not None and inference_context.is_static_batching() and rotary_pos_emb is not None:
            start = inference_context.sequence_len_offset
            new = slice(start, start + key.shape[0])
            scale = attention._yarn_get_concentration_factor_from_config(self.config)
            query, key = (
                attention.apply_rotary_pos_emb(
                    x, embedding[new], self.config, None, scale, cp_group=self.pg_collection.cp
                )
                for x, embedding in zip((query, key), rotary_pos_emb, strict=True)
            )
            rotary_pos_emb = None
        return adjust(self, inference_context, query, key, value, rotary_pos_emb, *args, **kwargs)

    return call


def _fused(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`DotProductAttention.forward` that attends to a cache with torch's fused attention."""

    @functools.wraps(forward)
    def call(
        self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if not _lies_by_head(key):
            return forward(self, query, key, value, attention_mask, *args, **kwargs)
        softmax = self.scale_mask_softmax
        causal = softmax.attn_mask_type.name == "causal" and softmax.window_size is None
        if not causal or self.softmax_offset is not None or torch.is_grad_enabled():
            return forward(self, query, key.contiguous(), value.contiguous(), attention_mask, *args, **kwargs)
        new, batch, heads, width = query.shape
        # One query each: the heads of a group, which share their keys, are its queries, and the cache is read once.
        rows = query.view(batch, key.shape[2], -1, width) if new == 1 else query.permute(1, 2, 0, 3)
        attended = torch.nn.functional.scaled_dot_product_attention(
            rows,
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=None if attention_mask is None else ~attention_mask,
            is_causal=attention_mask is None and new > 1,
            scale=self.softmax_scale * (softmax.scale or 1.0),
            enable_gqa=new > 1,
        )
        return attended.reshape(batch, heads, new, width).permute(2, 0, 1, 3).reshape(new, batch, -1)

    return call


def _lies_by_head(key: Tensor) -> bool:
    """Positions of a head side by side: as the cache of `_by_head` has them, and nothing that a layer computes."""
    return key.stride(0) < key.stride(1)
