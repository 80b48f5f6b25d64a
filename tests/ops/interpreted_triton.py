"""The Triton kernels, interpreted, against the torch backend: what the op's tests do not ask. See `interpreter.py`."""

import pytest
import torch

from megatron_hybrid.errors import ShapeError
from megatron_hybrid.ops import eager, mixtures, triton_mixtures, triton_op
from megatron_hybrid.ops.api import vocab_parallel_hybrid_loss
from megatron_hybrid.ops.call import read_call
from megatron_hybrid.ops.divergence import DIVERGENCES, mixture_of
from megatron_hybrid.ops.function import merged_stats
from megatron_hybrid.ops.reference import reference_hybrid_loss

NAN = float("nan")
F16, B16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
CLOSE = {"rtol": 1e-5, "atol": 2e-6}
"""fp32 sums of terms of size 1 to 10, in another order."""


def both(student, teacher, target, **options):
    """Stats [n, 8] and gradients [rows, v] of (triton, torch); coefficients are drawn but for the maxima."""
    call = read_call(student, teacher, target, **options)
    stats = [backend.shard_stats(student, teacher, call) for backend in (triton_op, eager)]
    drawn = torch.randn(len(call.target), 4, generator=torch.Generator().manual_seed(1))
    coefficients = torch.cat((stats[1][:, 0:3:2], drawn), dim=1)
    outs = [torch.full_like(student, 7.0) for _ in range(2)]
    for backend, out in zip((triton_op, eager), outs, strict=True):
        backend.shard_gradient(student, teacher, call, coefficients, out)
    return stats, outs


def assert_same(student, teacher, target, **options):
    (stats, expected), (out, expected_out) = both(student, teacher, target, **options)
    torch.testing.assert_close(stats, expected, **CLOSE)
    # one rounding to the logits' type, which can fall either way
    torch.testing.assert_close(
        out, expected_out, rtol=max(torch.finfo(out.dtype).eps, 1e-5), atol=2e-6 if out.dtype != F16 else 1e-5
    )


TYPES = [(F32, F32), (B16, B16), (F16, F16), (F64, F64), (B16, F32), (F32, F16), (B16, None)]
WIDTHS = {1: TYPES[:2], 7: TYPES[:2], 8: TYPES[:2], 96: TYPES, 101: TYPES}
"""Less than a vector, vectors and not, whole tiles and not; the last two have rows of several splits."""


@pytest.mark.parametrize(("student", "teacher", "v"), [(*types, v) for v, every in WIDTHS.items() for types in every])
def test_every_type_and_width_is_as_in_torch(student, teacher, v):
    kept = max(1, v - 3)
    target = torch.randint(0, kept, (3,))
    target[1] = -100
    logits = (3 * torch.randn(3, v)).to(student)
    other = None if teacher is None else (3 * torch.randn(3, v)).to(teacher)
    assert_same(logits, other, target, student_temperature=0.7, vocab_size=kept)


@pytest.mark.parametrize("garbage", [NAN, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("padding", [8, 9])  # whole vectors, and rows that begin in the middle of one
def test_padding_leaves_no_trace(padding, garbage):
    logits, target = torch.randn(2, 2, 37 + padding), torch.randint(0, 37, (2,))
    clean = both(logits[0], logits[1], target, vocab_size=37)
    logits[:, :, 37:] = garbage
    dirty = both(logits[0], logits[1], target, vocab_size=37)
    assert torch.equal(clean[0][0], dirty[0][0]) and torch.equal(clean[1][0], dirty[1][0])
    assert dirty[1][0][:, 37:].eq(0).all()


@pytest.mark.parametrize("gap", [3, 8])
def test_rows_that_lie_apart_are_read_where_they_are_and_nothing_between_is_written(gap):
    stored, target = torch.randn(2, 5, 48 + gap), torch.randint(0, 48, (5,))
    assert_same(stored[0, :, :48], stored[1, :, :48], target)
    out, call = torch.full_like(stored[0], 7.0), read_call(stored[0, :, :48], stored[1, :, :48], target)
    triton_op.shard_gradient(stored[0, :, :48], stored[1, :, :48], call, torch.zeros(5, 6), out[:, :48])
    assert out[:, :48].eq(0).all() and out[:, 48:].eq(7).all()


@pytest.mark.parametrize("who", [0, 1])
def test_a_nan_is_in_the_maximum_even_where_the_student_has_no_mass(who):
    # Every rank's gradient reads the maximum, and only one rank's moments hold the NaN.
    logits, target = torch.randn(2, 3, 40), torch.zeros(3, dtype=torch.long)
    logits[0, 1, 30] = -torch.inf
    logits[who, 1, 30] = NAN
    call = read_call(*logits, target)
    stats = triton_op.shard_stats(*logits, call)
    assert torch.equal(stats[:, 2 * who].isnan(), torch.tensor([False, True, False]))
    assert torch.equal(stats[:, 2 * who].isnan(), eager.shard_stats(*logits, call)[:, 2 * who].isnan())


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_a_row_split_over_programs_is_the_row(splits, monkeypatch):
    monkeypatch.setattr(triton_op, "FEWEST_TILES", -(-10 // splits))
    student, target = 4 * torch.randn(2, 160), torch.tensor([0, 159])  # ten tiles of 16
    assert triton_op.Tiling.of(2, 160, student).splits == splits
    student[0, :70], student[1, 90:] = -torch.inf, torch.finfo(F32).min  # splits without any mass
    assert_same(student, student + torch.randn(2, 160) - 50, target)
    assert_same(student, None, target)


@pytest.mark.parametrize("spread", [1e-3, 1.0, 14.0])
@pytest.mark.parametrize("offset", [-300.0, 0.0, 60.0])
def test_gradient_keeps_its_digits_from_tiny_to_huge_kl_at_any_offset(spread, offset):
    student = torch.randn(2, 120) + offset
    teacher = student - 2 * offset + spread * torch.randn(2, 120)
    target = torch.randint(0, 120, (2,))
    expected = reference_hybrid_loss(student, teacher, target)
    leaf = student.clone().requires_grad_()
    out = vocab_parallel_hybrid_loss(leaf, teacher, target, backend="triton")
    (grad,) = torch.autograd.grad(out.loss.sum(), leaf)
    error = (grad.double() - expected.gradient).norm(dim=-1) / expected.gradient.norm(dim=-1)
    assert error.max() < 1e-5  # the product's figure
    torch.testing.assert_close(out.kl.double(), expected.kl, rtol=1e-5, atol=2e-6)


def test_a_shard_of_padding_alone_has_no_mass_and_no_gradient():
    student, teacher, target = torch.full((3, 16), NAN), torch.full((3, 16), NAN), torch.zeros(3, dtype=torch.long)
    call = read_call(torch.zeros(3, 16), None, target)
    call = type(call)(call.target, None, call.shape, type(call.shard)(16, 0, 1.0, 1.0, None), None)
    assert torch.equal(triton_op.shard_stats(student, teacher, call), eager.shard_stats(student, teacher, call))
    triton_op.shard_gradient(student, teacher, call, torch.ones(3, 6), student)
    assert student.eq(0).all()


def test_logits_whose_vocabulary_is_not_contiguous_are_declined():
    logits = torch.randn(8, 3).T
    with pytest.raises(ShapeError, match="contiguous"):
        vocab_parallel_hybrid_loss(logits, None, torch.zeros(3, dtype=torch.long), backend="triton")


# The other divergences


@pytest.mark.parametrize(
    ("student", "teacher", "v"), [(F32, F32, 101), (B16, B16, 96), (F16, F16, 7), (F64, F64, 8), (B16, F32, 1)]
)
@pytest.mark.parametrize("divergence", DIVERGENCES[1:])
def test_every_divergence_is_as_in_torch_whatever_type_and_width(divergence, student, teacher, v):
    kept = max(1, v - 3)
    target = torch.randint(0, kept, (3,))
    target[1] = -100
    assert_same_mixture(
        (3 * torch.randn(3, v)).to(student),
        (3 * torch.randn(3, v)).to(teacher),
        target,
        divergence,
        student_temperature=0.7,
        vocab_size=kept,
    )


@pytest.mark.parametrize("splits", [1, 5])
def test_a_row_split_over_programs_has_the_divergence_of_the_row(splits, monkeypatch):
    monkeypatch.setattr(triton_op, "FEWEST_TILES", -(-10 // splits))
    student, target = 4 * torch.randn(2, 160), torch.tensor([0, 159])  # ten tiles of 16
    assert triton_op.Tiling.of(2, 160, student).splits == splits
    student[0, :70] = -torch.inf
    assert_same_mixture(student, torch.where(student.isinf(), student, torch.randn(2, 160) - 50), target, "forward_kl")


@pytest.mark.parametrize("garbage", [NAN, torch.inf, 3e38])
@pytest.mark.parametrize("padding", [8, 9])  # whole vectors, and rows that begin in the middle of one
def test_padding_leaves_no_trace_in_a_divergence(padding, garbage):
    logits, target = torch.randn(2, 2, 37 + padding), torch.randint(0, 37, (2,))
    clean = of_mixture(triton_mixtures, logits[0], logits[1], target, "jsd", vocab_size=37)
    logits[:, :, 37:] = garbage
    dirty = of_mixture(triton_mixtures, logits[0], logits[1], target, "jsd", vocab_size=37)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True)) and dirty[1][:, 37:].eq(0).all()


@pytest.mark.parametrize("spread", [1.4e-3, 14.0])
@pytest.mark.parametrize("divergence", DIVERGENCES[1:])
def test_a_divergence_keeps_its_digits_from_tiny_to_huge_kl(divergence, spread):
    student = torch.randn(2, 120) - 300
    teacher = student + 600 + spread * torch.randn(2, 120)
    target, options = torch.randint(0, 120, (2,)), {"divergence": divergence, "divergence_mix": 0.3}
    expected = reference_hybrid_loss(student, teacher, target, **options)
    leaf = student.clone().requires_grad_()
    out = vocab_parallel_hybrid_loss(leaf, teacher, target, backend="triton", **options)
    (grad,) = torch.autograd.grad(out.loss.sum(), leaf)
    error, p = (grad.double() - expected.dense).norm(dim=-1), student.double().softmax(-1)
    # the product's figure; where p and q hardly overlap, the slope g is nearly constant: 4 ulps of it, times p
    assert (error <= 1e-5 * expected.dense.norm(dim=-1) + 2**-22 * p.norm(dim=-1)).all()
    # a term of D is of second order in log p - log q, but its parts of first order are rounded: 1e-7 of 1e-3
    torch.testing.assert_close(out.divergence.double(), expected.divergence, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("divergence", DIVERGENCES[1:])
def test_a_nan_is_never_silent_in_a_divergence(divergence, who):
    logits, target = torch.randn(2, 3, 40), torch.zeros(3, dtype=torch.long)
    logits[who, 1, 30] = NAN
    sums, out = of_mixture(triton_mixtures, *logits, target, divergence)
    assert sums[1].isnan().all() and out[1].isnan().all() and sums[[0, 2]].isfinite().all()


def test_an_infinite_forward_kl_is_infinite():
    logits, target = torch.randn(2, 3, 40), torch.zeros(3, dtype=torch.long)
    logits[0, 1, 30] = -torch.inf
    sums, _ = of_mixture(triton_mixtures, *logits, target, "forward_kl", student_temperature=2.5)
    assert sums[1, 0] == torch.inf and sums[[0, 2], 0].isfinite().all()


def of_mixture(passes, student, teacher, target, divergence, **options):
    """Sums [n, 2] and gradient [rows, v]; E_p[g] is the sum, weights are drawn."""
    call, mixture = read_call(student, teacher, target, **options), mixture_of(divergence, 0.3)
    merged = merged_stats(eager, student, teacher, call)
    assert mixture is not None
    numbers = torch.stack((merged.m_z, merged.m_w, (merged.s_z / merged.s_w).log(), merged.s_z, merged.s_w), dim=-1)
    sums = passes.shard_sums(student, teacher, call, mixture, numbers)
    drawn = torch.randn(len(call.target), 2, generator=torch.Generator().manual_seed(1))
    out = torch.full_like(student, 7.0)
    passes.shard_gradient(student, teacher, call, mixture, torch.cat((numbers, sums[:, 1:], drawn), dim=1), out)
    return sums, out


def assert_same_mixture(student, teacher, target, divergence, **options):
    (sums, out), (expected_sums, expected_out) = (
        of_mixture(passes, student, teacher, target, divergence, **options) for passes in (triton_mixtures, mixtures)
    )
    torch.testing.assert_close(sums, expected_sums, **CLOSE)
    # one rounding to the logits' type, which can fall either way
    torch.testing.assert_close(
        out, expected_out, rtol=max(torch.finfo(out.dtype).eps, 1e-5), atol=2e-6 if out.dtype != F16 else 1e-5
    )
