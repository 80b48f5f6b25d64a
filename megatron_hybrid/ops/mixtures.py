"""The passes of every divergence but the reverse KL over one rank's shard, in plain torch: see `divergence.py`.

With u = log p - log q, m = o q + (1-o) p and the weights t, s of `divergence.py`:

    D        sum over v of  t q log(q/m) + s p log(p/m) + slope (p - q)
    dD/dz_v  ( p_v g_v - p_v E_p[g] ) / T,     p g = s p log(p/m) + slope (1-o) (p - q) p/m

    sums      D and E_p[g], two numbers per token; u needs both normalisers, so the shards are read a second time
    gradient  a (p g - p E_p[g]) + c (p - onehot(y))

Every term of D is non-negative and of second order in u, so what rounding leaves of the normalisers, a small constant
in u, enters D squared; and E_p[g] takes it out of the gradient, also where its true value is 0 (forward KL).

Everything is written in h = tanh(u/2) = (p - q)/(p + q): it has all the digits of a small u and never overflows, so
close p and q keep their digits and far ones stay finite. torch's expm1 and log1p would do the same 5 to 15 times slower
on a CPU. Blocks, buffers and precision as in `eager.py`.
"""

import torch
from torch import Tensor

from megatron_hybrid.ops import eager
from megatron_hybrid.ops.call import Call
from megatron_hybrid.ops.divergence import Mixture

NUM_COLUMN_NUMBERS = 5
"""m_z, m_w, log(s_z/s_w), s_z, s_w of the whole vocabulary: what turns logits into p, q and u."""

_LAST_BIT = 2.0**-24
"""The least that 1 + h can be without being 0: e^u is half of it there, and p too small for log(m/p) to matter."""
_SMALLEST = torch.finfo(torch.float32).tiny


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
        h = torch.tanh(u / 2)
        terms = (p + q).mul_(h).mul_(mixture.slope)
        if mixture.teacher_term:
            if mixture.teacher_share == 0:
                log_m_over_q = u.masked_fill_((u <= forbidden) & (q > 0), -torch.inf)
            else:
                log_m_over_q = log_of_mixture(-h, mixture.student_share, mixture.teacher_share)
            terms.addcmul_(q, log_m_over_q, value=-mixture.teacher_term)
        if mixture.student_term:
            log_m_over_p = log_of_mixture(h, mixture.teacher_share, mixture.student_share)
            terms.addcmul_(p, log_m_over_p, value=-mixture.student_term)
        sums[start:stop, 0] = terms.sum(-1)
        sums[start:stop, 1] = weighted_slope(p, q, h, mixture).sum(-1)
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
        gradient = weighted_slope(p, q, u.div_(2).tanh_(), mixture).addcmul_(p, mean, value=-1).mul_(a).addcmul_(p, c)
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


def weighted_slope(p: Tensor, q: Tensor, h: Tensor, mixture: Mixture) -> Tensor:
    """p g with g = dD/dp up to a constant, a new tensor: 0 where p = q, finite where either is 0. h = tanh(u/2)."""
    difference = (p + q).mul_(h)
    if mixture.teacher_share == 0:
        return difference  # m is p: p g stays finite where g does not
    m = (mixture.teacher_share * q).add_(p, alpha=mixture.student_share).clamp_(min=_SMALLEST)  # 0 where p and q are
    slope = difference.div_(m).mul_(mixture.slope * mixture.student_share)
    if mixture.student_term:
        log_m_over_p = log_of_mixture(h, mixture.teacher_share, mixture.student_share)
        slope.sub_(log_m_over_p, alpha=mixture.student_term)
    return slope.mul_(p)


def log_of_mixture(h: Tensor, other_share: float, own_share: float) -> Tensor:
    """log(m/p) = log(1 + o (e^-u - 1)), o = other_share, h = tanh(u/2); with -h and the shares swapped, log(m/q)."""
    x = h * (-2 * other_share) / (1 + h).clamp_(min=_LAST_BIT)
    y = (1 + x).clamp_(min=own_share)  # not 0 where the other share rounds to 1
    return y.log().add_((x - (y - 1)).div_(y))  # the log of the rounded sum, and what the rounding left
