"""Messages of one optimizer step on one rank: how many, over which axis, and the bytes that the rank hands in.

    ours        what this package adds; tests count it call by call in a real step, so it is exact
    Megatron's  what the same step sends anyway; formulas of its documentation, approximate

Bytes are those of the tensor that a rank gives to a call: an all-gather brings back as many from every other rank, an
all-reduce moves about twice as many in a ring. All on the last pipeline stage, which sends most of ours.
"""

import math
from dataclasses import dataclass

from plan_bytes import parameters
from plan_head import FP32, STAT_BYTES, chunks, measures_norms, spans_responses
from plan_model import Plan

from megatron_hybrid.metrics import MAX_SLOTS, MEANINGS
from megatron_hybrid.ops.topk_passes import NUM_STATS as TOPK_STATS
from megatron_hybrid.teachers.topk import CHUNK_TOKENS

FP64 = INT64 = 8
NORM_SUMS = 3
"""fp32 numbers of a token that `ops/diagnostics.py` gathers besides the statistics."""


@dataclass(frozen=True)
class Message:
    """Calls of one kind in one step."""

    what: str
    call: str
    """all_gather, all_reduce, broadcast or send."""
    axis: str
    count: int
    num_bytes: int
    """Of all of them together."""


def op(plan: Plan) -> list[Message]:
    """The op's one all-gather for each micro-batch, [n, 8] fp32 (top k: [n, 6] fp64); of the fused head for each chunk.

    Where gradient norms are measured, once more with [n, 8] and [n, 3] (`ops/diagnostics.py`).
    """
    if plan.layout.tp == 1:
        return []
    n, batches = plan.tokens, plan.num_microbatches
    topk = plan.teacher is not None and plan.step.payload == "topk"
    per_token = FP64 * TOPK_STATS if topk else STAT_BYTES
    calls = len(chunks(plan))
    messages = [Message("op: statistics", "all_gather", "tp", batches * calls, batches * n * per_token)]
    if measures_norms(plan):
        size = batches * n * (STAT_BYTES + NORM_SUMS * FP32)
        messages.append(Message("gradient norms", "all_gather", "tp", 2 * batches * calls, size))
    return messages


def fused_head(plan: Plan) -> list[Message]:
    """dh [r, h] of each chunk, summed over tp; of the logits' path Megatron's own head sends the same bytes in one."""
    if plan.layout.tp == 1 or plan.step.head != "fused":
        return []
    size = plan.num_microbatches * plan.tokens * plan.student.hidden * plan.step.dtype_bytes
    return [Message("fused head: dh", "all_reduce", "tp", plan.num_microbatches * len(chunks(plan)), size)]


def credit(plan: Plan) -> list[Message]:
    """One table [k + 1, b, s] fp32 for each micro-batch (`returns/token_table.py`): of costs where there is a teacher,
    of log ratios where importance weights are of more than one token; none of neither."""
    values = (plan.teacher is not None) + spans_responses(plan)
    if plan.layout.cp == 1 or not values:
        return []
    size = FP32 * (values + 1) * plan.step.micro_batch * plan.step.seq_length
    batches = plan.num_microbatches
    return [Message("credit: tables of responses", "all_reduce", "cp", batches, batches * size)]


def sampling(plan: Plan) -> list[Message]:
    """Per decoded token two small all-gathers of [2, b], fp32 and fp64, a broadcast of [b] ids, and the hidden states
    [1, b, h] to the next stage (`rollouts/sampling.py`, `rollouts/generate.py`); the first step sends whole prompts,
    each once. Stages agree once whether attention obeys masks (`mcore/kv_cache.py`).

    Of prompts of one length; responses that stop early send less.
    """
    layout, step = plan.layout, plan.step
    first_rows, rows = range(0, plan.rows, step.rollout_batch), plan.rows
    last_rows = [min(first + step.rollout_batch, rows) - 1 for first in first_rows]
    prompts = sum(b // step.group_size - a // step.group_size + 1 for a, b in zip(first_rows, last_rows, strict=True))
    steps = len(first_rows) * step.response_tokens
    drawn = step.response_tokens * rows
    messages = []
    if layout.tp > 1:
        messages.append(Message("sampling: one token", "all_gather", "tp", 2 * steps, 2 * drawn * (FP32 + FP64)))
    if layout.pp > 1:
        messages.append(Message("sampling: drawn ids", "broadcast", "pp", steps, drawn * INT64))
        messages.append(Message("sampling: masks agreed upon", "all_reduce", "pp", 1, INT64))
        positions = prompts * step.prompt_tokens + rows * (step.response_tokens - 1)
        size = positions * plan.student.hidden * step.dtype_bytes
        if layout.vpp > 1:  # the last chunk of the last rank has nobody behind it
            hops = layout.vpp - 1
            messages.append(Message("sampling: hidden states", "send", "pp", hops * steps, hops * size))
    return messages


def rewards(plan: Plan) -> list[Message]:
    """Scored by one rank of a replica, 2 b + 1 numbers in fp32 along cp and tp (`train/scoring.py`)."""
    axes = [axis for axis in ("cp", "tp") if getattr(plan.layout, axis) > 1]
    return [Message("rewards", "broadcast", axis, 1, FP32 * (2 * plan.rows + 1)) for axis in axes]


def teacher(plan: Plan) -> list[Message]:
    """Choosing the top k: 8 (k + 2) bytes per token, some hundred tokens at a time (`teachers/topk.py`)."""
    if plan.layout.tp == 1 or plan.teacher is None or plan.step.payload != "topk":
        return []
    count = plan.num_microbatches * math.ceil(plan.tokens / CHUNK_TOKENS)
    size = plan.num_microbatches * plan.tokens * INT64 * (plan.step.topk + 2)
    return [Message("teacher: top k", "all_gather", "tp", count, size)]


def metrics(plan: Plan) -> list[Message]:
    """One MAX [512] and one SUM of at most two numbers a name, fp64 (`metrics.py`)."""
    if plan.layout.dp * plan.layout.cp == 1:
        return []
    return [Message("metrics, at most", "all_reduce", "dp x cp", 2, FP64 * (MAX_SLOTS + 2 * len(MEANINGS)))]


def ours(plan: Plan) -> list[Message]:
    """Everything that this package adds to a step, on the last stage."""
    parts = (sampling, rewards, teacher, op, fused_head, credit, metrics)
    return [message for part in parts for message in part(plan)]


def megatrons(plan: Plan) -> list[Message]:
    """What Megatron sends in the same step on the last stage, approximately."""
    layout, step, student = plan.layout, plan.step, plan.student
    size = step.dtype_bytes
    positions = plan.num_microbatches * step.micro_batch * plan.width // layout.cp
    messages = []
    if layout.dp * layout.cp > 1:
        last = parameters(plan, student, last=True)
        messages.append(Message("gradients", "reduce_scatter", "dp x cp", 1, FP32 * last))
        if step.distributed_optimizer:
            messages.append(Message("new weights", "all_gather", "dp x cp", 1, size * last // (layout.dp * layout.cp)))
    if layout.tp > 1:
        for shape, passes in zip(plan.shapes, (2, 1), strict=False):  # forward and backward, or forward alone
            layers = layout.stage_layers(shape)[1]
            count, moved = 2 * passes * layers * plan.num_microbatches, 2 * passes * layers * positions
            messages.append(Message(f"layers: {shape.name}", "all_reduce", "tp", count, moved * shape.hidden * size))
        steps = math.ceil(plan.rows / step.rollout_batch) * step.response_tokens
        layers = layout.stage_layers(student)[1]
        moved = 2 * layers * plan.rows * (step.seq_length - 1) * student.hidden * size
        messages.append(Message("layers, sampling", "all_reduce", "tp", 2 * layers * steps, moved))
        if plan.step.head == "logits":
            moved = plan.num_microbatches * plan.tokens * student.hidden * size
            messages.append(Message("head: dh", "all_reduce", "tp", plan.num_microbatches, moved))
    if layout.cp > 1:
        for shape, passes in zip(plan.shapes, (3, 1), strict=False):  # backward sends keys, values and their gradients
            count = passes * layout.stage_layers(shape)[1] * (layout.cp - 1) * plan.num_microbatches
            moved = passes * layout.stage_layers(shape)[1] * (layout.cp - 1) * positions
            keys = 2 * max(1, shape.groups // layout.tp) * shape.head_dim * size
            messages.append(Message(f"keys and values: {shape.name}", "send", "cp", count, moved * keys))
    if layout.pp > 1:
        share = layout.tp if layout.sequence_parallel else 1
        moved = layout.vpp * positions * student.hidden * size // share
        messages.append(Message("gradients of hidden states", "send", "pp", layout.vpp * plan.num_microbatches, moved))
    return messages
