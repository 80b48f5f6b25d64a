"""How strongly imitation and reward pull on each token: squared norms of the two halves of the logit gradient.

    dense_sq   | beta p (g - E_p[g]) / T |^2        sparse_sq   | A (p - onehot(y)) / T |^2

g is the log-ratio for the reverse KL, dD/dp for another divergence D. On request only, outside the op: two reads of
each shard and two collectives ([n, 8] and [n, 3] gathered), one more of each for another divergence; no gradient.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_hybrid.collectives import sum_over_ranks
from megatron_hybrid.ops import eager, mixtures
from megatron_hybrid.ops.api import as_weight
from megatron_hybrid.ops.call import Call, read_call, rows_of
from megatron_hybrid.ops.divergence import Mixture, mixture_of
from megatron_hybrid.ops.function import Merged, MixtureNumbers, merged_mixture, merged_stats
from megatron_hybrid.parallel import Group

DensePart = Callable[[list[Tensor], int, int], tuple[Tensor, Tensor]]
"""(buffers, start, stop) to p and p (g - E_p[g]) of the counted rows [start:stop], [r, width] each."""


_NUM_BUFFERS = 6
"""What any divergence takes (`mixtures.num_buffers`)."""


@torch.no_grad()
def logit_gradient_norms(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target: Tensor,
    imitation_weight: float | Tensor,
    advantage: float | Tensor,
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    vocab_size: int | None = None,
    group: Group = None,
    ignore_index: int | None = -100,
    teacher_logit_floor: float | None = None,
    divergence: str = "reverse_kl",
    divergence_mix: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """(dense_sq, sparse_sq), each [...] fp32 in the target's shape; arguments as `vocab_parallel_hybrid_loss`.

    Norms of the whole vocabulary's gradient, equal on every rank; 0 in rows that do not count, and dense_sq also where
    the divergence is infinite.
    """
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
    imitation, credit = (
        call.counted(as_weight(name, weight, target)) * call.shard.student_scale
        for name, weight in (("imitation_weight", imitation_weight), ("advantage", advantage))
    )
    student, teacher = rows_of(student_logits), None if teacher_logits is None else rows_of(teacher_logits)
    merged = merged_stats(eager, student, teacher, call)
    dense_part, infinite = _reverse_kl_part(student, teacher, call, merged), merged.stats.kl == torch.inf
    if (mixture := mixture_of(divergence, divergence_mix)) is not None and teacher is not None:
        value, numbers = merged_mixture(mixtures, mixture, student, teacher, call, merged)
        dense_part, infinite = _mixture_part(student, teacher, call, mixture, numbers), value == torch.inf
    squares = _shard_squares(student, call, dense_part)
    dense, others_sq, others = (sum_over_ranks(squares, call.group) if len(squares) else squares).unbind(-1)
    dense = torch.where(infinite, 0.0, imitation.square() * dense)
    # 1 - p(y) is what the others have: where p(y) is nearly 1 the norm is small, and a difference would round it away.
    sparse = credit.square() * (others_sq + others.square())
    return call.restored(dense), call.restored(sparse)


def _reverse_kl_part(student: Tensor, teacher: Tensor | None, call: Call, merged: Merged) -> DensePart:
    per_row = torch.stack((merged.m_z, merged.m_w, merged.mean_difference, merged.s_z), dim=-1)

    def of_rows(buffers: list[Tensor], start: int, stop: int) -> tuple[Tensor, Tensor]:
        p, d, spare = (buffer[: stop - start] for buffer in buffers[:3])
        m_z, m_w, k, s_z = per_row[start:stop].split(1, dim=-1)
        eager.centred_difference(p, d, spare, student, teacher, call, start, m_z, m_w, k)
        p.exp_().div_(s_z)
        return p, d.mul_(p)

    return of_rows


def _mixture_part(student: Tensor, teacher: Tensor, call: Call, mixture: Mixture, numbers: MixtureNumbers) -> DensePart:
    per_row = torch.stack(numbers, dim=-1)

    def of_rows(buffers: list[Tensor], start: int, stop: int) -> tuple[Tensor, Tensor]:
        rows = [buffer[: stop - start] for buffer in buffers]
        p, slope = mixtures.slopes(rows, student, teacher, call, start, mixture, per_row[:, :-1])
        return p, slope.addcmul_(p, per_row[start:stop, -1:], value=-1)

    return of_rows


def _shard_squares(student: Tensor, call: Call, dense_part: DensePart) -> Tensor:
    """This rank's part of sum_v (p (g - E_p[g]))^2, sum_{v != y} p^2 and sum_{v != y} p, [n, 3] fp32."""
    width = call.shard.width
    squares = student.new_zeros((len(call.target), 3), dtype=torch.float32)
    blocks = eager.row_blocks(len(call.target), width, student)
    buffers = eager.block_buffers(_NUM_BUFFERS, blocks, width, student)
    for start, stop in blocks:
        p, dense = dense_part(buffers, start, stop)
        squares[start:stop, 0] = dense.square_().sum(-1)
        column, here = (index.unsqueeze(1) for index in call.owned(start, stop))
        p.scatter_(1, column, torch.where(here, 0.0, p.gather(1, column)))
        squares[start:stop, 2] = p.sum(-1)
        squares[start:stop, 1] = p.square_().sum(-1)
    return squares
