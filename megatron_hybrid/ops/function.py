"""What every backend shares: merging the shards, folding the weights into coefficients, autograd around both.

    forward    shard stats -> one all-gather of [n, 8] -> merge -> weigh -> loss = beta D - A log pi(y)
    backward   dloss/dz = g/T * ( beta p (d - k) + A (p - onehot(y)) ),  p = e/s_z,  k = E_p[d]
                        = e (a (d - k) + b) - c onehot(y),   a = g beta/(T s_z),  b = g A/(T s_z),  c = g A/T

g is the gradient of the loss that arrives, T the student's temperature, e and d as in `eager.py`; D is the reverse KL.
Another divergence (`divergence.py`) reads the shards once more and gathers [n, 2] between merge and weigh, and has a
gradient pass of its own. Forward: these one or two collectives, merged in rank order, so all ranks hold the same bits.
Backward: none. Saved: the inputs and a few numbers per token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_hybrid.collectives import gather_ranks, sum_over_ranks
from megatron_hybrid.errors import ConfigError
from megatron_hybrid.ops import large_pages
from megatron_hybrid.ops.call import Call, Shard, rows_of
from megatron_hybrid.ops.divergence import Mixture
from megatron_hybrid.records import TokenStats


class Backend(Protocol):
    """The two passes of `eager.py`; a backend is any object that has them."""

    @property
    def shard_stats(self) -> Callable[[Tensor, Tensor | None, Call], Tensor]: ...

    @property
    def shard_gradient(self) -> Callable[[Tensor, Tensor | None, Call, Tensor, Tensor], None]: ...


class MixturePasses(Protocol):
    """The two passes of `mixtures.py`: what a backend has besides, to compute other divergences than the reverse KL."""

    @property
    def shard_sums(self) -> Callable[[Tensor, Tensor, Call, Mixture, Tensor], Tensor]: ...

    @property
    def shard_gradient(self) -> Callable[[Tensor, Tensor, Call, Mixture, Tensor, Tensor], None]: ...


class Merged(NamedTuple):
    """Per-token numbers of the whole vocabulary, [n] fp32 each, equal on every rank."""

    m_z: Tensor
    """Largest student logit, raw."""
    s_z: Tensor
    """Sum of e."""
    m_w: Tensor
    """Largest teacher logit, raw."""
    mean_difference: Tensor
    """k = E_p[d]; the teacher's and the student's normalisers are not in it. +inf where the KL is."""
    stats: TokenStats
    s_w: Tensor
    """Sum of exp(w - m_w); 0 without a teacher."""


def merge_shards(gathered: Tensor, shard: Shard, *, has_teacher: bool) -> Merged:
    """The ranks' statistics [tp, n, 8] (order of `eager.NUM_STATS`) to those of the whole vocabulary."""
    m_z_r, s_z_r, m_w_r, s_w_r, a_r, b_r, z_y_r, w_y_r = gathered.unbind(-1)
    m_z, m_w = m_z_r.amax(0), m_w_r.amax(0)
    z_shift, w_shift = (m_z_r - m_z) * shard.student_scale, (m_w_r - m_w) * shard.teacher_scale
    z_factor = z_shift.exp()

    def rescaled(moment: Tensor, shift: Tensor) -> Tensor:
        # A rank whose mass underflows adds nothing, even where its own moment is infinite.
        return torch.where(z_factor == 0, 0.0, z_factor * (moment + shift * s_z_r)).sum(0)

    s_z, s_w = (z_factor * s_z_r).sum(0), (w_shift.exp() * s_w_r).sum(0)
    log_s_z = s_z.log()
    entropy = log_s_z - rescaled(b_r, z_shift) / s_z
    log_prob = (z_y_r.sum(0) - m_z) * shard.student_scale - log_s_z
    kl, teacher_log_prob, mean_difference = (torch.zeros_like(log_prob) for _ in range(3))
    if has_teacher:
        mean_difference = rescaled(a_r, z_shift - w_shift) / s_z
        # The log of the ratio, not the difference of the logs: a KL near 0 keeps its digits.
        kl = torch.where(mean_difference == torch.inf, torch.inf, mean_difference + (s_w / s_z).log())
        teacher_log_prob = (w_y_r.sum(0) - m_w) * shard.teacher_scale - s_w.log()
    return Merged(m_z, s_z, m_w, mean_difference, TokenStats(kl, log_prob, teacher_log_prob, entropy), s_w)


def merged_stats(backend: Backend, student: Tensor, teacher: Tensor | None, call: Call) -> Merged:
    """Stats pass, the one collective (none where no row counts: ranks share their targets), merge."""
    stats = backend.shard_stats(student, teacher, call)
    gathered = gather_ranks(stats, call.group) if len(call.target) else stats.unsqueeze(0)
    return merge_shards(gathered, call.shard, has_teacher=teacher is not None)


class MixtureNumbers(NamedTuple):
    """Per-token numbers of a divergence other than the reverse KL, [n] fp32 each, equal on every rank."""

    m_z: Tensor
    m_w: Tensor
    offset: Tensor
    """log(s_z/s_w): log p - log q = d - offset."""
    s_z: Tensor
    s_w: Tensor
    mean_slope: Tensor
    """E_p[g], g as in `mixtures.py`."""


def merged_mixture(
    passes: MixturePasses, mixture: Mixture, student: Tensor, teacher: Tensor, call: Call, merged: Merged
) -> tuple[Tensor, MixtureNumbers]:
    """(divergence [n], numbers of its gradient): the second read of the shards and the second collective."""
    numbers = (merged.m_z, merged.m_w, (merged.s_z / merged.s_w).log(), merged.s_z, merged.s_w)
    sums = passes.shard_sums(student, teacher, call, mixture, torch.stack(numbers, dim=-1))
    divergence, mean_slope = (sum_over_ranks(sums, call.group) if len(sums) else sums).unbind(-1)
    return divergence, MixtureNumbers(*numbers, mean_slope)


class Measured(NamedTuple):
    """What is known of n counted rows between the two passes, equal on every rank."""

    stats: TokenStats
    """[n] each."""
    divergence: Tensor
    """[n]: the KL, or what stands in its place."""
    numbers: tuple[Tensor, ...]
    """[n] each: what the gradient pass needs of the whole vocabulary."""


class TokenPasses(Protocol):
    """What the autograd functions ask of whoever reads the shards: `Passes`, or `topk_passes.TopKPasses`."""

    def measure(self, student: Tensor, teacher: Tensor | None, call: Call) -> Measured: ...

    def write_gradient(
        self,
        student: Tensor,
        teacher: Tensor | None,
        call: Call,
        numbers: Sequence[Tensor],
        dense: Tensor,
        sparse: Tensor,
        out: Tensor,
    ) -> None: ...

    def of_rows(self, rows: slice) -> "TokenPasses":
        """The same for some of the counted rows."""
        ...


@dataclass(frozen=True)
class Passes:
    """Who reads the shards of both logits, and for which divergence; one object for a whole call."""

    backend: Backend
    mixture: tuple[Mixture, MixturePasses] | None = None
    """A divergence other than the reverse KL, and who computes it."""

    def of_rows(self, rows: slice) -> "Passes":
        """These: nothing here belongs to a row."""
        return self

    def measure(self, student: Tensor, teacher: Tensor | None, call: Call) -> Measured:
        """Stats of the counted rows of both shards [rows, v/tp], with the collectives of the module's docstring."""
        merged = merged_stats(self.backend, student, teacher, call)
        if self.mixture is None or teacher is None:
            return Measured(merged.stats, merged.stats.kl, _gradient_numbers(merged))
        mixture, passes = self.mixture
        return Measured(merged.stats, *merged_mixture(passes, mixture, student, teacher, call, merged))

    def write_gradient(
        self,
        student: Tensor,
        teacher: Tensor | None,
        call: Call,
        numbers: Sequence[Tensor],
        dense: Tensor,
        sparse: Tensor,
        out: Tensor,
    ) -> None:
        """Fills out [rows, v/tp]: dense * dD/dz - sparse * dlog p(y)/dz, for logits z over their temperature.

        dense, sparse  [n] fp32: both weights times the gradient that arrives, over the temperature
        """
        if self.mixture is not None and teacher is not None:
            mixture, passes = self.mixture
            coefficients = torch.stack((*numbers, dense, sparse), dim=-1)
            passes.shard_gradient(student, teacher, call, mixture, coefficients, out)
        else:
            m_z, m_w, k, s_z = numbers
            coefficients = torch.stack((m_z, m_w, k, dense / s_z, sparse / s_z, sparse), dim=-1)
            self.backend.shard_gradient(student, teacher, call, coefficients, out)


def weighted(measured: Measured, imitation: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, weight of the dense gradient), [n] fp32 each."""
    divergence, log_prob = measured.divergence, measured.stats.log_prob
    # Selected, not multiplied: a weight of 0 drops a term even where it is infinite.
    loss = torch.where(imitation == 0, 0.0, imitation * divergence)
    loss = loss - torch.where(advantage == 0, 0.0, advantage * log_prob)
    return loss, torch.where(divergence == torch.inf, 0.0, imitation)  # an infinite divergence has no gradient


def begin_backward(ctx: Any, *, inplace: bool) -> tuple[Tensor, tuple[Any, ...]]:
    """Where the gradient goes, and what was saved: the student logits first.

    Raises:
        ConfigError: the gradient was written over the student logits before.
    """
    if ctx.spent:  # asked before the saved tensors are: autograd would only say that one was modified
        raise ConfigError(
            "backward through the hybrid loss ran a second time, but inplace=True let the first one write the "
            "gradient over the student logits. Use inplace=False to run backward twice under retain_graph."
        )
    ctx.spent = inplace
    saved = ctx.saved_tensors
    logits = saved[0]
    # detach shares the version counter, so another reader of overwritten logits gets autograd's error, not garbage.
    # Not empty_like: it would keep strides that no view flattens.
    return logits.detach() if inplace else large_pages.empty(logits.shape, logits.dtype, logits.device), saved


@dataclass(frozen=True)
class Plan:
    """What the autograd function needs besides the logits."""

    call: Call
    passes: TokenPasses
    weights: Callable[[TokenStats], tuple[Tensor, Tensor]]
    """Stats in the target's shape to (imitation_weight, advantage), fp32, in the target's shape."""
    inplace: bool


class HybridLossFunction(torch.autograd.Function):
    """The fields of `HybridLoss`, in the target's shape; only the loss has a gradient."""

    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, teacher_logits: Tensor | None, plan: Plan) -> tuple[Tensor, ...]:
        call = plan.call
        teacher = None if teacher_logits is None else rows_of(teacher_logits)
        student = rows_of(student_logits)
        measured = plan.passes.measure(student, teacher, call)
        stats = TokenStats(*(call.restored(value) for value in vars(measured.stats).values()))
        imitation, advantage = (call.counted(weight) for weight in plan.weights(stats))
        loss, dense = weighted(measured, imitation, advantage)
        ctx.plan = plan
        ctx.save_for_backward(student_logits, teacher_logits, dense, advantage, *measured.numbers)
        ctx.spent = False
        ctx.set_materialize_grads(False)
        outputs = (call.restored(loss), *vars(stats).values(), call.restored(measured.divergence))
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grad_loss is None:
            return None, None, None
        plan: Plan = ctx.plan
        out, (student_logits, teacher_logits, dense, sparse, *numbers) = begin_backward(ctx, inplace=plan.inplace)
        scale = plan.call.counted(grad_loss.float()) * plan.call.shard.student_scale
        teacher = None if teacher_logits is None else rows_of(teacher_logits)
        plan.passes.write_gradient(
            rows_of(student_logits), teacher, plan.call, numbers, scale * dense, scale * sparse, rows_of(out)
        )
        return out, None, None


def _gradient_numbers(merged: Merged) -> tuple[Tensor, ...]:
    """m_z, m_w, k, s_z of the reverse KL, [n] each; k is finite also where the KL is not: a weight of 0 drops it."""
    k = torch.where(merged.stats.kl == torch.inf, 0.0, merged.mean_difference)
    return merged.m_z, merged.m_w, k, merged.s_z
