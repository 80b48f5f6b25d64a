"""The hybrid loss from hidden states: LM heads fused in, so that logits exist for a chunk of tokens only.

    z = cap tanh(s h W^T / cap),  loss as in `api.py`,  dloss/dh = sum over tp of dloss/dz W,  dloss/dW = dloss/dz^T h

Values and gradients are those of `vocab_parallel_hybrid_loss` behind a ColumnParallelLinear without bias. Memory beside
inputs and outputs: logits of `chunk_size` tokens, however many tokens there are, and a few numbers per token.
Collectives: forward those of the op for every chunk; backward (one pass: forward) dh's all-reduce over tp.
How often logits are computed, and who may give weights when: `lm_head_function.py`.
Not here: biases, dropout, autocast (hidden states and weight have one dtype).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.errors import ConfigError, ShapeError
from megatron_hybrid.ops.api import HybridLoss, as_weight, passes_of, weights_of
from megatron_hybrid.ops.call import Call, read_call
from megatron_hybrid.ops.function import TokenPasses
from megatron_hybrid.ops.lm_head_chunks import Chunk, Head, default_chunk_size
from megatron_hybrid.ops.lm_head_function import HeadPlan, LinearHybridLossFunction, Weights
from megatron_hybrid.ops.topk_passes import REST_FLOOR, TopKPasses, read_slots
from megatron_hybrid.parallel import Group, GroupView
from megatron_hybrid.records import ReverseWeigh, TokenStats, TopKPayload, Weigh

Teacher = tuple[Tensor, Tensor] | Callable[[Any], Tensor] | TopKPayload
"""Hidden states [..., h_q] and head shard [v/tp, h_q] of a plain head; or a function of rows that returns their logits
[r, v/tp], as `LogitsPayload.logits`: for a head with more to it. Rows: a slice of the flattened target, or [r] int64
where `ignore_index` skips rows. It is asked again in backward and must answer the same; no gradient is taken. Or
its k likeliest tokens, ids and log-probs [..., k], as `vocab_parallel_topk_hybrid_loss` takes them; the reverse KL
only, by passes in torch whatever the backend."""


def linear_hybrid_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher: Teacher | None,
    target: Tensor,
    *,
    imitation_weight: float | Tensor = 1.0,
    advantage: float | Tensor = 0.0,
    weigh: Weigh | None = None,
    reverse_weigh: ReverseWeigh | None = None,
    one_pass: bool = False,
    chunk_size: int | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    sum_hidden_grad: bool = True,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    vocab_size: int | None = None,
    group: Group = None,
    ignore_index: int | None = -100,
    teacher_logit_floor: float | None = None,
    divergence: str = "reverse_kl",
    divergence_mix: float = 0.5,
    backend: str = "torch",
) -> HybridLoss:
    """imitation_weight * divergence(student, teacher) - advantage * log p(target) for every token, minimised.

    hidden           [..., h] the student's last hidden states, the same on every tensor-parallel rank
    weight           [v/tp, h] this rank's rows of the student's head, in the dtype of `hidden`. Where Megatron gave it
                     a `main_grad` its gradient is added there and `grad_added_to_main_grad` set, as Megatron's own
                     layers do; elsewhere it arrives through autograd, in the weight's dtype. fp32 sums in both cases
    teacher          see `Teacher`; None: no imitation term
    target           [...] global token ids, the same on every rank
    reverse_weigh    see `records.ReverseWeigh`; in the place of `weigh`, `imitation_weight` and `advantage`
    one_pass         allows four matrix products in place of up to six: gradients are made in forward, and held until
                     backward scales them, dW in fp32. Needs weights that are known chunk by chunk (not `weigh`), and a
                     loss whose gradient is the same number for all tokens, such as the sum's times a loss scale:
                     anything else raises as a bad target does. Two passes are taken all the same where one chunk holds
                     all tokens, because they take four products then and hold no dW, and in fp16, whose gradients would
                     be rounded before the loss scale
    chunk_size       tokens whose logits exist at a time, at most; the same on every rank. None: 512 on a CPU, elsewhere
                     the power of two between 256 and 8192 that takes an eighth of the free memory. It changes the order
                     of sums: fix it where runs must repeat to the bit
    logit_scale      multiplies the student's logits (MuP's output multiplier)
    logit_softcap    caps them after that, at cap * tanh(logit / cap)
    sum_hidden_grad  sums the gradient of `hidden` over tensor-parallel ranks, as ColumnParallelLinear does. False where
                     what made `hidden` does so in its own backward, such as the gather of sequence parallelism, whose
                     backward is a reduce-scatter

    Everything else as `vocab_parallel_hybrid_loss`. Under `torch.no_grad` each chunk is computed once.
    """
    _check_head(hidden, weight, teacher, target, chunk_size, logit_scale, logit_softcap, divergence)
    passes: TokenPasses = passes_of(backend, divergence, divergence_mix)
    # Read with logits that take no memory: shapes, dtypes and devices are all that is looked at.
    student = weight.new_empty(()).expand(*target.shape, len(weight))
    call = read_call(
        student,
        None,
        target,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        vocab_size=vocab_size,
        group=group,
        ignore_index=ignore_index,
        teacher_logit_floor=teacher_logit_floor,
    )
    if isinstance(teacher, TopKPayload):
        v = len(weight) * GroupView.of(group).size if vocab_size is None else vocab_size
        passes = TopKPasses(read_slots(teacher.ids, teacher.log_probs, call, v=v, rest_floor=REST_FLOOR))
    _check_weights(imitation_weight, advantage, weigh, reverse_weigh, one_pass)
    teacher_logits = None if isinstance(teacher, TopKPayload) else teacher
    if chunk_size is None:
        chunk_size = default_chunk_size(
            weight, has_teacher=teacher_logits is not None, has_softcap=logit_softcap is not None, group=group
        )
    pair: tuple[Tensor | None, Tensor | None] = (None, None)
    if isinstance(teacher_logits, tuple):
        pair, teacher_logits = (teacher_logits[0].detach(), teacher_logits[1].detach()), None
    plan = HeadPlan(
        call=call,
        passes=passes,
        head=Head(logit_scale, logit_softcap),
        teacher_logits=teacher_logits,
        weigh_all=weights_of(target, imitation_weight, advantage, weigh),
        weigh_chunk=_weigh_chunk(call, target, imitation_weight, advantage, reverse_weigh) if weigh is None else None,
        chunk_size=chunk_size,
        one_pass=one_pass and len(call.target) > chunk_size and weight.dtype != torch.float16,
        sum_hidden_grad=sum_hidden_grad,
        differentiate=torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad),
    )
    return HybridLoss(*LinearHybridLossFunction.apply(hidden, weight, *pair, plan))


def _weigh_chunk(
    call: Call,
    target: Tensor,
    imitation_weight: float | Tensor,
    advantage: float | Tensor,
    reverse_weigh: ReverseWeigh | None,
) -> Callable[[TokenStats, Chunk], Weights]:
    """Weights of a chunk: from `reverse_weigh`, or this chunk's of those that were passed instead."""
    if reverse_weigh is None:
        imitation = call.counted(as_weight("imitation_weight", imitation_weight, target))
        credit = call.counted(as_weight("advantage", advantage, target))
        return lambda stats, chunk: (imitation[chunk.start : chunk.stop], credit[chunk.start : chunk.stop])

    def weigh_chunk(stats: TokenStats, chunk: Chunk) -> Weights:
        imitation, credit = reverse_weigh(stats, chunk.rows)
        rows = chunk.call.target
        return as_weight("imitation_weight", imitation, rows), as_weight("advantage", credit, rows)

    return weigh_chunk


def _check_weights(
    imitation_weight: float | Tensor,
    advantage: float | Tensor,
    weigh: Weigh | None,
    reverse_weigh: ReverseWeigh | None,
    one_pass: bool,
) -> None:
    if one_pass and weigh is not None:
        raise ConfigError(
            "one_pass=True makes gradients chunk by chunk, but weigh wants the stats of all tokens first. Pass "
            "reverse_weigh, which is asked chunk by chunk from the end, or one_pass=False."
        )
    numbers = not isinstance(imitation_weight, Tensor) and not isinstance(advantage, Tensor)
    defaults = numbers and imitation_weight == 1 and advantage == 0
    if reverse_weigh is not None and not (weigh is None and defaults):
        raise ConfigError(
            "got reverse_weigh and also weigh, imitation_weight or advantage: reverse_weigh gives both weights, so the "
            "others would be silently ignored. Pass one or the other."
        )


def _check_head(
    hidden: Tensor,
    weight: Tensor,
    teacher: Teacher | None,
    target: Tensor,
    chunk_size: int | None,
    logit_scale: float,
    logit_softcap: float | None,
    divergence: str,
) -> None:
    """Shapes, types and numbers that the op itself does not look at."""
    pairs = [("hidden", hidden, weight)] + ([("teacher's hidden", *teacher)] if isinstance(teacher, tuple) else [])
    for name, states, head in pairs:
        if head.dim() != 2 or states.shape != (*target.shape, head.shape[-1]):
            raise ShapeError(
                f"{name} states must be [..., h] with one row per target {list(target.shape)}, their head [v/tp, h]; "
                f"got {list(states.shape)} and {list(head.shape)}."
            )
        if (
            states.dtype != head.dtype
            or not head.is_floating_point()
            or {states.device, head.device} != {target.device}
        ):
            raise ShapeError(
                f"{name} states are {states.dtype} on {states.device}, their head {head.dtype} on {head.device}, the "
                f"target is on {target.device}: matrix products need one floating-point type and one device. Cast or "
                "move them; autocast has no say in here."
            )
    if len(pairs) == 2 and len(pairs[1][2]) != len(weight):
        raise ShapeError(
            f"the teacher's head has {len(pairs[1][2])} columns of logits, the student's {len(weight)}: the KL "
            "compares them one by one, so both heads must be padded alike (to one padded vocabulary)."
        )
    if isinstance(teacher, TopKPayload) and divergence != "reverse_kl":
        raise ConfigError(
            f"a teacher known by its top k tokens gives the reverse KL only, got divergence {divergence!r}: all others "
            "ask for its whole distribution. Use divergence 'reverse_kl', or a teacher with logits."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ConfigError(f"chunk_size must be at least 1 token, got {chunk_size}. Leave it None for the default.")
    for option, value in (("logit_scale", logit_scale), ("logit_softcap", logit_softcap)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{option} must be a finite number > 0, got {value}.")
