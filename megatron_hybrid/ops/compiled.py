"""The two passes of `eager.py` compiled: by `native.cpp` for fp32 and bf16 on a CPU, by torch.compile for the rest.

    stats     e = exp(z - m_z), d = (z - m_z) - (w - m_w):   m_z, s_z, m_w, s_w, sum e d, sum e (z - m_z)     per row
    gradient  e (a (d - k) + b);   at the target, where c comes off, the same formula on [n, 1], not compiled

On a CPU torch.compile reaches a third of the C++ (it calls a library for each exp, keeps sums in memory, and reads a
block once for the maxima and once for the sums), so what follows is of other devices, other types, and no compiler.

Data in and out, edge cases and types are those of `eager.py`, which also serves a single row or column. Each pass takes
blocks of rows that stay in cache; what is held besides the inputs is one block where rows are picked or overwritten by
a mask, and nothing otherwise. No collective.

A variant is compiled once for each pair of logit types, with and without padding beyond the vocabulary, on a sample of
a few rows. No two of its sizes are equal, so that nothing about sizes is assumed: any number of rows and columns, any
temperature and floor run the same code. torch compiles for the number of threads it finds, and again should that
change. Where it cannot (no C++ compiler on a CPU, no Triton on a GPU) the torch backend runs, and the log says why.
Not here: other divergences than the reverse KL, `compiled_mixtures.py`.
"""

import functools
import logging
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.ops import eager, native
from megatron_hybrid.ops.call import Call, Shard
from megatron_hybrid.ops.eager import FAR, LOWEST, MOST_SHIFT, STEPS

logger = logging.getLogger(__name__)

_ELEMENTS_PER_THREAD = 1 << 18
"""Of a block on a CPU: 1 MB of fp32. Measured on 2 threads at 512 x 32768: flat from 2**18 on, twice the time at 2**15,
where starting the threads and Python show. More would only hurt where the last-level cache is small."""
_ELEMENTS_ELSEWHERE = 1 << 24
"""As the torch backend: an accelerator wants few, large launches."""
_MOST_VARIANTS = 64
"""torch would give up after 8 of one function, of which there are 12 by types alone: 3, and 3 or no teacher."""
_LONG_SUM = 4096
"""Above it torch.compile sums in chunks, to keep the digits; which of the two it does is compiled in."""

_Kind = tuple[torch.dtype, bool]
"""Type of logits, and whether the rows of a block lie behind one another without a gap."""


@torch.no_grad()
def shard_stats(student: Tensor, teacher: Tensor | None, call: Call) -> Tensor:
    """As `eager.shard_stats`: this rank's statistics of the counted rows, [n, 8] fp32."""
    if native.serves(student, teacher):
        return native.shard_stats(student, teacher, call)
    run, n = _variant(_stats, call, student, teacher), len(call.target)
    if run is None or min(n, call.shard.width) < 2:
        return eager.shard_stats(student, teacher, call)
    scalars = _scalars(call.shard, student)
    stats = torch.empty((n, eager.NUM_STATS), dtype=torch.float32, device=student.device)
    for start, stop in _blocks(n, call.shard.width, student):
        stats[start:stop, :6] = run(*_inputs(student, teacher, call, start, stop), scalars)
    z_y, w_y = _at_target(student, teacher, call)
    here = call.owned()[1].unsqueeze(1)
    stats[:, 6:7] = torch.where(here, z_y.float(), 0.0)
    stats[:, 7:] = 0.0 if w_y is None else torch.where(here, torch.maximum(w_y.float(), scalars[3]), 0.0)
    return stats


@torch.no_grad()
def shard_gradient(student: Tensor, teacher: Tensor | None, call: Call, coefficients: Tensor, out: Tensor) -> None:
    """As `eager.shard_gradient`: writes the gradient of every row and column of the shard into `out`."""
    if native.serves(student, teacher):
        return native.shard_gradient(student, teacher, call, coefficients, out)
    over = call.rows is not None or out.data_ptr() == student.data_ptr()
    outputs = [] if over else [out]
    run = _variant(_write_gradient, call, student, teacher, *outputs, over=over)
    n, width = len(call.target), call.shard.width
    if run is None or min(n, width) < 2:
        return eager.shard_gradient(student, teacher, call, coefficients, out)
    scalars, numbers, out = _scalars(call.shard, student), coefficients[:, :5].contiguous(), out.detach()
    # First, because the blocks may overwrite the logits: one entry per row, c off before the single rounding.
    at_target = _gradient(*_at_target(student, teacher, call), numbers, scalars) - coefficients[:, 5:]
    for start, stop in _blocks(n, width, student):
        z, w = _inputs(student, teacher, call, start, stop)
        # The same object where the gradient overwrites its logits: to torch.compile that is one argument, no alias.
        run(z, w, numbers[start:stop], scalars, z if over else out[start:stop, :width])
        if call.rows is not None:
            out[:, :width].index_copy_(0, call.rows[start:stop], z)
    rows, (column, here) = _counted_rows(call), call.owned()
    out[rows, column] = torch.where(here, at_target.squeeze(1).to(out.dtype), out[rows, column])
    eager.clear_uncounted(call, out)


def _stats(student: Tensor, teacher: Tensor | None, scalars: Tensor) -> Tensor:
    """[r, width] logits to [r, 6] fp32: m_z, s_z, m_w, s_w, A, B."""
    student_scale, ratio, teacher_scale, floor = scalars.unbind(0)
    z = student.float()
    m_z = z.amax(-1, keepdim=True).clamp(min=LOWEST)
    centred = (z - m_z) * student_scale
    e = centred.exp()
    s_z = e.sum(-1, keepdim=True)
    b = _weighed(e, centred)
    if teacher is None:
        zero = torch.zeros_like(m_z)
        return torch.cat((m_z, s_z, zero, zero, zero, b), dim=-1)
    w = torch.maximum(teacher.float(), floor)
    m_w = w.amax(-1, keepdim=True).clamp(min=LOWEST)
    s_w = ((w - m_w) * teacher_scale).exp().sum(-1, keepdim=True)
    c_z, c_w, rest = _origins(m_z, m_w, student_scale, ratio)
    a = _weighed(e, ((z - c_z) - (w - c_w) * ratio) * student_scale) - rest * s_z
    return torch.cat((m_z, s_z, m_w, s_w, a, b), dim=-1)


def _weighed(e: Tensor, values: Tensor) -> Tensor:
    """sum e values, [r, 1]; nothing where e is 0. Not nansum: torch.compile tests for NaN one element at a time."""
    return torch.where(e == 0, 0.0, e * values).sum(-1, keepdim=True)


def _write_gradient(student: Tensor, teacher: Tensor | None, numbers: Tensor, scalars: Tensor, out: Tensor) -> None:
    out.copy_(_gradient(student, teacher, numbers, scalars))


def _gradient(student: Tensor, teacher: Tensor | None, numbers: Tensor, scalars: Tensor) -> Tensor:
    """e (a (d - k) + b), [r, width] fp32; numbers [r, 5]: m_z, m_w, k, a, b, see `eager.shard_gradient`."""
    student_scale, ratio, _, floor = scalars.unbind(0)
    m_z, m_w, k, a, b = numbers.split(1, dim=-1)
    z = student.float()
    e = ((z - m_z) * student_scale).exp()
    if teacher is None:
        return e * b
    w = torch.maximum(teacher.float(), floor)
    c_z, c_w, rest = _origins(m_z, m_w, student_scale, ratio)
    d = ((z - c_z).clamp(min=-FAR) - (w - c_w) * ratio) * student_scale
    return e * (a * (d.clamp(min=-FAR, max=FAR) - (rest + k)) + b)


def _origins(m_z: Tensor, m_w: Tensor, student_scale: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is taken off z and w before their difference, and the rest that brings it to the maxima; [r, 1] each.

    See `eager._difference`: at equal temperatures, steps that subtract exactly; else the maxima themselves.
    """
    step = ((m_z - m_w).clamp(-MOST_SHIFT, MOST_SHIFT) * STEPS).round() / STEPS
    student_is_farther = m_z.abs() >= m_w.abs()
    c_z = torch.where(ratio == 1, torch.where(student_is_farther, step, 0.0), m_z)
    c_w = torch.where(ratio == 1, torch.where(student_is_farther, 0.0, -step), m_w)
    rest = ((m_z - c_z) - (m_w - c_w) * ratio) * student_scale
    return c_z, c_w, rest.clamp(-FAR, FAR)


def _scalars(shard: Shard, like: Tensor) -> Tensor:
    """[4] fp32: student scale, teacher's over student's, teacher scale, floor. A tensor: a number would be compiled in.

    Filled on the device, one by one: a copy from the host would make it wait.
    """
    values = (shard.student_scale, shard.teacher_scale / shard.student_scale, shard.teacher_scale, shard.floor)
    return torch.stack([torch.full((), value, dtype=torch.float32, device=like.device) for value in values])


def _blocks(n: int, width: int, like: Tensor) -> list[tuple[int, int]]:
    """[start, stop) of each block; at least two rows in each (n >= 2): torch.compile treats a size of 1 apart."""
    rows = _ELEMENTS_ELSEWHERE // width
    if like.device.type == "cpu":
        threads = torch.get_num_threads()
        rows = threads * max(1, _ELEMENTS_PER_THREAD // width)  # as many rows for each thread
    return list(pairwise([*range(0, n - 1, max(2, rows)), n]))


def _inputs(student: Tensor, teacher: Tensor | None, call: Call, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
    """Counted rows [start:stop] of the shard's true columns: views, or copies of a block where a mask picks rows."""

    def block(logits: Tensor) -> Tensor:
        columns = logits.detach()[:, : call.shard.width]
        return columns[start:stop] if call.rows is None else columns.index_select(0, call.rows[start:stop])

    return block(student), None if teacher is None else block(teacher)


def _counted_rows(call: Call) -> Tensor:
    return torch.arange(len(call.target), device=call.target.device) if call.rows is None else call.rows


def _at_target(student: Tensor, teacher: Tensor | None, call: Call) -> tuple[Tensor, Tensor | None]:
    """[n, 1] logits at the targets; of another column where the target is on another rank."""
    rows, (column, _) = _counted_rows(call).unsqueeze(1), call.owned()
    column = column.unsqueeze(1)
    return student.detach()[rows, column], None if teacher is None else teacher.detach()[rows, column]


def _variant(
    function: Callable[..., Any], call: Call, *tensors: Tensor | None, over: bool = False
) -> Callable[..., Any] | None:
    """`function` compiled for blocks of these logits (and of the output behind them); None where torch cannot.

    over  its output is its first argument
    """
    width, (first, *_) = call.shard.width, tensors
    assert first is not None
    kinds = tuple(None if x is None else (x.dtype, call.rows is not None or x.stride(0) == width) for x in tensors)
    return _compiled(function, kinds, function is _stats and width > _LONG_SUM, first.device.type, over)


@functools.cache
def _compiled(
    function: Callable[..., Any], kinds: tuple[_Kind | None, ...], long: bool, device: str, over: bool
) -> Callable[..., Any] | None:
    from torch._dynamo import config  # late: loading the compiler takes seconds, and only who asks for it pays
    from torch._dynamo.exc import BackendCompilerFailed

    width = _LONG_SUM + 7 if long else 7

    def sample(kind: _Kind | None, gap: int) -> Tensor | None:
        # Not a slice of something larger: the base of a view would be compiled in as well.
        stride = (width if kind and kind[1] else width + gap, 1)
        return None if kind is None else torch.empty_strided((3, width), stride, dtype=kind[0], device=device).zero_()

    samples = [sample(kind, gap) for kind, gap in zip(kinds, (2, 4, 6), strict=False)]
    numbers = [] if function is _stats else [torch.zeros((3, 5), device=device)]
    scalars = torch.ones(4, device=device)
    run = torch.compile(function, dynamic=True)
    try:
        with config.patch(recompile_limit=_MOST_VARIANTS), torch.no_grad():
            run(*samples[:2], *numbers, scalars, *(samples[:1] if over else samples[2:]))
    except BackendCompilerFailed as error:
        _say_why(str(error).strip().splitlines()[0], device)
        return None
    return run


@functools.cache
def _say_why(reason: str, device: str) -> None:
    logger.warning("backend 'compile' runs as 'torch' on %s, because torch.compile failed: %s", device, reason)
