"""Autograd around the chunks of the fused LM head: two passes for any weights, one for weights known chunk by chunk.

    two passes   forward    every chunk: logits -> stats                                    2 products
                 weigh      all stats at once
                 backward   every chunk: logits again -> dz -> dh, dW                       4 products
    one pass     forward    every chunk: logits -> stats -> weigh -> dz -> dh, dW           4 products
                 backward   dh and dW times the gradient that arrives, which must be the same for all tokens

Chunks run from the last rows to the first in forward, so that a token's future is known when its weight is asked for.
Two passes keep the logits of the chunk they end with, and backward begins with it: a single chunk is never computed
again, and c chunks take 6 - 2/c products. They hold nothing of dW's size: it goes where it is summed up. One pass holds
dh and an fp32 dW from forward to backward.

Collectives: forward those of the op for each chunk; dh's all-reduce where dh is made, see `lm_head_chunks.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_hybrid.errors import ShapeError
from megatron_hybrid.ops.call import Call
from megatron_hybrid.ops.function import Measured, TokenPasses, weighted
from megatron_hybrid.ops.lm_head_chunks import (
    Chunk,
    Gradients,
    Head,
    WeightTotal,
    chunks_of,
    product,
    weight_gradient,
)
from megatron_hybrid.records import TokenStats

Weights = tuple[Tensor, Tensor]
"""(imitation_weight, advantage), fp32."""


@dataclass(frozen=True)
class HeadPlan:
    """What the autograd function needs besides tensors."""

    call: Call
    passes: TokenPasses
    head: Head
    teacher_logits: Callable[[Any], Tensor] | None
    """Rows to the teacher's logits, where it has no plain head."""
    weigh_all: Callable[[TokenStats], Weights]
    """Stats in the target's shape to weights in that shape."""
    weigh_chunk: Callable[[TokenStats, Chunk], Weights] | None
    """Stats [r] of a chunk to its weights [r], asked from the last chunk to the first; None: only `weigh_all` knows."""
    chunk_size: int
    one_pass: bool
    sum_hidden_grad: bool
    differentiate: bool
    """Whether a backward pass can follow."""

    @property
    def gradient_scale(self) -> float:
        """What the gradient in z/T becomes the one in h W^T by, softcap aside."""
        return self.call.shard.student_scale * self.head.scale


class Logits(NamedTuple):
    """Of one chunk, [r, v/tp] each."""

    student: Tensor
    before_softcap: Tensor | None
    teacher: Tensor | None


class Heads(NamedTuple):
    """Student and teacher up to their logits; hidden states flattened to [rows, h]."""

    plan: HeadPlan
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None

    def logits(self, chunk: Chunk) -> Logits:
        """New tensors, the teacher's perhaps its function's own."""
        student, raw = self.plan.head.logits(self.hidden[chunk.rows], self.weight)
        teacher = None
        if self.teacher_hidden is not None and self.teacher_weight is not None:
            teacher = product(self.teacher_hidden[chunk.rows], self.teacher_weight)
        elif self.plan.teacher_logits is not None:
            teacher = self.plan.teacher_logits(chunk.rows)
            if teacher.shape != student.shape or teacher.device != student.device:
                raise ShapeError(
                    f"the teacher's function gave {list(teacher.shape)} on {teacher.device} for "
                    f"{chunk.stop - chunk.start} rows, the student's logits are {list(student.shape)} on "
                    f"{student.device}: it must return this rank's shard for exactly the rows it is asked for, padded "
                    "as the student's head."
                )
        return Logits(student, raw, teacher)

    def add_gradient(
        self,
        gradients: Gradients,
        chunk: Chunk,
        logits: Logits,
        numbers: tuple[Tensor, ...],
        dense: Tensor,
        sparse: Tensor,
    ) -> None:
        """The chunk's share of dh and dW; overwrites the student's logits. Numbers and weights [r], scaled."""
        z, raw, w = logits
        passes = self.plan.passes.of_rows(slice(chunk.start, chunk.stop))
        passes.write_gradient(z, w, chunk.call, numbers, dense, sparse, z)
        if raw is not None:
            self.plan.head.through_softcap(z, raw)
        gradients.add(chunk, z, self.hidden[chunk.rows])


class LinearHybridLossFunction(torch.autograd.Function):
    """The fields of `HybridLoss`, in the target's shape; only the loss has a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        plan: HeadPlan,
    ) -> tuple[Tensor, ...]:
        call, heads = plan.call, _heads(plan, hidden, weight, teacher_hidden, teacher_weight)
        ctx.plan, ctx.weight, ctx.hidden_shape = plan, weight, hidden.shape
        gradients = None
        if plan.one_pass and plan.differentiate:
            gradients = _gradients(ctx, plan, WeightTotal.new)
        measured, weights, kept = measure(heads, gradients)
        stats = TokenStats(*(call.restored(value) for value in vars(measured.stats).values()))
        if weights is None:
            imitation, advantage = (call.counted(value) for value in plan.weigh_all(stats))
        else:
            imitation, advantage = weights
        loss, dense = weighted(measured, imitation, advantage)
        ctx.kept = kept
        if gradients is not None:
            gradients.wait()
            ctx.save_for_backward(gradients.hidden, gradients.weight_total)
        elif plan.differentiate:
            tensors = (hidden, weight, teacher_hidden, teacher_weight, dense, advantage, *measured.numbers)
            ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        outputs = (call.restored(loss), *vars(stats).values(), call.restored(measured.divergence))
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return None, None, None, None, None
        plan: HeadPlan = ctx.plan
        arrived = plan.call.counted(grad_loss.float())
        if plan.one_pass:
            hidden_grad, weight_grad = _scaled(ctx, uniform(arrived))
        else:
            hidden_grad, weight_grad = _recomputed(ctx, arrived)
        return hidden_grad, weight_grad, None, None, None


def measure(heads: Heads, gradients: Gradients | None) -> tuple[Measured, tuple[Tensor, ...] | None, Logits | None]:
    """All chunks from the last to the first: what the op finds, the chunks' weights if they have any, the last logits.

    gradients  one pass: where each chunk's gradient goes, of a loss whose own gradient is 1; None: nothing is computed
    """
    plan = heads.plan
    parts: list[tuple[Tensor, ...]] = []
    weights: list[Weights] = []
    logits: Logits | None = None
    for chunk in reversed(chunks_of(plan.call, plan.chunk_size)):
        logits = None  # the last chunk's go before the next one's come
        logits = heads.logits(chunk)
        passes = plan.passes.of_rows(slice(chunk.start, chunk.stop))
        part = passes.measure(logits.student, logits.teacher, chunk.call)
        parts.append((*vars(part.stats).values(), part.divergence, *part.numbers))
        if plan.weigh_chunk is None:
            continue
        imitation, advantage = plan.weigh_chunk(part.stats, chunk)
        weights.append((imitation, advantage))
        if gradients is not None:
            _, dense = weighted(part, imitation, advantage)
            scale = plan.gradient_scale
            heads.add_gradient(gradients, chunk, logits, part.numbers, dense * scale, advantage * scale)
    kl, log_prob, teacher_log_prob, entropy, divergence, *numbers = _joined(parts)
    measured = Measured(TokenStats(kl, log_prob, teacher_log_prob, entropy), divergence, tuple(numbers))
    kept = logits if plan.differentiate and gradients is None else None
    return measured, (_joined(weights) if weights else None), kept


def _joined(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Numbers of the chunks, last chunk first, to those of all counted rows."""
    return tuple(torch.cat(values) for values in zip(*reversed(parts), strict=True))


def uniform(arrived: Tensor) -> Tensor:
    """The one number [] that arrives for every token; asserted where the data is, so that no host waits."""
    first = arrived[:1].sum()
    torch._assert_async(
        ((arrived == first) | first.isnan()).all(),
        "tokens of one call got different gradients of their loss, but one_pass=True has added up the weight's "
        "gradient over tokens already. Put what differs into imitation_weight and advantage and sum the loss, or use "
        "one_pass=False.",
    )
    return first


def _recomputed(ctx: Any, arrived: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Two passes: gradients of hidden states and weight, logits made again for all chunks but the first."""
    plan: HeadPlan = ctx.plan
    hidden, weight, teacher_hidden, teacher_weight, dense, sparse, *numbers = ctx.saved_tensors
    heads = _heads(plan, hidden, weight, teacher_hidden, teacher_weight)
    scale = arrived * plan.gradient_scale
    dense, sparse = scale * dense, scale * sparse
    gradients = _gradients(ctx, plan, WeightTotal.for_weight)
    logits, ctx.kept = ctx.kept, None  # its gradient overwrites it: another backward computes it again
    for chunk in chunks_of(plan.call, plan.chunk_size):
        logits = heads.logits(chunk) if logits is None else logits
        rows = slice(chunk.start, chunk.stop)
        parts = tuple(number[rows] for number in numbers)
        heads.add_gradient(gradients, chunk, logits, parts, dense[rows], sparse[rows])
        logits = None
    total = gradients.weight_total
    weight_grad = None if total is None else weight_gradient(ctx.weight, total)
    gradients.wait()
    return _restored(ctx, gradients.hidden), weight_grad


def _scaled(ctx: Any, factor: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """One pass: gradients of hidden states and weight, from those of a loss whose own gradient is 1."""
    hidden_grad, total = ctx.saved_tensors
    if hidden_grad is not None:
        # In fp32: a bf16 tensor would round the factor, the same way for every token.
        hidden_grad = _restored(ctx, torch.mul(hidden_grad.float(), factor).to(hidden_grad.dtype))
    return hidden_grad, None if total is None else weight_gradient(ctx.weight, total, factor)


def _restored(ctx: Any, hidden_grad: Tensor | None) -> Tensor | None:
    """[n, h] of the counted rows to the caller's shape; exactly 0 in rows that do not count."""
    rows, shape = ctx.plan.call.rows, ctx.hidden_shape
    if hidden_grad is None or rows is None:
        return None if hidden_grad is None else hidden_grad.view(shape)
    flat = hidden_grad.new_zeros((ctx.plan.call.shape.numel(), shape[-1]))
    return flat.index_copy_(0, rows, hidden_grad).view(shape)


def _heads(
    plan: HeadPlan, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor | None, teacher_weight: Tensor | None
) -> Heads:
    teacher_rows = None if teacher_hidden is None else teacher_hidden.reshape(-1, teacher_hidden.shape[-1])
    return Heads(plan, hidden.reshape(-1, hidden.shape[-1]), weight, teacher_rows, teacher_weight)


def _gradients(ctx: Any, plan: HeadPlan, total_for: Callable[[Tensor], WeightTotal]) -> Gradients:
    wants_hidden, wants_weight, *_ = ctx.needs_input_grad
    return Gradients(
        plan.call,
        ctx.weight.detach(),
        hidden_sum=plan.sum_hidden_grad if wants_hidden else None,
        weight_total=total_for(ctx.weight) if wants_weight else None,
    )
