"""The two passes of `mixtures.py` over one rank's shard as Triton kernels; `triton_mixtures.py` launches them.

    mixture_sums_kernel      grid (counted rows, splits)  reads both shards once, writes D and E_p[g] of its columns
    mixture_gradient_kernel  grid (rows, splits)          reads both once, writes a (p g - p E_p[g]) + c (p - onehot(y))

Tiles, vectors, masks, offsets and the origin of d are those of `triton_kernels.py`, the formulas those of
`mixtures.py`. What has to keep the digits of a small number is made of polynomials: a GPU's quick exp and log have an
error near 1 that a small u would not survive. The others go through exp2.
A share or weight that is 0 is None, which Triton knows when it compiles: nothing of it is computed.
Not here: what the letters mean, shapes, grids. This file imports triton, so it is imported only when chosen.
"""

import triton
import triton.language as tl

from megatron_hybrid.ops import mixtures
from megatron_hybrid.ops.triton_kernels import _FAR, _LOG2_E, SHAPES, _centre, _place

_NUMBERS = tl.constexpr(mixtures.NUM_COLUMN_NUMBERS)
_SMALLEST = tl.constexpr(mixtures.SMALLEST)
_LOG_2 = tl.constexpr(0.693147181)
_ROOT_OF_HALF = tl.constexpr(0x3F3504F3)  # the bits of 2^-1/2


@triton.jit
def _distance(u: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """tanh(u/2) and e^-|u|, within 1e-7 of themselves; a NaN stays."""
    half, square, size = 0.5 * u, u * u, tl.abs(u)
    # Chebyshev's fit of (tanh(u/2) - u/2) / (u/2)^3 on |u| <= 1, within 2e-9
    series = square * -6.78418286e-06 + 8.38778166e-05
    series = series * square - 8.42715457e-04
    series = series * square + 8.33326712e-03
    series = series * square - 8.33333320e-02
    power = tl.maximum(size * -_LOG2_E, -100.0, propagate_nan=tl.PropagateNan.ALL)  # the inverse of e has to be finite
    e = tl.exp2(power)
    large = (1 - e) / (1 + e)
    return tl.where(size < 1, half + half * square * series, tl.where(u < 0, -large, large)), e


@triton.jit
def _log_of_mixture(h: tl.tensor, e: tl.tensor, other_share: tl.tensor, own_share: tl.tensor) -> tl.tensor:
    """log(m/p) = log(1 + x), x = o (e^-u - 1), o = other_share; with -h and the shares swapped, log(m/q).

    With 1 + x = 2^k f, f in [2^-1/2, 2^1/2): k log 2 + 2 atanh((f-1)/(f+1)), and x for f-1 where k is 0: all digits.
    A NaN stays.
    """
    near = tl.abs(h) < 0.5  # beyond it 1 + h loses digits, and 1 - e does not
    above = tl.where(near, -2 * h, tl.where(h > 0, e - 1, 1 - e))
    x = other_share * (above / tl.where(near, 1 + h, tl.where(h > 0, 1.0, e)))
    y = tl.maximum(1 + x, own_share)  # not 0 where the other share rounds to 1
    bits = y.to(tl.int32, bitcast=True)
    k = (bits - _ROOT_OF_HALF) >> 23
    above = tl.where((k == 0) | (x != x), x, (bits - (k << 23)).to(tl.float32, bitcast=True) - 1)
    s = above / (2 + above)  # at most 0.172: what the series leaves out is 3e-9 of the whole
    square = s * s
    series = square * (1.0 / 9) + 1.0 / 7
    series = series * square + 1.0 / 5
    series = series * square + 1.0 / 3
    return k.to(tl.float32) * _LOG_2 + 2 * (s + s * square * series)


@triton.jit
def _columns(
    z: tl.tensor,
    w: tl.tensor,
    teacher_floor: tl.tensor,
    m_z: tl.tensor,
    m_w: tl.tensor,
    offset: tl.tensor,
    s_z: tl.tensor,
    s_w: tl.tensor,
    student_scale: tl.tensor,
    teacher_scale: tl.tensor,
    ratio: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """p, q and u = log p - log q of logits in fp32; u is finite, see `mixtures.columns`."""
    w = tl.where(w < teacher_floor, teacher_floor, w)
    c_z, c_w = _centre(m_z, m_w, ratio)
    base = ((m_z - c_z) - (m_w - c_w) * ratio) * student_scale + offset
    p = tl.exp2((z - m_z) * (student_scale * _LOG2_E)) / s_z
    q = tl.exp2((w - m_w) * (teacher_scale * _LOG2_E)) / s_w
    z = tl.maximum(z - c_z, -_FAR, propagate_nan=tl.PropagateNan.ALL)  # -inf less -inf would be NaN
    u = (z - (w - c_w) * ratio) * student_scale
    u = tl.maximum(u, -_FAR, propagate_nan=tl.PropagateNan.ALL)
    u = tl.minimum(u, _FAR, propagate_nan=tl.PropagateNan.ALL) - base
    return p, q, u


@triton.jit
def _weighted_slope(
    p: tl.tensor,
    q: tl.tensor,
    h: tl.tensor,
    e: tl.tensor,
    teacher_share: tl.tensor,
    student_share: tl.tensor,
    student_term: tl.tensor,
    slope: tl.tensor,
) -> tl.tensor:
    """p g, see `mixtures.weighted_slope`."""
    if teacher_share is None:  # m is p
        weighted = (p + q) * h
    else:
        g = tl.zeros_like(p)
        if slope is not None:
            m = tl.maximum(q * teacher_share + p * student_share, _SMALLEST)  # 0 where p and q are
            g = (p + q) * h / m * (slope * student_share)
        if student_term is not None:
            g -= student_term * _log_of_mixture(h, e, teacher_share, student_share)
        weighted = p * g
    return weighted


@triton.jit(do_not_specialize=SHAPES)
def mixture_sums_kernel(
    student: tl.tensor,
    teacher: tl.tensor,
    rows: tl.tensor,
    numbers: tl.tensor,
    sums: tl.tensor,
    student_stride: tl.tensor,
    teacher_stride: tl.tensor,
    width: tl.tensor,
    tiles: tl.tensor,
    student_scale: tl.tensor,
    teacher_scale: tl.tensor,
    ratio: tl.tensor,
    teacher_floor: tl.tensor,
    forbidden: tl.tensor,
    teacher_share: tl.tensor,
    student_share: tl.tensor,
    teacher_term: tl.tensor,
    student_term: tl.tensor,
    slope: tl.tensor,
    UNIT: tl.constexpr,
    LANES: tl.constexpr,
    ITEMS: tl.constexpr,
) -> None:
    """Fills sums [n, splits, 2] with the parts of D and E_p[g] that each `tiles` tiles of a counted row hold.

    rows       [n] int64: rows of the logits; missing: all of them, in order
    numbers    [n, 5] fp32, as `mixtures.NUM_COLUMN_NUMBERS` says
    forbidden  u at or below it is the stand-in of a student's -inf: D is infinite where q has mass (forward KL only)
    """
    i, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = i if rows is None else tl.load(rows + i)
    z_row, w_row = student + row * student_stride * UNIT, teacher + row * teacher_stride * UNIT
    source = numbers + i * _NUMBERS
    m_z, m_w, offset = tl.load(source), tl.load(source + 1), tl.load(source + 2)
    s_z, s_w = tl.load(source + 3), tl.load(source + 4)
    divergence = tl.zeros((LANES,), dtype=tl.float32)
    mean_slope = divergence
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(width, LANES * ITEMS))):
        column, mask = _place(tile, UNIT, LANES, ITEMS)
        z = tl.load(z_row + column, mask=mask < width, other=0.0).to(tl.float32)
        w = tl.load(w_row + column, mask=mask < width, other=0.0).to(tl.float32)
        p, q, u = _columns(z, w, teacher_floor, m_z, m_w, offset, s_z, s_w, student_scale, teacher_scale, ratio)
        h, e = _distance(u)
        terms = tl.zeros_like(p)
        if slope is not None:
            terms += (p + q) * h * slope
        if teacher_term is not None:
            log_m_over_q = tl.where((u <= forbidden) & (q > 0), -float("inf"), u)
            if teacher_share is not None:
                log_m_over_q = _log_of_mixture(-h, e, student_share, teacher_share)
            terms -= teacher_term * q * log_m_over_q
        if student_term is not None:
            terms -= student_term * p * _log_of_mixture(h, e, teacher_share, student_share)
        slopes = _weighted_slope(p, q, h, e, teacher_share, student_share, student_term, slope)
        inside = column < width
        divergence += tl.sum(tl.where(inside, terms, 0.0), axis=1)
        mean_slope += tl.sum(tl.where(inside, slopes, 0.0), axis=1)
    out = sums + (i * tl.num_programs(1) + split) * 2
    tl.store(out, tl.sum(divergence, axis=0))
    tl.store(out + 1, tl.sum(mean_slope, axis=0))


@triton.jit(do_not_specialize=SHAPES)
def mixture_gradient_kernel(
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
    teacher_scale: tl.tensor,
    ratio: tl.tensor,
    teacher_floor: tl.tensor,
    teacher_share: tl.tensor,
    student_share: tl.tensor,
    student_term: tl.tensor,
    slope: tl.tensor,
    UNIT: tl.constexpr,
    LANES: tl.constexpr,
    ITEMS: tl.constexpr,
) -> None:
    """Fills `tiles` tiles of a row of out [rows, columns], which may be the student; 0 where nothing counts.

    position      [rows] int32: which of the counted rows this one is, -1 for none; missing: all rows count, in order
    coefficients  [n, 8] fp32: those of `mixtures.NUM_COLUMN_NUMBERS`, E_p[g], a, c
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = row if position is None else tl.load(position + row).to(tl.int64)
    counts = i >= 0
    source = coefficients + i * (_NUMBERS + 3)
    m_z, m_w = tl.load(source, mask=counts, other=0.0), tl.load(source + 1, mask=counts, other=0.0)
    offset, s_z = tl.load(source + 2, mask=counts, other=0.0), tl.load(source + 3, mask=counts, other=1.0)
    s_w, mean = tl.load(source + 4, mask=counts, other=1.0), tl.load(source + 5, mask=counts, other=0.0)
    a, c = tl.load(source + 6, mask=counts, other=0.0), tl.load(source + 7, mask=counts, other=0.0)
    own = tl.load(target + i, mask=counts, other=-1) - first
    z_row, w_row = student + row * student_stride * UNIT, teacher + row * teacher_stride * UNIT
    out_row = out + row * out_stride * UNIT
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(columns, LANES * ITEMS))):
        column, mask = _place(tile, UNIT, LANES, ITEMS)
        read = (mask < width) & counts
        z = tl.load(z_row + column, mask=read, other=0.0).to(tl.float32)
        w = tl.load(w_row + column, mask=read, other=0.0).to(tl.float32)
        p, q, u = _columns(z, w, teacher_floor, m_z, m_w, offset, s_z, s_w, student_scale, teacher_scale, ratio)
        h, e = _distance(u)
        slopes = _weighted_slope(p, q, h, e, teacher_share, student_share, student_term, slope)
        gradient = (slopes - p * mean) * a + p * c
        gradient = tl.where(column == own, gradient - c, gradient)
        gradient = tl.where((column < width) & counts, gradient, 0.0)  # selected: NaN * 0 is NaN
        tl.store(out_row + column, gradient, mask=mask < columns)
