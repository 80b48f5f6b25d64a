"""The two passes over one rank's shard in plain torch, on any device: the definition that other backends answer to.

z, w are student and teacher logits over their temperatures, e = exp(z - m_z), d = (z - m_z) - (w - m_w):

    stats     m_z, s_z = sum e, m_w, s_w = sum exp(w - m_w), A = sum e d, B = sum e (z - m_z), z_y, w_y      8 per token
    gradient  e * (a (d - k) + b) - c onehot(y)      with the whole vocabulary's m_z, m_w; k, a, b, c from `function.py`

Each pass reads a shard once, in blocks of rows that stay in cache, with four and three fp32 buffers of one block's
size; where rows are skipped, up to three copies of the counted ones besides, in the logits' type.
Statistics are fp32 whatever the logits are; the gradient is rounded once, into the logits' dtype. No collective.

Subtracting before dividing by the temperature is exact near the maximum, so an offset of the logits costs no digits; k
is subtracted from d before anything else, because where p is nearly 1 they are nearly equal and large. -inf needs no
special case in the stats: 0 * inf is NaN and `nansum` skips it, while a true NaN stays visible in the maxima.
"""

import torch
from torch import Tensor

from megatron_hybrid.ops.call import Call, Shard

NUM_STATS = 8
"""m_z, s_z, m_w, s_w, A, B, z_y, w_y; maxima and target logits in raw units, before the temperature."""

_BLOCK_ELEMENTS = {"cpu": 1 << 18}
"""Elements of a block by kind of device. CPU: 1 MB per buffer, so that all stay in the last-level cache; measured
flat from 2**17 to 2**20, with Python's overhead showing below and memory traffic above."""
_BLOCK_ELEMENTS_ELSEWHERE = 1 << 24
"""64 MB per buffer: an accelerator wants few, large launches."""

LOWEST = torch.finfo(torch.float32).min
"""Where a maximum starts: from -inf, the all -inf rows would make NaN; from 0, very negative logits would underflow."""
FAR = 1e20
"""Stands for infinity in the gradient pass, where a probability of 0 (or a weight of 0) multiplies it: finite, so that
the product is 0; far below fp32's 3e38, so that a loss scale of 2**32 cannot lift it there."""
STEPS = 1024
"""Steps per unit of logit, see `_difference`: coarser than the last bit of logits up to 2**13, so a shift is exact; the
rest of up to 1/2048 costs no digits of differences of that size or more."""
MOST_SHIFT = 2.0**20
"""Beyond it fp32 has no digits below the steps, and a shard that is all -inf has its maximum at -3e38."""


def shard_stats(student: Tensor, teacher: Tensor | None, call: Call) -> Tensor:
    """This rank's statistics of the counted rows, [n, 8] fp32 in the order of `NUM_STATS`; a missing teacher leaves 0.

    student, teacher  [rows, v/tp], any float type; read, never written
    """
    shard, n = call.shard, len(call.target)
    stats = torch.zeros((n, NUM_STATS), dtype=torch.float32, device=student.device)
    stats[:, 0:3:2] = LOWEST
    blocks = row_blocks(n, shard.width, student)
    z_buffer, w_buffer, d_buffer, e_buffer = block_buffers(4, blocks, shard.width, student)
    for start, stop in blocks:
        z, w, d, e = (buffer[: stop - start] for buffer in (z_buffer, w_buffer, d_buffer, e_buffer))
        column, here = (index.unsqueeze(1) for index in call.owned(start, stop))
        student_raw = _raw(z, _block(student, call, start, stop))
        m_z, z_y = _maximum(student_raw), torch.where(here, student_raw.gather(1, column), 0.0)
        m_w = w_y = torch.zeros_like(m_z)
        s_w = a = torch.zeros_like(m_z)
        if teacher is not None:
            teacher_raw = _raw(w, _block(teacher, call, start, stop), shard.teacher_floor)
            m_w, w_y = _maximum(teacher_raw), torch.where(here, teacher_raw.gather(1, column), 0.0)
            rest = _difference(d, e, student_raw, teacher_raw, m_z, m_w, shard)
            s_w = _scaled(torch.sub(teacher_raw, m_w, out=w), shard.teacher_scale).exp_().sum(-1, keepdim=True)
        _scaled(torch.sub(student_raw, m_z, out=z), shard.student_scale)
        s_z = torch.exp(z, out=e).sum(-1, keepdim=True)
        if teacher is not None:
            a = d.mul_(e).nansum(-1, keepdim=True) - rest * s_z
        b = z.mul_(e).nansum(-1, keepdim=True)
        stats[start:stop] = torch.cat((m_z, s_z, m_w, s_w, a, b, z_y, w_y), dim=-1)
    return stats


def shard_gradient(student: Tensor, teacher: Tensor | None, call: Call, coefficients: Tensor, out: Tensor) -> None:
    """Writes the gradient e * (a (d - k) + b) - c onehot(y) of every row and column of the shard into `out`.

    coefficients  [n, 6] fp32: m_z, m_w, k, a, b, c of each counted row
    out           [rows, v/tp] in the student's dtype; may be the student logits themselves. Rows that do not count and
                  columns beyond the vocabulary become exactly 0.
    """
    shard, n = call.shard, len(call.target)
    blocks = row_blocks(n, shard.width, student)
    z_buffer, d_buffer, spare_buffer = block_buffers(3, blocks, shard.width, student)
    for start, stop in blocks:
        z, d, spare = (buffer[: stop - start] for buffer in (z_buffer, d_buffer, spare_buffer))
        m_z, m_w, k, a, b, c = coefficients[start:stop].split(1, dim=-1)
        centred_difference(z, d, spare, student, teacher, call, start, m_z, m_w, k)
        gradient = d.mul_(a).add_(b).mul_(z.exp_())
        write_block(gradient, c, call, start, stop, out)
    clear_uncounted(call, out)


def write_block(gradient: Tensor, c: Tensor, call: Call, start: int, stop: int, out: Tensor) -> None:
    """gradient [r, width] minus c [r, 1] at the target, rounded once into counted rows [start:stop] of `out`."""
    column, here = (index.unsqueeze(1) for index in call.owned(start, stop))
    gradient.scatter_add_(1, column, torch.where(here, -c, 0.0))
    if call.rows is None:
        out[start:stop, : call.shard.width] = gradient
    else:
        out[:, : call.shard.width].index_copy_(0, call.rows[start:stop], gradient.to(out.dtype))


def clear_uncounted(call: Call, out: Tensor) -> None:
    """Exactly 0 in the rows of `out` that do not count and in the columns beyond the vocabulary, whatever they held."""
    out[:, call.shard.width :] = 0
    if call.rows is not None:
        dropped = torch.ones(len(out), dtype=torch.bool, device=out.device).index_fill_(0, call.rows, False)
        out.masked_fill_(dropped.unsqueeze(1), 0)  # not multiplied: NaN * 0 is NaN


def centred_difference(
    z: Tensor,
    d: Tensor,
    spare: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    call: Call,
    start: int,
    m_z: Tensor,
    m_w: Tensor,
    k: Tensor,
) -> None:
    """Fills z [r, width] with (z - m_z) and d with (z - m_z) - (w - m_w) - k, for the counted rows from `start`.

    d is finite: infinities become +-1e20, which a probability or a weight of exactly 0 multiplies later. Without a
    teacher d is 0.
    """
    shard, stop = call.shard, start + len(z)
    student_raw = _raw(z, _block(student, call, start, stop))
    if teacher is None:
        d.zero_()
    else:
        teacher_raw = _raw(d, _block(teacher, call, start, stop), shard.teacher_floor)
        rest = _difference(d, spare, student_raw, teacher_raw, m_z, m_w, shard, lowest=-FAR)
        d.clamp_(min=-FAR, max=FAR).sub_(rest + k)
    _scaled(torch.sub(student_raw, m_z, out=z), shard.student_scale)


def teacher_exponentials(out: Tensor, teacher: Tensor, call: Call, start: int, m_w: Tensor) -> Tensor:
    """Fills out [r, width] with exp(w - m_w) of the counted rows from `start`."""
    raw = _raw(out, _block(teacher, call, start, start + len(out)), call.shard.teacher_floor)
    return _scaled(torch.sub(raw, m_w, out=out), call.shard.teacher_scale).exp_()


def _difference(
    d: Tensor,
    spare: Tensor,
    student_raw: Tensor,
    teacher_raw: Tensor,
    m_z: Tensor,
    m_w: Tensor,
    shard: Shard,
    lowest: float | None = None,
) -> Tensor:
    """Fills d with (z - m_z) - (w - m_w) + rest and returns rest [r, 1], a small constant of each row.

    Close logits z and w subtract without any error, but not after each was rounded to its distance from the maximum:
    at a KL of 1e-6 that rounding is 1e-4 of d. So no more is taken off than brings the two maxima together, in steps
    coarse enough to be exact, and off the one that is farther from 0; what the steps leave is the rest.

    At unequal temperatures there is no such step: z/T and w/T' are rounded each, so d has an error of about 1e-7 times
    their distance from the maximum, however small d is. That is 1e-7/sqrt(KL) of the gradient, up to five times as much
    for logits spread by 3: 1e-5 holds from a KL of 3e-3 up, and at 1e-6 it is 1e-4 to 6e-4.

    lowest  raises the student's side (-inf), so that two -inf do not make a NaN
    """
    ratio = shard.teacher_scale / shard.student_scale
    c_z, c_w = m_z, m_w
    if ratio == 1:
        step = (m_z - m_w).clamp(-MOST_SHIFT, MOST_SHIFT).mul_(STEPS).round_().div_(STEPS)
        student_is_farther = m_z.abs() >= m_w.abs()
        c_z, c_w = torch.where(student_is_farther, step, 0.0), torch.where(student_is_farther, 0.0, -step)
    _scaled(torch.sub(teacher_raw, c_w, out=d), ratio)
    torch.sub(student_raw, c_z, out=spare)
    if lowest is not None:
        spare.clamp_(min=lowest)
    _scaled(torch.sub(spare, d, out=d), shard.student_scale)
    # A shard that the teacher forbids whole has the lowest maximum there is: scaled, it must not become infinite.
    return (((m_z - c_z) - (m_w - c_w) * ratio) * shard.student_scale).clamp_(-FAR, FAR)


def row_blocks(n: int, width: int, like: Tensor) -> list[tuple[int, int]]:
    """[start, stop) of each block of rows; none where the shard holds only padding."""
    if width == 0:
        return []
    rows = max(1, _BLOCK_ELEMENTS.get(like.device.type, _BLOCK_ELEMENTS_ELSEWHERE) // width)
    return [(start, min(start + rows, n)) for start in range(0, n, rows)]


def block_buffers(count: int, blocks: list[tuple[int, int]], width: int, like: Tensor) -> list[Tensor]:
    """`count` fp32 buffers [rows of the largest block, width], reused by all blocks."""
    rows = max((stop - start for start, stop in blocks), default=0)
    return [torch.empty((rows, width), dtype=torch.float32, device=like.device) for _ in range(count)]


def _block(logits: Tensor, call: Call, start: int, stop: int) -> Tensor:
    """Counted rows [start:stop] of the shard's true columns [r, width]: a view where all rows count."""
    columns = logits[:, : call.shard.width]
    return columns[start:stop] if call.rows is None else columns.index_select(0, call.rows[start:stop])


def _raw(out: Tensor, block: Tensor, floor: float | None = None) -> Tensor:
    """The block in fp32, raised to the floor: itself where nothing is to be done, else in `out`."""
    raw = block if block.dtype == torch.float32 else out.copy_(block)
    return raw if floor is None else torch.clamp(raw, min=floor, out=out)


def _maximum(raw: Tensor) -> Tensor:
    """Row maxima [r, 1], finite even where all is -inf."""
    return raw.amax(-1, keepdim=True).clamp_(min=LOWEST)


def _scaled(values: Tensor, scale: float) -> Tensor:
    """values * scale, in place."""
    return values if scale == 1 else values.mul_(scale)
