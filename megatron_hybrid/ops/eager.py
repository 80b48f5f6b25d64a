"""The two passes over one rank's shard in plain torch, on any device: the definition that other backends answer to.

z, w are student and teacher logits over their temperatures, e = exp(z - m_z), d = (z - m_z) - (w - m_w):

    stats     m_z, s_z = sum e, m_w, s_w = sum exp(w - m_w), A = sum e d, B = sum e (z - m_z), z_y, w_y      8 per token
    gradient  e * (a (d - k) + b) - c onehot(y)      with the whole vocabulary's m_z, m_w; k, a, b, c from `function.py`

Each pass reads a shard once, in blocks of rows that stay in cache, with two or three fp32 buffers of one block's size.
Statistics are fp32 whatever the logits are; the gradient is rounded once, into the logits' dtype. No collective.

Subtracting the maximum before the temperature is exact near the maximum, so an offset of the logits costs no digits;
k is subtracted from d before anything else, because where p is nearly 1 they are nearly equal and large. -inf needs no
special case in the stats: 0 * inf is NaN and `nansum` skips it, while a true NaN stays visible in s_z and s_w.
"""

import torch
from torch import Tensor

from megatron_hybrid.ops.call import Call

NUM_STATS = 8
"""m_z, s_z, m_w, s_w, A, B, z_y, w_y; maxima and target logits in raw units, before the temperature."""

_BLOCK_ELEMENTS = {"cpu": 1 << 19}
"""Elements of a block by kind of device. CPU: 2 MB per buffer, so that three stay in the last-level cache; measured
flat from 2**18 to 2**20, with Python's overhead showing below and memory traffic above."""
_BLOCK_ELEMENTS_ELSEWHERE = 1 << 24
"""64 MB per buffer: an accelerator wants few, large launches."""

_LOWEST = torch.finfo(torch.float32).min
"""Where a maximum starts: from -inf, the all -inf rows would make NaN; from 0, very negative logits would underflow."""
_FAR = 1e20
"""Stands for infinity in the gradient pass, where a probability of 0 (or a weight of 0) multiplies it: finite, so that
the product is 0; far below fp32's 3e38, so that a loss scale of 2**32 cannot lift it there."""


def shard_stats(student: Tensor, teacher: Tensor | None, call: Call) -> Tensor:
    """This rank's statistics of the counted rows, [n, 8] fp32 in the order of `NUM_STATS`; a missing teacher leaves 0.

    student, teacher  [rows, v/tp], any float type; read, never written
    """
    shard, n = call.shard, len(call.target)
    stats = torch.zeros((n, NUM_STATS), dtype=torch.float32, device=student.device)
    stats[:, 0:3:2] = _LOWEST
    blocks = row_blocks(n, shard.width, student)
    z_buffer, w_buffer, e_buffer = block_buffers(3, blocks, shard.width, student)
    for start, stop in blocks:
        z, w, e = (buffer[: stop - start] for buffer in (z_buffer, w_buffer, e_buffer))
        column, here = (index.unsqueeze(1) for index in call.owned(start, stop))
        m_z, z_y = _centre(z, _block(student, call, start, stop), column, shard.student_scale)
        m_w = w_y = torch.zeros_like(m_z)
        s_w = a = m_z.new_zeros(stop - start)
        if teacher is not None:
            m_w, w_y = _centre(w, _block(teacher, call, start, stop), column, shard.teacher_scale, shard.teacher_floor)
            s_w = torch.exp(w, out=e).sum(-1)
            torch.sub(z, w, out=w)
        s_z = torch.exp(z, out=e).sum(-1)
        if teacher is not None:
            a = w.mul_(e).nansum(-1)
        b = z.mul_(e).nansum(-1)
        z_y, w_y = (torch.where(here, value, 0.0).squeeze(1) for value in (z_y, w_y))
        stats[start:stop] = torch.stack((m_z.squeeze(1), s_z, m_w.squeeze(1), s_w, a, b, z_y, w_y), dim=-1)
    return stats


def shard_gradient(student: Tensor, teacher: Tensor | None, call: Call, coefficients: Tensor, out: Tensor) -> None:
    """Writes the gradient e * (a (d - k) + b) - c onehot(y) of every row and column of the shard into `out`.

    coefficients  [n, 6] fp32: m_z, m_w, k, a, b, c of each counted row
    out           [rows, v/tp] in the student's dtype; may be the student logits themselves. Rows that do not count and
                  columns beyond the vocabulary become exactly 0.
    """
    shard, n = call.shard, len(call.target)
    out[:, shard.width :] = 0
    blocks = row_blocks(n, shard.width, student)
    z_buffer, d_buffer = block_buffers(2, blocks, shard.width, student)
    for start, stop in blocks:
        z, d = z_buffer[: stop - start], d_buffer[: stop - start]
        m_z, m_w, k, a, b, c = coefficients[start:stop].split(1, dim=-1)
        centred_difference(z, d, student, teacher, call, start, m_z, m_w)
        gradient = d.sub_(k).mul_(a).add_(b).mul_(z.exp_())
        column, here = (index.unsqueeze(1) for index in call.owned(start, stop))
        gradient.scatter_add_(1, column, torch.where(here, -c, 0.0))
        if call.rows is None:
            out[start:stop, : shard.width] = gradient
        else:
            out[:, : shard.width].index_copy_(0, call.rows[start:stop], gradient.to(out.dtype))
    if call.rows is not None:
        dropped = torch.ones(len(out), dtype=torch.bool, device=out.device).index_fill_(0, call.rows, False)
        out.masked_fill_(dropped.unsqueeze(1), 0)  # not multiplied: NaN * 0 is NaN


def centred_difference(
    z: Tensor, d: Tensor, student: Tensor, teacher: Tensor | None, call: Call, start: int, m_z: Tensor, m_w: Tensor
) -> None:
    """Fills z [r, width] with (z - m_z) and d with (z - m_z) - (w - m_w), both finite; counted rows from `start`.

    Without a teacher d is 0. Infinities become +-1e20, which a probability or a weight of exactly 0 multiplies later.
    """
    shard, stop = call.shard, start + len(z)
    _subtract(z, _block(student, call, start, stop), m_z, shard.student_scale)
    z.clamp_(min=-_FAR)
    if teacher is None:
        d.zero_()
        return
    _subtract(d, _block(teacher, call, start, stop), m_w, shard.teacher_scale, shard.teacher_floor)
    torch.sub(z, d, out=d).clamp_(min=-_FAR, max=_FAR)


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


def _centre(
    out: Tensor, block: Tensor, column: Tensor, scale: float, floor: float | None = None
) -> tuple[Tensor, Tensor]:
    """Fills out [r, width] with (block - its row maximum) * scale; returns it and the value at `column` [r, 1]."""
    raw = _raw(out, block, floor)
    at_column = raw.gather(1, column)
    maximum = raw.amax(-1, keepdim=True).clamp_(min=_LOWEST)
    _subtract(out, raw, maximum, scale)
    return maximum, at_column


def _subtract(out: Tensor, block: Tensor, maximum: Tensor, scale: float, floor: float | None = None) -> None:
    """Fills out [r, width] with (block - maximum) * scale in fp32."""
    torch.sub(_raw(out, block, floor), maximum, out=out)
    if scale != 1:
        out.mul_(scale)


def _raw(out: Tensor, block: Tensor, floor: float | None) -> Tensor:
    """The block in fp32, raised to the floor: itself where nothing is to be done, else in `out`."""
    raw = block if block.dtype == torch.float32 else out.copy_(block)
    return raw if floor is None else torch.clamp(raw, min=floor, out=out)
