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
on a CPU. Blocks and precision as in `eager.py`; fp32 buffers of one block: seven and six in the two passes, for the
forward KL five (and its booleans, nearly one) and four.

The gradient is within 1e-5 of float64 for a `divergence_mix` in [0.05, 0.95]; measured beyond:
    skewed_reverse_kl   1e-7/o, also where p and q are close (1e-4 at a mix of 0.999): its two terms are of order o
                        each, their sum of order o^2
    jsd, the same       where p and q are far apart (u spread by 5) 2e-5 and 4e-5 at a mix of 1e-3, 7e-5 and 6e-3 at
                        1e-6; jsd 3e-5 at 0.999, 2e-4 at 0.9999
    skewed_kl           no loss
"""

import torch
from torch import Tensor

from megatron_hybrid.ops import eager
from megatron_hybrid.ops.call import Call, Shard
from megatron_hybrid.ops.divergence import Mixture

NUM_COLUMN_NUMBERS = 5
"""m_z, m_w, log(s_z/s_w), s_z, s_w of the whole vocabulary: what turns logits into p, q and u."""

_LAST_BIT = 2.0**-24
"""The least that 1 + h can be without being 0: e^u is half of it there, and p too small for log(m/p) to matter."""
SMALLEST = torch.finfo(torch.float32).tiny


def shard_sums(student: Tensor, teacher: Tensor, call: Call, mixture: Mixture, numbers: Tensor) -> Tensor:
    """This rank's parts of D and E_p[g], [n, 2] fp32. D is +inf where q has mass that m has not (forward KL only).

    numbers  [n, 5] fp32, as `NUM_COLUMN_NUMBERS` says
    """
    sums = torch.zeros((len(call.target), 2), dtype=torch.float32, device=student.device)
    blocks = eager.row_blocks(len(call.target), call.shard.width, student)
    buffers = eager.block_buffers(num_buffers(mixture) + 1, blocks, call.shard.width, student)
    for start, stop in blocks:
        h, *of_columns, terms = (buffer[: stop - start] for buffer in buffers)
        p, q, u = columns(of_columns, student, teacher, call, start, stop, numbers)
        spare = [*of_columns[3:], u]  # u is free once h is known, but for the forward KL, which needs no spare
        torch.div(u, 2, out=h).tanh_()
        torch.add(p, q, out=terms).mul_(h).mul_(mixture.slope)
        if mixture.teacher_term:
            if mixture.teacher_share == 0:
                log_m_over_q = u.masked_fill_((u <= forbidden(call.shard)) & (q > 0), -torch.inf)
            else:
                log_m_over_q = log_of_mixture(h.neg_(), mixture.student_share, mixture.teacher_share, spare)
                h.neg_()
            terms.addcmul_(q, log_m_over_q, value=-mixture.teacher_term)
        if mixture.student_term:
            log_m_over_p = log_of_mixture(h, mixture.teacher_share, mixture.student_share, spare)
            terms.addcmul_(p, log_m_over_p, value=-mixture.student_term)
        sums[start:stop, 0] = terms.sum(-1)
        sums[start:stop, 1] = weighted_slope(p, q, h, mixture, [terms, *spare]).sum(-1)
    return sums


def shard_gradient(
    student: Tensor, teacher: Tensor, call: Call, mixture: Mixture, coefficients: Tensor, out: Tensor
) -> None:
    """Writes a (p g - p E_p[g]) + c (p - onehot(y)) of every row and column of the shard into `out`.

    coefficients  [n, 8] fp32: `NUM_COLUMN_NUMBERS`, E_p[g], a, c of each counted row
    out           as in `eager.shard_gradient`
    """
    blocks = eager.row_blocks(len(call.target), call.shard.width, student)
    buffers = eager.block_buffers(num_buffers(mixture), blocks, call.shard.width, student)
    for start, stop in blocks:
        numbers, (mean, a, c) = coefficients[:, :-3], coefficients[start:stop, -3:].split(1, dim=-1)
        p, slope = slopes(
            [buffer[: stop - start] for buffer in buffers], student, teacher, call, start, mixture, numbers
        )
        eager.write_block(slope.addcmul_(p, mean, value=-1).mul_(a).addcmul_(p, c), c, call, start, stop, out)
    eager.clear_uncounted(call, out)


def forbidden(shard: Shard) -> float:
    """u at or below this is that of a student's -inf, whose stand-in is divided by T like any logit."""
    return -eager.FAR / 2 * min(1.0, shard.student_scale)


def num_buffers(mixture: Mixture) -> int:
    """Buffers of a block that `slopes` takes."""
    return 4 if mixture.teacher_share == 0 else 6


def slopes(
    buffers: list[Tensor], student: Tensor, teacher: Tensor, call: Call, start: int, mixture: Mixture, numbers: Tensor
) -> tuple[Tensor, Tensor]:
    """p and p g of the counted rows from `start`, [r, width] each, in two of the `num_buffers`, [r, width] too."""
    p, q, u = columns(buffers, student, teacher, call, start, start + len(buffers[0]), numbers)
    return p, weighted_slope(p, q, u.div_(2).tanh_(), mixture, buffers[3:])


def columns(
    buffers: list[Tensor], student: Tensor, teacher: Tensor, call: Call, start: int, stop: int, numbers: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """p, q and u = log p - log q of the counted rows [start:stop], [r, width] each, in the first three buffers.

    u is finite: numbers of about +-1e20 stand for infinities, where p or q is exactly 0.
    """
    p, u, q = buffers[:3]
    m_z, m_w, offset, s_z, s_w = numbers[start:stop].split(1, dim=-1)
    eager.centred_difference(p, u, q, student, teacher, call, start, m_z, m_w, offset)
    p.exp_().div_(s_z)
    eager.teacher_exponentials(q, teacher, call, start, m_w).div_(s_w)
    return p, q, u


def weighted_slope(p: Tensor, q: Tensor, h: Tensor, mixture: Mixture, spare: list[Tensor]) -> Tensor:
    """p g with g = dD/dp up to a constant: 0 where p = q, finite where either is 0. h = tanh(u/2), [r, width] as all.

    spare    overwritten, as q is; the first holds the result. Three, or one where m is p
    """
    difference = torch.add(p, q, out=spare[0]).mul_(h)
    if mixture.teacher_share == 0:
        return difference  # m is p: p g stays finite where g does not
    m = q.mul_(mixture.teacher_share).add_(p, alpha=mixture.student_share).clamp_(min=SMALLEST)  # 0 where p and q are
    slope = difference.div_(m).mul_(mixture.slope * mixture.student_share)
    if mixture.student_term:
        log_m_over_p = log_of_mixture(h, mixture.teacher_share, mixture.student_share, [*spare[1:3], q])
        slope.sub_(log_m_over_p, alpha=mixture.student_term)
    return slope.mul_(p)


def log_of_mixture(h: Tensor, other_share: float, own_share: float, spare: list[Tensor]) -> Tensor:
    """log(m/p) = log(1 + o (e^-u - 1)), o = other_share, h = tanh(u/2); with -h and the shares swapped, log(m/q).

    spare  three [r, width], overwritten; the first holds the result
    """
    y, x, rounded = spare
    torch.mul(h, -2 * other_share, out=x).div_(torch.add(h, 1, out=y).clamp_(min=_LAST_BIT))
    torch.add(x, 1, out=y).clamp_(min=own_share)  # not 0 where the other share rounds to 1
    x.sub_(torch.sub(y, 1, out=rounded)).div_(y)
    return y.log_().add_(x)  # the log of the rounded sum, and what the rounding left
