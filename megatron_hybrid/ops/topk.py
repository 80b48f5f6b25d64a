"""The hybrid loss against a teacher known by its k most likely tokens: what it gives to all others is one bucket.

Per token, with p = softmax(z/T), K the teacher's tokens, P_rest and Q_rest what student and teacher give to the others:

    D         sum_K p_v (log p_v - log q_v) + P_rest (log P_rest - log Q_rest)
    dD/dz_v   p_v (g_v - D) / T,    g_v = log p_v - log q_v in K,    log P_rest - log Q_rest elsewhere
    loss      beta D - A log p(y)

D is the reverse KL between the two distributions over k + 1 outcomes: never above the full KL, equal to it where K is
the whole vocabulary. The same numbers come from the full KL to a teacher that spreads Q_rest as the student spreads
P_rest, so log q(y) of a y outside K is log p(y) - (log P_rest - log Q_rest), and E_p[log p - log q] = D.

That merging outcomes never raises a KL is the data-processing inequality. The rest as one bucket, its gradient in
closed form and log q(y) outside K are ours.

Forward: one all-gather of 48 bytes per token and rank; none at tp = 1.  Backward: no collective.  Memory of vocabulary
size: the gradient in the logits' dtype, or nothing with `inplace=True`.
Not here: choosing the k tokens (`teachers/topk.py`), renormalised KLs, other divergences, other backends than torch.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_hybrid.collectives import gather_ranks
from megatron_hybrid.errors import ConfigError
from megatron_hybrid.ops.api import HybridLoss, check_inplace, weights_of
from megatron_hybrid.ops.call import Call, read_call, rows_of
from megatron_hybrid.ops.function import Measured, begin_backward, end_forward, weighted
from megatron_hybrid.ops.topk_passes import Slots, merge_shards, read_slots, shard_gradient, shard_stats
from megatron_hybrid.parallel import Group, GroupView
from megatron_hybrid.records import TokenStats, Weigh

REST_FLOOR = -24 * math.log(2)
"""log of fp32's unit roundoff, 6e-8: log-softmax in fp32, which most teachers use, resolves no smaller rest."""


def vocab_parallel_topk_hybrid_loss(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    target: Tensor,
    *,
    imitation_weight: float | Tensor = 1.0,
    advantage: float | Tensor = 0.0,
    weigh: Weigh | None = None,
    student_temperature: float = 1.0,
    vocab_size: int | None = None,
    group: Group = None,
    inplace: bool = False,
    ignore_index: int | None = -100,
    rest_floor: float = REST_FLOOR,
) -> HybridLoss:
    """imitation_weight * D(student || teacher's top k) - advantage * log p(target) for every token, minimised.

    student_logits     [..., v/tp] any float type; rank r holds columns r*v/tp ... of the padded vocabulary
    teacher_ids        [..., k] integers, global token ids, the same on every rank; -1 marks an unused slot. An id twice
                       in a row is the caller's mistake and not looked for: its mass would count twice
    teacher_log_probs  [..., k] any float type, nats, at the teacher's temperature; read nowhere in unused slots. -inf
                       where the student has mass makes D +inf, which has no gradient, as in the full op
    rest_floor         the least log Q_rest, nats. At 6e-8 the rest is rounding of the log-probs, and 0 would make D
                       infinite. It is not used where the student has nothing outside K: there is no bucket then

    Everything else as `vocab_parallel_hybrid_loss`. Of the outputs, `kl` and `divergence` are D. Rows that do not count
    may hold anything, ids included.

    Raises:
        ConfigError: a setting out of its range; weights given twice; with `inplace`, a second backward.
        ShapeError: tensors that do not fit one another or lie on different devices.
        RuntimeError: an id or a target outside the vocabulary, as in `vocab_parallel_hybrid_loss`.
    """
    call = read_call(
        student_logits,
        None,
        target,
        student_temperature=student_temperature,
        vocab_size=vocab_size,
        group=group,
        ignore_index=ignore_index,
    )
    if not (math.isfinite(rest_floor) and rest_floor <= 0):
        raise ConfigError(
            f"rest_floor must be a finite log-probability <= 0, got {rest_floor}: it keeps D finite where the "
            "teacher's tokens leave nothing to the others."
        )
    v = student_logits.shape[-1] * GroupView.of(group).size if vocab_size is None else vocab_size
    teacher = read_slots(teacher_ids, teacher_log_probs, call, v=v, rest_floor=rest_floor)
    weights = weights_of(target, imitation_weight, advantage, weigh)
    if inplace:
        check_inplace(student_logits)
    loss, kl, log_prob, teacher_log_prob, entropy = _TopKLoss.apply(student_logits, teacher, call, weights, inplace)
    return HybridLoss(loss, kl, log_prob, teacher_log_prob, entropy, divergence=kl)


class _TopKLoss(torch.autograd.Function):
    """(loss, kl, log_prob, teacher_log_prob, entropy), each in the target's shape; only the loss has a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        teacher: Slots,
        call: Call,
        weights: Callable[[TokenStats], tuple[Tensor, Tensor]],
        inplace: bool,
    ) -> tuple[Tensor, ...]:
        stats = shard_stats(rows_of(student_logits), teacher, call)
        # Where no row counts there is nothing to gather: ranks share their targets, so all of them know.
        merged = merge_shards(gather_ranks(stats, call.group) if len(stats) else stats.unsqueeze(0), teacher, call)
        restored = TokenStats(*(call.restored(value) for value in vars(merged.stats).values()))
        imitation, advantage = (call.counted(weight) for weight in weights(restored))
        kl = merged.stats.kl
        loss, dense = weighted(Measured(merged.stats, kl, ()), imitation, advantage)
        k = torch.where(kl == torch.inf, 0.0, merged.k)
        numbers = torch.stack((merged.m, k, merged.g_rest, merged.s, dense.double(), advantage.double()))
        ctx.call, ctx.inplace = call, inplace
        ctx.save_for_backward(student_logits, teacher.ids, teacher.log_probs, teacher.log_rest, numbers)
        return end_forward(ctx, (call.restored(loss), *vars(restored).values()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        if grad_loss is None:
            return None, None, None, None, None
        out, (student_logits, ids, log_probs, log_rest, numbers) = begin_backward(ctx, inplace=ctx.inplace)
        m, k, g_rest, s, dense, sparse = numbers.unbind(0)
        scale = ctx.call.counted(grad_loss.double()) * ctx.call.shard.student_scale
        coefficients = torch.stack((m, k, g_rest, scale * dense / s, scale * sparse / s, scale * sparse), dim=-1)
        teacher = Slots(ids, log_probs, log_rest)
        shard_gradient(rows_of(student_logits), teacher, ctx.call, coefficients, rows_of(out))
        return out, None, None, None, None
