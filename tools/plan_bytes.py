"""Bytes on one rank, component by component: each formula once, with its source; tests measure every one of them.

    weights, gradients, optimizer of the student     the whole run
    weights of the teacher                           the whole run
    KV cache                                         while responses are sampled
    payload of the teacher, activations, the head    while the student learns (`plan_head.py`)

All on the first and on the last rank of a pipeline. Not here: what an allocator loses between tensors, workspaces of
kernels, communication buffers of NCCL (about 1 GB a rank in practice), the CUDA context.
"""

from dataclasses import dataclass, replace

import plan_head
from plan_head import FP32
from plan_model import Plan
from plan_shapes import Shape

TOPK_SLOT = 8 + 4
"""`records.TopKPayload`: an int64 id and an fp32 log-probability."""


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
        lines.append(_on_last(plan, f"teacher: payload, {step.payload}", whole, _payload_note(plan)))
    lines.append(Item("activations", *activations, "learning", "Megatron's estimator"))
    lines.append(_on_last(plan, "LM head and op", plan_head.peak(plan), plan_head.note(plan)))
    return lines


def human(size: float) -> str:
    """Bytes as a person reads them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size) >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"


def _payload_note(plan: Plan) -> str:
    """What the payload is made of, and how to have less of it."""
    note = f"{plan.num_microbatches} micro-batches of {human(payload(plan, microbatches=1))}"
    if plan.step.payload == "hidden":
        few = replace(plan, step=replace(plan.step, payload="topk"))
        less = human(payload(few, microbatches=plan.num_microbatches))
        note += f"; top k: {less}"
    return note + "; or fewer responses a step, a collection then cut into mini-batches"


def _on_last(plan: Plan, name: str, size: int, note: str) -> Item:
    return Item(name, size if plan.layout.pp == 1 else 0, size, "learning", note)


def _shared(plan: Plan) -> str:
    ranks = plan.layout.dp * plan.layout.cp
    return f"over {ranks} ranks (dp x cp)" if plan.step.distributed_optimizer else "whole on every rank"
