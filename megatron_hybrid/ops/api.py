"""The hybrid loss on a vocabulary split over tensor-parallel ranks: one function, any backend.

Per token, with p = softmax(z/T), q = softmax(w/T'), and weights held constant:

    loss         beta KL(p || q) - A log p(y)
    dloss/dz_v   ( beta p_v ((log p_v - log q_v) - KL) + A (p_v - 1[v = y]) ) / T

With another `divergence` D(p, q) in the place of the KL: p_v (g_v - E_p[g]) for the bracket, g = dD/dp (`mixtures.py`).
Forward: one all-gather of 32 bytes per token and rank, a second one of 8 for another divergence; none at tp = 1.
Backward: no collective.  Memory of vocabulary size: the gradient in the logits' dtype, or nothing with `inplace=True`.
Not here: sums over tokens, masks as multiplications, rewards. Whoever calls owns them, through the weights.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_hybrid.errors import ConfigError, ShapeError
from megatron_hybrid.ops import compiled, compiled_mixtures, eager, mixtures, triton_mixtures, triton_op
from megatron_hybrid.ops.call import read_call
from megatron_hybrid.ops.divergence import mixture_of
from megatron_hybrid.ops.function import Backend, HybridLossFunction, MixturePasses, Passes, Plan
from megatron_hybrid.parallel import Group
from megatron_hybrid.records import TokenStats, Weigh

BACKENDS: dict[str, tuple[Backend, MixturePasses]] = {
    "torch": (eager, mixtures),
    "compile": (compiled, compiled_mixtures),
    "triton": (triton_op, triton_mixtures),
}
"""Who computes the reverse KL, and who the other divergences."""


class HybridLoss(NamedTuple):
    """Per token, fp32, in the target's shape, equal on every tensor-parallel rank; 0 in rows that do not count."""

    loss: Tensor
    """Differentiable in the student logits."""
    kl: Tensor
    """KL(student || teacher), nats, detached; 0 without a teacher, +inf where it forbids what the student may say."""
    log_prob: Tensor
    """log p(target), nats, detached."""
    teacher_log_prob: Tensor
    """log q(target), nats, detached; 0 without a teacher."""
    entropy: Tensor
    """Of the student, nats, detached."""
    divergence: Tensor
    """What the dense part differentiates, nats, detached: the `kl` unless another divergence was asked for."""


def vocab_parallel_hybrid_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target: Tensor,
    *,
    imitation_weight: float | Tensor = 1.0,
    advantage: float | Tensor = 0.0,
    weigh: Weigh | None = None,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    vocab_size: int | None = None,
    group: Group = None,
    inplace: bool = False,
    ignore_index: int | None = -100,
    teacher_logit_floor: float | None = None,
    divergence: str = "reverse_kl",
    divergence_mix: float = 0.5,
    backend: str = "torch",
) -> HybridLoss:
    """imitation_weight * divergence(student, teacher) - advantage * log p(target) for every token, minimised.

    student_logits       [..., v/tp] any float type; rank r holds columns r*v/tp ... of the padded vocabulary
    teacher_logits       same shape, no gradient; None: no imitation term (its weight has no effect)
    target               [...] global token ids, the same on every rank
    imitation_weight     beta: number, or tensor that broadcasts to the target; a constant to autograd
    advantage            A, positive reinforces the target: as imitation_weight
    weigh                takes the tokens' stats (shape of the target) between the passes and gives both weights instead
    student_temperature  divides the logits: p is what was sampled from; the gradient is that of the undivided logits
    vocab_size           true vocabulary: columns at or beyond it are ignored whatever they hold, gradient exactly 0
    group                tensor-parallel process group; None: the logits are the whole vocabulary
    inplace              the gradient overwrites the student logits in backward, which then can run once only
    ignore_index         rows with this target are skipped: outputs 0, gradient exactly 0 whatever they hold. Finding
                         them waits for the device; None promises that every row counts, and nothing waits
    teacher_logit_floor  raw teacher logits below this are raised to it. Without it, a teacher's -inf where the student
                         has mass makes KL and loss +inf; an infinite KL has no gradient: its dense part is exactly 0
    divergence           reverse_kl  KL(p||q): the only one that adds up to that of whole responses, and so has a
                                     trajectory objective and a future cost; the others are one-step losses
                         forward_kl  KL(q||p); +inf, with no dense gradient, where the student forbids what q may say
                         jsd, skewed_kl, skewed_reverse_kl  to a mixture of both, always finite; see `divergence.py`
    divergence_mix       their mixture, in (0, 1): GKD's beta, DistiLLM's alpha. Nearer to either end than 0.05 the
                         gradient may lose digits, see `mixtures.py`. The two KLs have none, but the number is checked
    backend              "torch"; "compile", C++ built at first use for fp32 and bf16 on a CPU and torch.compile
                         elsewhere, several times as fast; or "triton", kernels for a GPU

    A target outside the vocabulary raises where the data is: at once on a CPU, at the next synchronisation on a GPU.
    The gradient is within 1e-5 of float64 (and its one rounding to the logits' type) from a KL of 1e-6 up, at unequal
    temperatures from 3e-3 up and 1e-7/sqrt(KL) or a few times that below: then z/T and w/T' are rounded apart.

    Raises:
        ConfigError: a setting out of its range; weights given twice; with `inplace`, a second backward.
        ShapeError: tensors that do not fit one another or lie on different devices; with `inplace`, rows that a view
            cannot have.
        RuntimeError: a target outside the vocabulary.
    """
    passes = passes_of(backend, divergence, divergence_mix)
    weights = weights_of(target, imitation_weight, advantage, weigh)
    call = read_call(
        student_logits,
        teacher_logits,
        target,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        vocab_size=vocab_size,
        group=group,
        ignore_index=ignore_index,
        teacher_logit_floor=teacher_logit_floor,
    )
    if inplace:
        check_inplace(student_logits)
    teacher = None if teacher_logits is None else teacher_logits.detach()
    plan = Plan(call, passes, weights, inplace)
    return HybridLoss(*HybridLossFunction.apply(student_logits, teacher, plan))


def passes_of(backend: str, divergence: str, divergence_mix: float) -> Passes:
    """The two passes over a shard.

    Raises:
        ConfigError: another backend, another divergence, a mix out of its range.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}.")
    of_reverse_kl, of_mixtures = BACKENDS[backend]
    mixture = mixture_of(divergence, divergence_mix)
    return Passes(of_reverse_kl, None if mixture is None else (mixture, of_mixtures))


def weights_of(
    target: Tensor, imitation_weight: float | Tensor, advantage: float | Tensor, weigh: Weigh | None
) -> Callable[[TokenStats], tuple[Tensor, Tensor]]:
    """What gives both weights once the stats are known: `weigh`, or the two that were passed instead."""
    if weigh is not None and not (_is_number(imitation_weight, 1.0) and _is_number(advantage, 0.0)):
        raise ConfigError(
            "got weigh and also imitation_weight or advantage: weigh gives both weights, so the others would be "
            "silently ignored. Pass one or the other."
        )

    def weights(stats: TokenStats) -> tuple[Tensor, Tensor]:
        imitation, credit = (imitation_weight, advantage) if weigh is None else weigh(stats)
        return as_weight("imitation_weight", imitation, target), as_weight("advantage", credit, target)

    return weights


def as_weight(name: str, value: float | Tensor, target: Tensor) -> Tensor:
    """A weight as fp32 in the target's shape, detached; made on the device, so that nothing waits for a copy."""
    if not isinstance(value, Tensor):
        return torch.full(target.shape, float(value), dtype=torch.float32, device=target.device)
    if value.device != target.device:
        raise ShapeError(f"{name} is on {value.device}, the logits on {target.device}: move it there.")
    try:
        return value.detach().float().expand(target.shape)
    except RuntimeError:
        raise ShapeError(
            f"{name} of shape {list(value.shape)} does not broadcast to the target's {list(target.shape)}: give one "
            "weight per token, or a number."
        ) from None


def _is_number(value: float | Tensor, default: float) -> bool:
    return not isinstance(value, Tensor) and value == default


def check_inplace(student_logits: Tensor) -> None:
    """Raises where the gradient could not be written over the logits."""
    try:
        student_logits.view(-1, student_logits.shape[-1])
    except RuntimeError:
        raise ShapeError(
            f"inplace=True needs student logits whose rows can be viewed as [rows, {student_logits.shape[-1]}]; "
            f"strides {student_logits.stride()} of {list(student_logits.shape)} need a copy. Make them contiguous."
        ) from None
