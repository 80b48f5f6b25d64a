"""Megatron's torch layers where only Transformer Engine would do: norms for sequence parallelism, attention for slices.

Without Transformer Engine or Apex, Megatron's own norms refuse sequence parallelism, and its own attention refuses
context parallelism and packed sequences. `stand_ins` gives `cpu.enable` what to put in their place; every other case
runs the original code, bit for bit.

    norm        the same torch norm, its parameters marked: Megatron then sums their gradients over tp
    attention   local q [s/cp, b, heads, d], k and v gathered over context-parallel ranks, softmax over the positions
                before: the same numbers as one rank's, in plain torch, with a [s/cp, s] matrix per head
    experts     the all-to-all of expert parallelism is told its sizes as on a GPU

Collectives: for each of k and v one all-gather over cp, and one reduce-scatter in backward.
Declined with a sentence: sliding windows, softmax offsets, attention dropout, biases, masks that are not causal.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hybrid.errors import ConfigError, ShapeError


def stand_ins() -> list[tuple[Any, str, Any]]:
    """(class or module, attribute, value) of Megatron's layers as they run on the CPU."""
    norm = importlib.import_module("megatron.core.transformer.torch_norm").WrappedTorchNorm
    attention = importlib.import_module("megatron.core.transformer.dot_product_attention").DotProductAttention
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    return [
        # A static method it is, as Python makes every `__new__` one.
        (norm, "__new__", staticmethod(_marked_norm(norm.__new__))),
        (attention, "__init__", _attention_init(attention.__init__)),
        (attention, "forward", _attention_forward(attention.forward)),
        (dispatcher, "maybe_move_tensor_to_cpu", _as_moved),
    ]


def _as_moved(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What expert parallelism fetches from the GPU to tell its all-to-all the sizes: left a tensor where it is not."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _marked_norm(build: Callable[..., Any]) -> Callable[..., Any]:
    """`WrappedTorchNorm.__new__` that also serves sequence parallelism."""

    @functools.wraps(build)
    def call(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        if not config.sequence_parallel:
            return build(cls, config, *args, **kwargs)
        norm = build(cls, _with(config, sequence_parallel=False), *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True  # each rank normalises its own positions: Megatron adds the gradients up
        return norm

    return call


def _attention_init(init: Callable[..., None]) -> Callable[..., None]:
    """`DotProductAttention.__init__` that also serves context parallelism."""

    @functools.wraps(init)
    def call(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if config.context_parallel_size == 1:
            init(self, config, *args, **kwargs)
            return
        init(self, _with(config, context_parallel_size=1), *args, **kwargs)
        self.config = config
        _decline(self, "--context-parallel-size above 1")

    return call


def _attention_forward(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`DotProductAttention.forward` that also serves context parallelism and packed sequences."""

    @functools.wraps(forward)
    def call(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        cp_size = self.config.context_parallel_size
        if cp_size == 1 and packed_seq_params is None:
            return forward(self, query, key, value, attention_mask, attn_mask_type, attention_bias)
        what = "--context-parallel-size above 1" if packed_seq_params is None else "packed sequences"
        _decline(self, what, mask_type=attn_mask_type, bias=attention_bias)
        # Like Transformer Engine's, causal attention knows its mask: `attention_mask` is not read.
        group = self.pg_collection.cp if cp_size > 1 else None
        rows = [x.unsqueeze(1) if x.dim() == 3 else x for x in (query, key, value)]  # packed rows come without a batch
        length = rows[0].shape[0] * cp_size
        if packed_seq_params is None:
            starts = torch.tensor([0, length], device=query.device)
        else:
            starts = _starts(packed_seq_params, length, cp_size)
        return _attend(self, *rows, starts=starts, group=group, cp_size=cp_size)

    return call


def _attend(
    layer: Any, query: Tensor, key: Tensor, value: Tensor, *, starts: Tensor, group: Any, cp_size: int
) -> Tensor:
    """Causal attention of this rank's positions to those before them in their sequence.

    query       [s/cp, b, heads, d]
    key, value  [s/cp, b, query groups, d]
    starts      [sequences + 1] integers: where each sequence begins and the last ends, on all ranks together
    returns     [s/cp, b, heads * d]
    """
    rank = dist.get_rank(group) if cp_size > 1 else 0
    mine = torch.stack(_places(starts, rank, cp_size))
    everyones = torch.cat([torch.stack(_places(starts, r, cp_size)) for r in range(cp_size)], dim=1)
    same_sequence = mine[0][:, None] == everyones[0]
    hidden = ~(same_sequence & (everyones[1] <= mine[1][:, None]))  # [s/cp, s]

    if cp_size > 1:
        key, value = _Gather.apply(key, group), _Gather.apply(value, group)
    share = query.shape[2] // key.shape[2]
    if share > 1:
        key, value = key.repeat_interleave(share, dim=2), value.repeat_interleave(share, dim=2)
    # The original's product and softmax, in its precision and with its scale: one rounding of the scaled scores.
    flat = [x.flatten(1, 2).transpose(0, 1) for x in (query, key, value)]  # [b * heads, s, d]
    scores = torch.baddbmm(flat[0].new_zeros(1, 1, 1), flat[0], flat[1].mT, beta=0, alpha=layer.softmax_scale)
    scores = scores.unflatten(0, query.shape[1:3])
    probabilities = layer.scale_mask_softmax.forward_torch_softmax(scores, hidden)
    return torch.bmm(probabilities.flatten(0, 1), flat[2]).transpose(0, 1).reshape(*query.shape[:2], -1)


def _places(starts: Tensor, rank: int, cp_size: int) -> tuple[Tensor, Tensor]:
    """Sequence, and position in it, of each of a rank's rows [s/cp]: its chunks `rank` and `2 cp - 1 - rank`."""
    lengths = starts.diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=starts.device), lengths // cp_size)
    row = torch.arange(len(sequence), device=starts.device) - (starts[:-1] // cp_size)[sequence]
    chunk = (lengths // (2 * cp_size))[sequence]
    if cp_size == 1:
        return sequence, row
    return sequence, row + torch.where(row < chunk, rank, 2 * cp_size - 2 - rank) * chunk


def _starts(packed: Any, length: int, cp_size: int) -> Tensor:
    """Borders of packed sequences, padding between them counted as Megatron's own RoPE does it.

    Raises:
        ConfigError: a layout other than `thd`.
        ShapeError: positions that belong to no sequence, or a sequence that context-parallel ranks cannot share.
    """
    if packed.qkv_format != "thd":
        raise ConfigError(
            f"packed sequences came in the layout {packed.qkv_format!r}, which this attention does not know: pack them "
            "as 'thd'."
        )
    starts = packed.cu_seqlens_q_padded if packed.cu_seqlens_q_padded is not None else packed.cu_seqlens_q
    if int(starts[-1]) != length:
        raise ShapeError(
            f"packed sequences end at {int(starts[-1])}, but the row has {length} positions on all context-parallel "
            "ranks together: positions behind the last sequence would belong to none. Give the tail its own entry."
        )
    lengths = starts.diff()
    if cp_size > 1 and bool((lengths % (2 * cp_size)).any()):
        raise ShapeError(
            f"packed sequences have the lengths {lengths.tolist()}, padding included, but {cp_size} context-parallel "
            f"ranks take two chunks of each: their rows would attend at wrong positions. Pad every sequence to a "
            f"multiple of {2 * cp_size}."
        )
    return starts.long()


class _Gather(torch.autograd.Function):
    """[s/cp, ...] of every rank behind one another in rank order [s, ...]; backward adds up what came for each part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        gathered = x.new_empty((dist.get_world_size(group) * x.shape[0], *x.shape[1:]))
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        mine = gradient.new_empty((gradient.shape[0] // dist.get_world_size(ctx.group), *gradient.shape[1:]))
        dist.reduce_scatter_tensor(mine, gradient.contiguous(), group=ctx.group)
        return mine, None


def _decline(layer: Any, what: str, *, mask_type: Any = None, bias: Tensor | None = None) -> None:
    """Raises ConfigError for what this attention would silently get wrong."""
    mask_type = mask_type or layer.attn_mask_type
    dropout = layer.attention_dropout.p if layer.training else 0.0
    for reason, on in (
        ("sliding-window attention (--window-size)", layer.scale_mask_softmax.window_size is not None),
        ("a softmax offset (--softmax-type)", layer.softmax_offset is not None),
        (f"attention dropout {dropout}", dropout > 0),
        ("an attention bias", bias is not None),
        (f"attention mask type {getattr(mask_type, 'name', mask_type)!r}", "causal" not in mask_type.name),
    ):
        if on:
            raise ConfigError(
                f"{reason} does not go with {what} on a machine without a GPU: only Transformer Engine has both. "
                "Leave one of them out."
            )


def _with(config: Any, **changes: Any) -> Any:
    """A shallow copy of a Megatron configuration: checked once already, so not checked again."""
    other = copy.copy(config)
    for name, value in changes.items():
        setattr(other, name, value)
    return other
