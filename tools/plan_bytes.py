"""Bytes on one rank, component by component: each formula once, with its source; tests measure every one of them.

    weights, gradients, optimizer of the student     the whole run
    weights of the teacher                           the whole run
    KV cache                                         while responses are sampled
    payload of the teacher, activations, the op      while the student learns

All on the first and on the last rank of a pipeline. Not here: what an allocator loses between tensors, workspaces of
kernels, communication buffers of NCCL (about 1 GB a rank in practice), the CUDA context.
"""

from dataclasses import dataclass

from plan_model import Plan
from plan_shapes import Shape

from megatron_hybrid.ops import eager

FP32 = 4
TOPK_SLOT = 8 + 4
"""`records.TopKPayload`: an int64 id and an fp32 log-probability."""
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
ACCELERATOR_BLOCK = 1 << 24
"""Elements of a block on an accelerator (`ops/eager.py`)."""


@dataclass(frozen=True)
class Item:
    """One line of the plan."""

    name: str
    first: int
    """Bytes on the first rank of a pipeline."""
    last: int
    """And on the last."""
    when: str
    """always, sampling or learning."""
    note: str = ""


def parameters(plan: Plan, shape: Shape, *, last: bool) -> int:
    """Parameters of a model on the first or last rank of a pipeline.

    Source: the modules of Megatron's GPTModel (local and Transformer Engine layers hold the same numbers). Matrices are
    cut by tp, norms are whole on every rank. At pp > 1 the last rank holds an output layer also where it is tied.
    """
    layout = plan.layout
    norm = shape.norm_size * shape.hidden
    queries, keys = shape.heads * shape.head_dim, shape.groups * shape.head_dim
    qkv = (queries + 2 * keys) * (shape.hidden + shape.qkv_bias)
    mlp = (3 if shape.gated else 2) * shape.ffn * shape.hidden
    layer = (qkv + queries * shape.hidden + mlp) // layout.tp + 2 * norm
    layer += 2 * shape.norm_size * shape.head_dim * shape.qk_norm
    head = plan.columns * shape.hidden
    if layout.pp == 1:
        return shape.layers * layer + norm + head * (1 if shape.tied else 2)
    return layout.stage_layers(shape)[last] * layer + head + (norm if last else 0)


def gradients(plan: Plan, *, last: bool) -> int:
    """Megatron's buffer of gradients: fp32, `--accumulate-allreduce-grads-in-fp32`, which bf16 training switches on."""
    return FP32 * parameters(plan, plan.student, last=last)


def optimizer(plan: Plan, *, last: bool) -> int:
    """Adam's two fp32 moments and, under bf16, fp32 weights; shared out over dp x cp by the distributed optimizer.

    Source: Megatron's docs/user-guide/features/dist_optimizer.md. Its buckets are padded: up to 64 numbers per tensor.
    """
    per_parameter = 2 * FP32 + (FP32 if plan.step.dtype_bytes == 2 else 0)
    whole = per_parameter * parameters(plan, plan.student, last=last)
    return whole // (plan.layout.dp * plan.layout.cp) if plan.step.distributed_optimizer else whole


def payload(plan: Plan, *, microbatches: int) -> int:
    """What the teacher leaves of some micro-batches on the last stage (`teachers/frozen.py`, `teachers/topk.py`).

    Every tensor-parallel rank holds all of it. The trainer annotates all micro-batches of a step before the first is
    learnt from.
    """
    if plan.teacher is None:
        return 0
    step = plan.step
    per_token = TOPK_SLOT * step.topk if step.payload == "topk" else plan.teacher.hidden * step.dtype_bytes
    return microbatches * plan.tokens * per_token


def kv_cache(plan: Plan, *, last: bool) -> int:
    """Keys and values [s, b, groups/tp, head] of each layer here: Megatron's StaticInferenceContext, whole sequences.

    Context-parallel ranks decode the same responses, each with a cache of its own (`rollouts/generate.py`).
    """
    layout, student, step = plan.layout, plan.student, plan.step
    groups = max(1, student.groups // layout.tp)
    batch = min(step.rollout_batch, plan.rows)
    per_layer = 2 * step.seq_length * batch * groups * student.head_dim * step.dtype_bytes
    return layout.stage_layers(student)[last] * per_layer


def logits(plan: Plan, tokens: int) -> int:
    """Of student and teacher [n, v/tp] each; the student's gradient is written over its logits.

    A teacher's payload of top k needs no logits of the teacher.
    """
    models = 2 if plan.teacher is not None and plan.step.payload == "hidden" else 1
    return models * tokens * plan.columns * plan.step.dtype_bytes


def op(plan: Plan, *, block: int = ACCELERATOR_BLOCK) -> int:
    """What `vocab_parallel_hybrid_loss(inplace=True)` holds at its peak beside both logits, backend torch.

    The stats pass with its [n, 8], or the merge of [tp, n, 8] behind it, whichever is more.

    block  elements of a block of rows (`ops/eager.py`)
    """
    n, rows = plan.tokens, _rows_of_block(plan, plan.tokens, block)
    stats = rows * (STATS_BUFFERS * plan.columns + ROW_NUMBERS) + n * eager.NUM_STATS
    gathered = MERGE_BYTES_PER_RANK * plan.layout.tp - (STAT_BYTES if plan.layout.tp == 1 else 0)
    return max(FP32 * stats, n * (MERGE_BYTES + gathered))


def fused_head(plan: Plan, *, block: int = ACCELERATOR_BLOCK) -> int:
    """What `linear_hybrid_loss` holds at its peak beside its inputs, backend torch (`ops/lm_head_function.py`).

    Logits of one chunk, the op's buffers on it, dh; in the end an empty tensor in the place of dW, as Megatron's own
    layers leave one. In one pass dW in fp32 besides, and copies of dh while it is scaled; in two passes dW is summed in
    Megatron's `main_grad`.
    """
    step, chunk = plan.step, min(plan.step.chunk, plan.tokens)
    width = _rows_of_block(plan, chunk, block) * plan.columns
    numbers, weight = plan.tokens * plan.student.hidden, plan.columns * plan.student.hidden
    dh, placeholder = numbers * step.dtype_bytes, weight * step.dtype_bytes
    of_tokens = FP32 * HEAD_NUMBERS * plan.tokens
    chunks = logits(plan, chunk) + of_tokens
    stats, gradient = (FP32 * buffers * width for buffers in (STATS_BUFFERS, GRADIENT_BUFFERS))
    if not step.one_pass:
        return max(chunks + stats, chunks + gradient + dh, of_tokens + dh + placeholder)
    copies = FP32 * numbers * (2 if step.dtype_bytes == 2 else 1)
    return FP32 * weight + dh + max(chunks + stats, copies, of_tokens + dh + placeholder)


def _rows_of_block(plan: Plan, tokens: int, block: int) -> int:
    return min(tokens, max(1, block // plan.columns))


def items(plan: Plan, activations: tuple[int, int]) -> list[Item]:
    """All lines of the plan; activations on the first and last rank come from Megatron's estimator."""
    student, step = plan.student, plan.step
    first, last = (parameters(plan, student, last=end) for end in (False, True))
    note = f"{last / 1e9:.2f} G parameters on the last"
    lines = [
        Item("student: weights", first * step.dtype_bytes, last * step.dtype_bytes, "always", note),
        Item("student: gradients", *(gradients(plan, last=end) for end in (False, True)), "always", "fp32"),
        Item("student: optimizer", *(optimizer(plan, last=end) for end in (False, True)), "always", _shared(plan)),
    ]
    if plan.teacher is not None:
        ends = [parameters(plan, plan.teacher, last=end) * step.dtype_bytes for end in (False, True)]
        lines.append(Item("teacher: weights", ends[0], ends[1], "always", "no gradients, no optimizer"))
    note = f"{min(step.rollout_batch, plan.rows)} sequences of {step.seq_length}"
    lines.append(Item("rollouts: KV cache", *(kv_cache(plan, last=end) for end in (False, True)), "sampling", note))
    if plan.teacher is not None:
        whole = payload(plan, microbatches=plan.num_microbatches)
        one = payload(plan, microbatches=1)
        note = f"{plan.num_microbatches} micro-batches of {human(one)}"
        lines.append(_on_last(plan, f"teacher: payload, {step.payload}", whole, note))
    lines.append(Item("activations", *activations, "learning", "Megatron's estimator"))
    if step.head == "logits":
        note = f"{plan.tokens} tokens x {plan.columns} columns"
        lines.append(_on_last(plan, "head: logits of a micro-batch", logits(plan, plan.tokens), note))
        lines.append(_on_last(plan, "op: blocks and numbers", op(plan), "backend torch"))
    else:
        lines.append(_on_last(plan, "fused head", fused_head(plan), f"chunks of {min(step.chunk, plan.tokens)} tokens"))
    return lines


def human(size: float) -> str:
    """Bytes as a person reads them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size) >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"


def _on_last(plan: Plan, name: str, size: int, note: str) -> Item:
    return Item(name, size if plan.layout.pp == 1 else 0, size, "learning", note)


def _shared(plan: Plan) -> str:
    ranks = plan.layout.dp * plan.layout.cp
    return f"over {ranks} ranks (dp x cp)" if plan.step.distributed_optimizer else "whole on every rank"
