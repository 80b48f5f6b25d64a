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
From hidden states: `lm_head.py`.
Not here: choosing the k tokens (`teachers/topk.py`), renormalised KLs, other divergences, other backends than torch.
"""

import math

from torch import Tensor

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.ops.api import HybridLoss, check_inplace, weights_of
from megatron_hybrid.ops.call import read_call
from megatron_hybrid.ops.function import HybridLossFunction, Plan
from megatron_hybrid.ops.topk_passes import REST_FLOOR, TopKPasses, read_slots
from megatron_hybrid.parallel import Group, GroupView
from megatron_hybrid.records import Weigh


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
    plan = Plan(call, TopKPasses(teacher), weights, inplace)
    return HybridLoss(*HybridLossFunction.apply(student_logits, None, plan))
