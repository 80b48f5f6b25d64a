"""The passes of every divergence but the reverse KL over one rank's shard, in plain torch: see `divergence.py`.

With u = log p - log q, m = o q + (1-o) p and the weights t, s of `divergence.py`:

    D        sum over v of  t q log(q/m) + s p log(p/m) + slope (p - q)
    dD/dz_v  ( p_v g_v - p_v E_p[g] ) / T,     p g = s p log(p/m) + slope (1-o) (p - q) p/m

    sums      D and E_p[g], two numbers per token; u needs both normalisers, so the shards are read a second time
    gradient  a (p g - p E_p[g]) + c (p - onehot(y))

Every term of D is non-negative and of second order in u, so what rounding leaves of the normalisers, a small constant
in u, enters D squared; and E_p[g] takes it out of the gradient, also where its true value is 0 (forward KL). Logs of
ratios are log1p of expm1: close p and q keep their digits. Blocks, buffers and precision as in `eager.py`.
"""

import math

import torch
from torch import Tensor

from megatron_hybrid.ops import eager
from megatron_hybrid.ops.call import Call
from megatron_hybrid.ops.divergence import Mixture

NUM_COLUMN_NUMBERS = 5
"""m_z, m_w, log(s_z/s_w), s_z, s_w of the whole vocabulary: what turns logits into p, q and u."""

_MOST_LOG_RATIO = 80.0
"""Beyond it log(o e^|u| + 1-o) is |u| plus a constant to the last bit, and e^|u| would soon overflow."""


def shard_sums(student: Tensor, teacher: Tensor, call: Call, mixture: Mixture, numbers: Tensor) -> Tensor:
    """This rank's parts of D and E_p[g], [n, 2] fp32. D is +inf where q has mass that m has not (forward KL only).

    numbers  [n, 5] fp32, as `NUM_COLUMN_NUMBERS` says
    """
    sums = torch.zeros((len(call.target), 2), dtype=torch.float32, device=student.device)
    forbidden = -eager.FAR / 2 * min(1.0, call.shard.student_scale)  # the stand-in of -inf is divided by T, too
    blocks = eager.row_blocks(len(call.target), call.shard.width, student)
    buffers = eager.block_buffers(3, blocks, call.shard.width, student)
    for start, stop in blocks:
        p, q, u = columns(buffers, student, teacher, call, start, stop, numbers)
        sums[start:stop, 1] = weighted_slope(p, q, u, mixture).sum(-1)
        u = torch.where(u <= forbidden, -torch.inf, u)
        terms = mixture.slope * _difference(p, q, u)
        for share, weight, from_m in (
            (p, mixture.student_term, log_of_mixture(u, mixture.teacher_share, mixture.student_share)),
            (q, mixture.teacher_term, log_of_mixture(-u, mixture.student_share, mixture.teacher_share)),
        ):
            if weight:
                terms -= torch.where(share == 0, 0.0, weight * share * from_m)
        sums[start:stop, 0] = terms.sum(-1)
    return sums


def shard_gradient(
    student: Tensor, teacher: Tensor, call: Call, mixture: Mixture, coefficients: Tensor, out: Tensor
) -> None:
    """Writes a (p g - p E_p[g]) + c (p - onehot(y)) of every row and column of the shard into `out`.

    coefficients  [n, 8] fp32: `NUM_COLUMN_NUMBERS`, E_p[g], a, c of each counted row
    out           as in `eager.shard_gradient`
    """
    blocks = eager.row_blocks(len(call.target), call.shard.width, student)
    buffers = eager.block_buffers(3, blocks, call.shard.width, student)
    for start, stop in blocks:
        numbers, (mean, a, c) = coefficients[:, :-3], coefficients[start:stop, -3:].split(1, dim=-1)
        p, q, u = columns(buffers, student, teacher, call, start, stop, numbers)
        gradient = weighted_slope(p, q, u, mixture).addcmul_(p, mean, value=-1).mul_(a).addcmul_(p, c)
        eager.write_block(gradient, c, call, start, stop, out)
    eager.clear_uncounted(call, out)


def columns(
    buffers: list[Tensor], student: Tensor, teacher: Tensor, call: Call, start: int, stop: int, numbers: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """p, q and u = log p - log q of the counted rows [start:stop], [r, width] each, in three buffers.

    u is finite: numbers of about +-1e20 stand for infinities, where p or q is exactly 0.
    """
    p, u, q = (buffer[: stop - start] for buffer in buffers)
    m_z, m_w, offset, s_z, s_w = numbers[start:stop].split(1, dim=-1)
    eager.centred_difference(p, u, q, student, teacher, call, start, m_z, m_w, offset)
    p.exp_().div_(s_z)
    eager.teacher_exponentials(q, teacher, call, start, m_w).div_(s_w)
    return p, q, u


def weighted_slope(p: Tensor, q: Tensor, u: Tensor, mixture: Mixture) -> Tensor:
    """p g with g = dD/dp up to a constant, a new tensor: 0 where p = q, finite where either is 0."""
    m_over_p = log_of_mixture(u, mixture.teacher_share, mixture.student_share)
    slope = p * m_over_p * -mixture.student_term
    if mixture.slope:
        slope += _difference(p, q, u).mul_(m_over_p.neg_().exp_()).mul_(mixture.slope * mixture.student_share)
    return slope


def log_of_mixture(u: Tensor, other_share: float, own_share: float) -> Tensor:
    """log(m/p) = log(o e^-u + 1-o) for u = log p - log q, o = other_share; with -u and the shares swapped, log(m/q)."""
    if other_share == 0:
        return torch.zeros_like(u)
    if own_share == 0:
        return -u
    logs = torch.clamp(-u, max=_MOST_LOG_RATIO).expm1_().mul_(other_share).log1p_()
    # Its smallest value is known exactly; a share that rounds to 1 in fp32 would give -inf.
    return logs.clamp_(min=math.log(own_share)).add_(torch.clamp(-u - _MOST_LOG_RATIO, min=0))


def _difference(p: Tensor, q: Tensor, u: Tensor) -> Tensor:
    """p - q to the last digits of u where they are close: the larger of the two times 1 - e^-|u|."""
    return torch.where(u < 0, q, -p).mul_(u.abs().neg_().expm1_())
