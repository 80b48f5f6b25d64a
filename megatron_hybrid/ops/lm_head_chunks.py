"""LM heads applied to a chunk of tokens at a time, and the products that take a chunk's gradient back through them.

    logits      z = cap tanh(s h W^T / cap)      s: MuP's factor, cap: softcap; plain h W^T without them     [r, v/tp]
    gradients   dh = dz W   [r, h], complete for its rows       dW += dz^T h   [v/tp, h], fp32 over all chunks

Data in: hidden states, head shards, dloss/dz of one chunk.  Collectives: with several tensor-parallel ranks one
asynchronous all-reduce of [r, h] per chunk, behind the dW product; none where the caller reduces dh himself.
Memory: a chunk's logits of student and teacher (with a softcap the student's twice); dz overwrites z. dW's fp32 sum is
Megatron's `main_grad` where there is one.
Not here: which rows count, what the gradient is, autograd. A head with a bias is declined.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hybrid.collectives import gather_ranks
from megatron_hybrid.ops import large_pages
from megatron_hybrid.ops.call import Call
from megatron_hybrid.ops.eager import row_blocks
from megatron_hybrid.parallel import Group, GroupView

CPU_CHUNK = 512
"""Tokens of a chunk on a CPU, whatever memory it has. Measured: matrix products are at full speed from 256 on, and
logits of more tokens only leave the cache."""
MOST_TOKENS = 8192
"""Tokens of a chunk elsewhere, at most. Each chunk reads and writes dW's fp32 sum once: 8 bytes for 2 r multiply-adds,
on an H100 (990 TFLOP/s, 3.35 TB/s) as much time as the dW product at r = 1200, a seventh of it here."""
LEAST_TOKENS = 256
"""Below it, products cannot fill an accelerator; where even these logits do not fit, nothing would."""
_FREE_SHARE = 8
"""A chunk's logits may take one part in so many of the device's free memory: activations of the backward pass that
follows want the rest."""


@dataclass(frozen=True)
class Head:
    """How a model turns h W^T into logits."""

    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """(z [r, v/tp], what the softcap was applied to or None), both new and in the weight's dtype."""
        raw = product(hidden, weight)
        if self.scale != 1:
            raw.mul_(self.scale)
        if self.softcap is None:
            return raw, None
        z = large_pages.empty(raw.shape, raw.dtype, raw.device)
        for start, stop in row_blocks(len(raw), raw.shape[1], raw):  # fp32 inside: one rounding in place of three
            z[start:stop] = torch.div(raw[start:stop].float(), self.softcap).tanh_().mul_(self.softcap)
        return z, raw

    def through_softcap(self, gradient: Tensor, raw: Tensor) -> None:
        """Multiplies gradient [r, v/tp] by dz/draw = cosh(raw/cap)^-2 in place.

        Not 1 - tanh^2, which has no digits left where the cap is nearly reached; an overflow of cosh is a true 0.
        """
        assert self.softcap is not None
        for start, stop in row_blocks(len(raw), raw.shape[1], raw):
            gradient[start:stop].mul_(torch.div(raw[start:stop].float(), self.softcap).cosh_().pow_(-2))


def product(hidden: Tensor, weight: Tensor) -> Tensor:
    """h W^T [r, v/tp], new."""
    out = large_pages.empty((len(hidden), len(weight)), hidden.dtype, hidden.device)
    return torch.mm(hidden, weight.t(), out=out)


class Chunk(NamedTuple):
    """Some of the counted rows."""

    start: int
    """First of the counted rows."""
    stop: int
    rows: Any
    """Where they are in the caller's flattened tensors: a slice, or [r] int64 where rows were skipped."""
    call: Call
    """The op's call on these rows alone."""


def chunks_of(call: Call, size: int) -> list[Chunk]:
    """The counted rows in chunks of nearly equal size, none above `size`; one empty chunk where no row counts."""
    n = len(call.target)
    count = max(1, -(-n // size))
    borders = [n * i // count for i in range(count + 1)]
    return [
        Chunk(
            start,
            stop,
            slice(start, stop) if call.rows is None else call.rows[start:stop],
            Call(call.target[start:stop], None, torch.Size([stop - start]), call.shard, call.group),
        )
        for start, stop in zip(borders[:-1], borders[1:], strict=True)
    ]


def default_chunk_size(weight: Tensor, *, has_teacher: bool, has_softcap: bool = False, group: Group = None) -> int:
    """Tokens per chunk for a head [v/tp, h]: a constant on a CPU, elsewhere what fits in free memory, a power of two.

    Chosen once per process and size of a token's logits, and the same on all tensor-parallel ranks: the first call
    holds one all-gather of 8 bytes and waits for it, later ones know.
    """
    row_bytes = len(weight) * (1 + has_teacher + has_softcap) * weight.element_size()
    return CPU_CHUNK if weight.device.type == "cpu" else _fitting(row_bytes, weight.device, group)


@cache
def _fitting(row_bytes: int, device: torch.device, group: Group) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    fits = torch.tensor([free // _FREE_SHARE // row_bytes], device=device)
    least = int(gather_ranks(fits, group).min())
    return min(max(1 << max(least.bit_length() - 1, 0), LEAST_TOKENS), MOST_TOKENS)


class Gradients:
    """dh and dW of one backward pass, chunk by chunk, in any order.

    Args:
        call: the counted rows and the tensor-parallel group.
        weight: [v/tp, h].
        hidden_sum: whether dh is wanted, and summed over tensor-parallel ranks; None: not wanted.
        weight_total: where dW is summed up; None: not wanted.
    """

    def __init__(
        self, call: Call, weight: Tensor, *, hidden_sum: bool | None, weight_total: "WeightTotal | None"
    ) -> None:
        self.group, self.weight = GroupView.of(call.group), weight
        self.sums_hidden = bool(hidden_sum) and self.group.size > 1
        self.hidden = None if hidden_sum is None else weight.new_empty((len(call.target), weight.shape[1]))
        """[n, h] of the counted rows; read it after `wait`."""
        self._total = weight_total
        self._reductions: list[Any] = []

    def add(self, chunk: Chunk, gradient: Tensor, hidden: Tensor) -> None:
        """gradient [r, v/tp] of the loss in h W^T, hidden [r, h]: the chunk's two products."""
        if self.hidden is not None:
            part = self.hidden[chunk.start : chunk.stop]
            torch.mm(gradient, self.weight, out=part)
            if self.sums_hidden and len(part):
                self._reductions.append(dist.all_reduce(part, group=self.group.group, async_op=True))
        if self._total is not None:
            add_product(self._total.sum, gradient, hidden, begin=not self._total.begun)
            self._total.begun = True

    @property
    def weight_total(self) -> Tensor | None:
        """[v/tp, h] fp32: the sum so far."""
        return None if self._total is None else self._total.sum

    def wait(self) -> None:
        """Returns (on a GPU: lets the stream go on) when dh is summed over all ranks."""
        for reduction in self._reductions:
            reduction.wait()
        self._reductions.clear()


_PRODUCT_ELEMENTS = 1 << 21
"""Of a block of dW on a CPU, 4 MB in bf16: AMX takes a quarter longer for one of a few hundred rows."""
_SUMS_IN_FP32 = ("cuda",)
"""Kinds of device whose products of bf16 or fp16 numbers can end in fp32; tests rehearse them with fake tensors."""


def add_product(total: Tensor, gradient: Tensor, hidden: Tensor, *, begin: bool) -> None:
    """total [v/tp, h] += gradient^T [v/tp, r] hidden [r, h]; total is fp32, the product's own sums are too.

    begin  total holds nothing yet, and becomes the product: no zeros to write and to read again

    A CPU has no product of bf16 numbers that ends in fp32: there each chunk's is rounded to bf16 once before it is
    added, as Megatron's is once per micro-batch (products of upcast numbers take five times as long). It is made in
    blocks of the vocabulary, so that nothing of the size of dW stands beside it.
    """
    transposed = gradient.t()
    if gradient.dtype == total.dtype:
        torch.mm(transposed, hidden, out=total) if begin else total.addmm_(transposed, hidden)
    elif total.device.type in _SUMS_IN_FP32:
        if begin:
            torch.mm(transposed, hidden, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, transposed, hidden, out_dtype=total.dtype, out=total)
    else:
        rows = max(1, _PRODUCT_ELEMENTS // total.shape[1])
        for part, columns in zip(total.split(rows), transposed.split(rows), strict=True):
            rounded = torch.mm(columns, hidden)
            for start, stop in row_blocks(len(part), part.shape[1], part):  # torch makes an fp32 copy to add it
                some = rounded[start:stop]
                part[start:stop].copy_(some) if begin else part[start:stop].add_(some)


@dataclass
class WeightTotal:
    """Where dW of a weight is summed up."""

    sum: Tensor
    """[v/tp, h] fp32."""
    begun: bool
    """Whether it holds a sum; else it holds anything."""

    @classmethod
    def for_weight(cls, weight: Tensor) -> "WeightTotal":
        """Its fp32 `main_grad`, or a sum of its own."""
        main_grad = main_grad_of(weight)
        if main_grad is not None and main_grad.dtype == torch.float32:
            return cls(main_grad, begun=True)
        return cls.new(weight)

    @classmethod
    def new(cls, weight: Tensor) -> "WeightTotal":
        """A sum of its own."""
        return cls(large_pages.empty(weight.shape, torch.float32, weight.device), begun=False)


def main_grad_of(weight: Tensor) -> Tensor | None:
    """Megatron's buffer for the sum of this weight's gradients over micro-batches; None outside Megatron.

    Megatron-FSDP makes such buffers on demand: its weights take the way through autograd.
    """
    return None if hasattr(weight, "__fsdp_param__") else getattr(weight, "main_grad", None)


def weight_gradient(weight: Any, total: Tensor, factor: Tensor | None = None) -> Tensor | None:
    """Hands over total (times factor) as the weight's gradient; returns what autograd is to be told.

    With a `main_grad` the sum is added there, unless it is `total` itself, and Megatron's convention is kept:
    `grad_added_to_main_grad` tells its hooks to ignore the weight's .grad, which then holds anything, or zeros where
    `zero_out_wgrad` says that an embedding shares the weight and adds its own gradient through autograd.
    """
    main_grad = main_grad_of(weight)
    if main_grad is None:
        return _rounded(total, factor, weight.dtype)
    if factor is not None:
        main_grad.addcmul_(total, factor)
    elif main_grad is not total:
        main_grad.add_(total)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


def _rounded(total: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """total (times factor) in another type, in blocks: no second fp32 tensor of its size."""
    if factor is None and dtype == total.dtype:
        return total
    out = large_pages.empty(total.shape, dtype, total.device)
    for start, stop in row_blocks(len(total), total.shape[1], total):
        part = total[start:stop]
        out[start:stop] = part if factor is None else part * factor
    return out
