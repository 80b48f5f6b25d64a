"""The two passes over one rank's shard as Triton kernels; `triton_op.py` launches them, `eager.py` defines them.

    stats_kernel     grid (counted rows, splits)   reads both shards once, writes the 8 statistics of its columns
    merge_kernel     grid (counted rows)           the statistics of a row's splits to those of the row
    gradient_kernel  grid (rows, splits)           reads both shards once, writes e (a (d - k) + b) - c onehot(y)

A tile is LANES x ITEMS adjacent columns, a lane's items one vector of 16 bytes. Every lane runs an online softmax over
its own columns, so the loop has no barrier; lanes meet once, at its end. All sums are fp32, the gradient rounded once.

d is (z - c_z) - (w - c_w), with c as `eager._difference` chooses it, for the maxima so far: close logits subtract
exactly, whatever their offset. A maximum that rises moves c, and the sums with it. e = 0 contributes nothing, whatever
it multiplies; a NaN among the columns makes its row's maximum NaN, so that every rank sees it.

UNIT is ITEMS where every row starts at a whole vector and is made of whole ones: strides then come in vectors, and one
mask per lane keeps loads and stores whole. Else it is 1: each column has its mask, and neighbours belong to adjacent
lanes, which is as right, with more loads. Padding may be read with its vector, but is selected away, never multiplied.
Offsets of rows are int64. A missing tensor is None, which Triton knows when it compiles: nothing of it is computed.

Annotated as tl.tensor, because the compiler reads annotations: pointers to a first element, scalars that were a Python
int or float at the launch (int32 or int64, fp32), and in helpers blocks of values, [LANES, ITEMS] or one for each lane.
Not here: shapes, devices, grids, the choice of splits. This file imports triton, so it is imported only when chosen.
"""

import math

import triton
import triton.language as tl

from megatron_hybrid.ops import eager

_LOWEST, _FAR = tl.constexpr(eager.LOWEST), tl.constexpr(eager.FAR)
_STEPS, _MOST_SHIFT = tl.constexpr(float(eager.STEPS)), tl.constexpr(eager.MOST_SHIFT)
_STATS = tl.constexpr(eager.NUM_STATS)
_COEFFICIENTS = tl.constexpr(6)
_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _centre(m_z: tl.tensor, m_w: tl.tensor, ratio: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """(c_z, c_w), what to take off z and w before their difference; the maxima themselves if temperatures differ."""
    shift = tl.minimum(tl.maximum(m_z - m_w, -_MOST_SHIFT), _MOST_SHIFT)
    shift = tl.floor(shift * _STEPS + 0.5) / _STEPS
    student_is_farther = tl.abs(m_z) >= tl.abs(m_w)
    c_z, c_w = tl.where(student_is_farther, shift, 0.0), tl.where(student_is_farther, 0.0, -shift)
    return tl.where(ratio == 1, c_z, m_z), tl.where(ratio == 1, c_w, m_w)


@triton.jit
def _place(
    tile: tl.tensor, UNIT: tl.constexpr, LANES: tl.constexpr, ITEMS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Columns [LANES, ITEMS] of the row's tile-th tile, and what masks them: a lane's first column, or each column."""
    lane, item, start = tl.arange(0, LANES)[:, None], tl.arange(0, ITEMS)[None, :], tile * LANES * ITEMS
    if UNIT == 1:
        column = start + item * LANES + lane
        mask = column
    else:
        mask = start + lane * ITEMS
        column = mask + item
    return column, mask


@triton.jit
def _rescaled(factor: tl.tensor, moment: tl.tensor, shift: tl.tensor, mass: tl.tensor) -> tl.tensor:
    """A moment about another centre and maximum; 0 where its mass underflows, even if it is infinite."""
    return tl.where(factor == 0, 0.0, factor * (moment + shift * mass))


@triton.jit
def _store_stats(
    out: tl.tensor,
    m_z: tl.tensor,
    s_z: tl.tensor,
    m_w: tl.tensor,
    s_w: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    c_z: tl.tensor,
    c_w: tl.tensor,
    z_y: tl.tensor,
    w_y: tl.tensor,
    student_scale: tl.tensor,
    teacher_scale: tl.tensor,
    ratio: tl.tensor,
    HAS_TEACHER: tl.constexpr,
) -> None:
    """Merges partial statistics, one per element, and stores the 8; a is about c, b about m_z, both in nats."""
    m_z_all, m_w_all = tl.max(m_z, axis=0), tl.max(m_w, axis=0)
    c_z_all, c_w_all = _centre(m_z_all, m_w_all, ratio)
    factor = tl.exp2((m_z - m_z_all) * (student_scale * _LOG2_E))
    s_z_all = tl.sum(s_z * factor, axis=0)
    s_w_all = tl.sum(s_w * tl.exp2((m_w - m_w_all) * (teacher_scale * _LOG2_E)), axis=0)
    shift = ((c_z - c_z_all) - (c_w - c_w_all) * ratio) * student_scale
    rest = ((m_z_all - c_z_all) - (m_w_all - c_w_all) * ratio) * student_scale
    rest = tl.minimum(tl.maximum(rest, -_FAR), _FAR)  # finite where the teacher forbids all of it, see `eager.py`
    # A maximum ignores NaN, the sums do not.
    tl.store(out, tl.where(s_z_all == s_z_all, m_z_all, s_z_all))
    tl.store(out + 1, s_z_all)
    tl.store(out + 5, tl.sum(_rescaled(factor, b, (m_z - m_z_all) * student_scale, s_z), axis=0))
    tl.store(out + 6, z_y)
    if HAS_TEACHER:
        tl.store(out + 2, tl.where(s_w_all == s_w_all, m_w_all, s_w_all))
        tl.store(out + 3, s_w_all)
        tl.store(out + 4, tl.sum(_rescaled(factor, a, shift, s_z), axis=0) - rest * s_z_all)
        tl.store(out + 7, w_y)


SHAPES = ["student_stride", "teacher_stride", "out_stride", "first", "width", "columns", "tiles", "splits"]
"""Integers that must not change the code: one binary serves every shape and every rank."""


@triton.jit(do_not_specialize=SHAPES)
def stats_kernel(
    student: tl.tensor,
    teacher: tl.tensor,
    target: tl.tensor,
    rows: tl.tensor,
    stats: tl.tensor,
    student_stride: tl.tensor,
    teacher_stride: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    tiles: tl.tensor,
    student_scale: tl.tensor,
    teacher_scale: tl.tensor,
    ratio: tl.tensor,
    teacher_floor: tl.tensor,
    UNIT: tl.constexpr,
    LANES: tl.constexpr,
    ITEMS: tl.constexpr,
) -> None:
    """Fills stats [n, splits, 8] with what each `tiles` tiles of a counted row hold.

    student, teacher  [rows, v/tp]; a missing teacher leaves its statistics untouched
    target, rows      [n] int64: global ids, and rows of the logits; no rows: all of them, in order
    """
    i, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = i if rows is None else tl.load(rows + i)
    z_row = student + row * student_stride * UNIT
    w_row = None if teacher is None else teacher + row * teacher_stride * UNIT
    z_scale, w_scale = student_scale * _LOG2_E, teacher_scale * _LOG2_E
    s_z = tl.zeros((LANES,), dtype=tl.float32)
    s_w, a, b, c_z, c_w = s_z, s_z, s_z, s_z, s_z
    m_z, m_w = s_z + _LOWEST, s_z + _LOWEST
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(width, LANES * ITEMS))):
        column, mask = _place(tile, UNIT, LANES, ITEMS)
        inside = column < width
        z = tl.where(inside, tl.load(z_row + column, mask=mask < width, other=0.0).to(tl.float32), -float("inf"))
        w = tl.zeros_like(z)  # without a teacher nothing that follows from it is stored, or compiled
        if teacher is not None:
            w = tl.load(w_row + column, mask=mask < width, other=0.0).to(tl.float32)
            w = tl.where(inside, tl.where(w < teacher_floor, teacher_floor, w), -float("inf"))
        m_z_new, m_w_new = tl.maximum(m_z, tl.max(z, axis=1)), tl.maximum(m_w, tl.max(w, axis=1))
        c_z_new, c_w_new = _centre(m_z_new, m_w_new, ratio)
        factor, rise = tl.exp2((m_z - m_z_new) * z_scale), (c_z - c_z_new) - (c_w - c_w_new) * ratio
        z_down = z - m_z_new[:, None]
        e = tl.exp2(z_down * z_scale)
        d = (z - c_z_new[:, None]) - (w - c_w_new[:, None]) * ratio
        a = _rescaled(factor, a, rise, s_z) + tl.sum(tl.where(e == 0, 0.0, e * d), axis=1)
        b = _rescaled(factor, b, m_z - m_z_new, s_z) + tl.sum(tl.where(e == 0, 0.0, e * z_down), axis=1)
        s_z = s_z * factor + tl.sum(e, axis=1)
        s_w = s_w * tl.exp2((m_w - m_w_new) * w_scale) + tl.sum(tl.exp2((w - m_w_new[:, None]) * w_scale), axis=1)
        m_z, m_w, c_z, c_w = m_z_new, m_w_new, c_z_new, c_w_new
    column = tl.load(target + i) - first
    here = (column >= 0) & (column < width) & (split == 0)
    z_y = tl.load(z_row + column, mask=here, other=0.0).to(tl.float32)
    w_y = z_y
    if teacher is not None:
        w_y = tl.load(w_row + column, mask=here, other=0.0).to(tl.float32)
        w_y = tl.where(here & (w_y < teacher_floor), teacher_floor, w_y)
    out = stats + (i * tl.num_programs(1) + split) * _STATS
    a, b = a * student_scale, b * student_scale
    _store_stats(
        out, m_z, s_z, m_w, s_w, a, b, c_z, c_w, z_y, w_y, student_scale, teacher_scale, ratio, teacher is not None
    )


@triton.jit(do_not_specialize=SHAPES)
def merge_kernel(
    partial: tl.tensor,
    stats: tl.tensor,
    splits: tl.tensor,
    student_scale: tl.tensor,
    teacher_scale: tl.tensor,
    ratio: tl.tensor,
    HAS_TEACHER: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
) -> None:
    """partial [n, splits, 8] to stats [n, 8]; MOST_SPLITS is the next power of two."""
    i, split = tl.program_id(0).to(tl.int64), tl.arange(0, MOST_SPLITS)
    source, mask = partial + (i * splits + split) * _STATS, split < splits
    m_z, s_z = tl.load(source, mask=mask, other=_LOWEST), tl.load(source + 1, mask=mask, other=0.0)
    m_w, s_w = tl.load(source + 2, mask=mask, other=_LOWEST), tl.load(source + 3, mask=mask, other=0.0)
    a, b = tl.load(source + 4, mask=mask, other=0.0), tl.load(source + 5, mask=mask, other=0.0)
    z_y = tl.sum(tl.load(source + 6, mask=mask, other=0.0), axis=0)
    w_y = tl.sum(tl.load(source + 7, mask=mask, other=0.0), axis=0)
    out = stats + i * _STATS
    _store_stats(out, m_z, s_z, m_w, s_w, a, b, m_z, m_w, z_y, w_y, student_scale, teacher_scale, ratio, HAS_TEACHER)


@triton.jit(do_not_specialize=SHAPES)
def gradient_kernel(
    student: tl.tensor,
    teacher: tl.tensor,
    out: tl.tensor,
    target: tl.tensor,
    position: tl.tensor,
    coefficients: tl.tensor,
    student_stride: tl.tensor,
    teacher_stride: tl.tensor,
    out_stride: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    columns: tl.tensor,
    tiles: tl.tensor,
    student_scale: tl.tensor,
    ratio: tl.tensor,
    teacher_floor: tl.tensor,
    UNIT: tl.constexpr,
    LANES: tl.constexpr,
    ITEMS: tl.constexpr,
) -> None:
    """Fills `tiles` tiles of a row of out [rows, columns], which may be the student; 0 where nothing counts.

    position      [rows] int32: which of the counted rows this one is, -1 for none; missing: all rows count, in order
    coefficients  [n, 6] fp32: m_z, m_w, k, a, b, c
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = row if position is None else tl.load(position + row).to(tl.int64)
    counts = i >= 0
    source = coefficients + i * _COEFFICIENTS
    m_z, m_w = tl.load(source, mask=counts, other=0.0), tl.load(source + 1, mask=counts, other=0.0)
    k, a = tl.load(source + 2, mask=counts, other=0.0), tl.load(source + 3, mask=counts, other=0.0)
    b, c = tl.load(source + 4, mask=counts, other=0.0), tl.load(source + 5, mask=counts, other=0.0)
    own = tl.load(target + i, mask=counts, other=-1) - first
    c_z, c_w = _centre(m_z, m_w, ratio)
    base = ((m_z - c_z) - (m_w - c_w) * ratio) * student_scale + k
    z_row, out_row = student + row * student_stride * UNIT, out + row * out_stride * UNIT
    w_row = None if teacher is None else teacher + row * teacher_stride * UNIT
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(columns, LANES * ITEMS))):
        column, mask = _place(tile, UNIT, LANES, ITEMS)
        read = (mask < width) & counts
        z = tl.load(z_row + column, mask=read, other=0.0).to(tl.float32)
        gradient = tl.exp2((z - m_z) * (student_scale * _LOG2_E))
        if teacher is None:
            gradient *= b
        else:
            w = tl.load(w_row + column, mask=read, other=0.0).to(tl.float32)
            w = tl.where(w < teacher_floor, teacher_floor, w)
            z = tl.maximum(z - c_z, -_FAR, propagate_nan=tl.PropagateNan.ALL)  # -inf less -inf would be NaN
            d = (z - (w - c_w) * ratio) * student_scale
            d = tl.maximum(d, -_FAR, propagate_nan=tl.PropagateNan.ALL)
            d = tl.minimum(d, _FAR, propagate_nan=tl.PropagateNan.ALL) - base
            gradient *= a * d + b
        gradient = tl.where(column == own, gradient - c, gradient)
        gradient = tl.where((column < width) & counts, gradient, 0.0)  # selected: NaN * 0 is NaN
        tl.store(out_row + column, gradient, mask=mask < columns)


INTERPRETED = not isinstance(stats_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET was set when triton was imported: the kernels then run as numpy, on any tensors."""
