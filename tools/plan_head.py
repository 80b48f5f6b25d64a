"""Bytes of the LM head and the op on one rank of the last stage, and which way the trainer goes.

    fused    logits of a chunk at a time; one pass where credit can be asked from the end, else two
    logits   of a whole micro-batch

Which chunks there are is asked of the product; when one pass is taken is its rule, held against a real step by a test.
Formulas of the backend torch and of the reverse KL, each measured by tests; a teacher's top k takes less. Not here:
heads that are no plain product, fp16, for which two passes are taken.
"""

import torch
from plan_model import Plan

from megatron_hybrid.ops import diagnostics, eager
from megatron_hybrid.ops.call import Call, Shard
from megatron_hybrid.ops.lm_head_chunks import MOST_TOKENS, Chunk, chunks_of
from megatron_hybrid.returns.corrections import Correction

FP32 = 4
STAT_BYTES = FP32 * eager.NUM_STATS
"""What a rank tells the others of a token (`ops/function.py`)."""
STATS_BUFFERS, GRADIENT_BUFFERS = 4, 3
"""fp32 buffers of one block of rows in the two passes of `ops/eager.py`."""
ROW_NUMBERS = 20
"""fp32 numbers of each row of a block beside them, measured."""
MERGE_BYTES, MERGE_BYTES_PER_RANK = 72, 57
"""Of a token while the ranks' statistics are merged, blocks gone: 32 gathered from each rank and what rescales them;
measured."""
HEAD_NUMBERS = 16
"""fp32 numbers of a token that the fused head keeps of all its chunks, measured."""
NORM_NUMBERS = 24
"""fp32 numbers of a token while its gradient norms are measured, at most; measured."""
ACCELERATOR_BLOCK = 1 << 24
"""Elements of a block on an accelerator (`ops/eager.py`)."""


def chunk_limit(plan: Plan) -> int:
    """Tokens whose logits exist at a time, at most."""
    return (plan.step.chunk or MOST_TOKENS) if plan.step.head == "fused" else plan.tokens


def chunks(plan: Plan) -> list[Chunk]:
    """The product's own chunks of a micro-batch; one where logits are whole."""
    n = plan.tokens
    call = Call(torch.empty(n, device="meta"), None, torch.Size([n]), Shard(0, plan.columns, 1.0, 1.0, None), None)
    return chunks_of(call, chunk_limit(plan))


def spans_responses(plan: Plan) -> bool:
    """Whether importance weights are of more than one token."""
    return Correction(plan.step.rollout_correction, prefix=plan.step.prefix_correction).spans_responses


def one_pass(plan: Plan) -> bool:
    """Whether the fused head makes its gradients in forward and holds dW in fp32 until backward.

    As `CreditAssignment.from_the_end` and `linear_hybrid_loss` decide together.
    """
    from_the_end = plan.layout.cp == 1 and not spans_responses(plan)
    return plan.step.head == "fused" and from_the_end and plan.tokens > chunk_limit(plan)


def logits(plan: Plan, tokens: int) -> int:
    """Of student and teacher [n, v/tp] each; the student's gradient is written over its logits.

    A teacher's payload of top k needs no logits of the teacher.
    """
    models = 2 if plan.teacher is not None and plan.step.payload == "hidden" else 1
    return models * tokens * plan.columns * plan.step.dtype_bytes


def op(plan: Plan, *, block: int = ACCELERATOR_BLOCK) -> int:
    """What `vocab_parallel_hybrid_loss(inplace=True)` holds at its peak beside both logits.

    The stats pass with its [n, 8], or the merge of [tp, n, 8] behind it, whichever is more.

    block  elements of a block of rows (`ops/eager.py`)
    """
    n, rows = plan.tokens, _rows_of_block(plan, plan.tokens, block)
    stats = rows * (STATS_BUFFERS * plan.columns + ROW_NUMBERS) + n * eager.NUM_STATS
    gathered = MERGE_BYTES_PER_RANK * plan.layout.tp - (STAT_BYTES if plan.layout.tp == 1 else 0)
    return max(FP32 * stats, n * (MERGE_BYTES + gathered))


def fused(plan: Plan, *, block: int = ACCELERATOR_BLOCK) -> int:
    """What `linear_hybrid_loss` holds at its peak beside its inputs (`ops/lm_head_function.py`).

    Logits of one chunk, the op's buffers on it, dh; in the end an empty tensor in the place of dW, as Megatron's own
    layers leave one. In one pass dW in fp32 besides, and copies of dh while it is scaled; in two passes dW is summed in
    Megatron's `main_grad`.
    """
    chunk = _largest_chunk(plan)
    width = _rows_of_block(plan, chunk, block) * plan.columns
    dh, placeholder = _dh(plan), plan.columns * plan.student.hidden * plan.step.dtype_bytes
    of_tokens = FP32 * HEAD_NUMBERS * plan.tokens
    with_logits = logits(plan, chunk) + of_tokens
    stats, gradient = (FP32 * buffers * width for buffers in (STATS_BUFFERS, GRADIENT_BUFFERS))
    if not one_pass(plan):
        return max(with_logits + stats, with_logits + gradient + dh, of_tokens + dh + placeholder)
    copies = FP32 * plan.tokens * plan.student.hidden * (2 if plan.step.dtype_bytes == 2 else 1)
    return _dw(plan) + dh + max(with_logits + stats, copies, of_tokens + dh + placeholder)


def gradient_norms(plan: Plan, *, block: int = ACCELERATOR_BLOCK) -> int:
    """What a measurement of gradient norms takes (`ops/diagnostics.py`): the logits once more, a chunk at a time."""
    tokens = min(chunk_limit(plan), plan.tokens)
    buffers = diagnostics._NUM_BUFFERS * _rows_of_block(plan, tokens, block) * plan.columns
    return logits(plan, tokens) + FP32 * (buffers + NORM_NUMBERS * tokens)


def peak(plan: Plan, *, block: int = ACCELERATOR_BLOCK) -> int:
    """The most that head and op hold at once beside their inputs.

    Norms are measured between forward and backward: beside all logits, or one pass's dW and dh, or the last chunk's
    logits that two passes keep.
    """
    if plan.step.head == "logits":
        loss, kept = logits(plan, plan.tokens) + op(plan, block=block), logits(plan, plan.tokens)
    else:
        loss = fused(plan, block=block)
        kept = _dw(plan) + _dh(plan) if one_pass(plan) else logits(plan, _largest_chunk(plan))
    return max(loss, kept + gradient_norms(plan, block=block)) if measures_norms(plan) else loss


def measures_norms(plan: Plan) -> bool:
    """Whether the step measures gradient norms; never with a teacher known by its top k."""
    return plan.step.gradient_norms and (plan.teacher is None or plan.step.payload == "hidden")


def note(plan: Plan) -> str:
    """How the loss is made, in words."""
    if plan.step.head == "logits":
        return f"logits of {plan.tokens} tokens x {plan.columns} columns at once"
    passes = "one pass, dW held in fp32" if one_pass(plan) else "two passes"
    few = "" if plan.step.chunk else "; the trainer takes smaller ones where memory is short"
    return f"{len(chunks(plan))} x {_largest_chunk(plan)} tokens x {plan.columns} columns, {passes}{few}"


def _largest_chunk(plan: Plan) -> int:
    return max(chunk.stop - chunk.start for chunk in chunks(plan))


def _dh(plan: Plan) -> int:
    return plan.tokens * plan.student.hidden * plan.step.dtype_bytes


def _dw(plan: Plan) -> int:
    return FP32 * plan.columns * plan.student.hidden


def _rows_of_block(plan: Plan, tokens: int, block: int) -> int:
    return min(tokens, max(1, block // plan.columns))
