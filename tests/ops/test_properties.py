"""What holds for any input: drawn shapes, types, shards, masks, temperatures, divergences, and logits made to hurt."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_hybrid.ops.api import HybridLoss, vocab_parallel_hybrid_loss
from megatron_hybrid.ops.divergence import DIVERGENCES
from megatron_hybrid.ops.reference import reference_hybrid_loss
from tests.ops.one_process import run_ranks

BOUNDED = settings(derandomize=True, deadline=None, max_examples=150, database=None)
"""The same examples in every run; no deadline, because the first example pays for torch's start."""

STUDENTS = ("plain", "peaked", "huge", "forbidden", "identical_columns")
TEACHERS = ("other", "same", "near", "shifted", "huge", "forbidden")
GARBAGE = (0.0, float("nan"), float("inf"), -float("inf"), 3e38)


@dataclass(frozen=True)
class Problem:
    """One drawn call; logits hold the padded vocabulary, one slice of columns per rank."""

    student: Tensor
    teacher: Tensor
    target: Tensor
    ranks: int
    options: dict[str, Any]

    @property
    def counted(self) -> Tensor:
        return self.target != -100

    def solve(self, **changes: Any) -> tuple[HybridLoss, Tensor]:
        """(outputs, gradient of the summed loss over all columns); checks that no input is written to."""
        student, teacher = changes.pop("student", self.student), changes.pop("teacher", self.teacher)
        options = self.options | changes
        width = student.shape[-1] // self.ranks

        def on(rank: int, group: Any) -> tuple[HybridLoss, Tensor]:
            columns = slice(rank * width, (rank + 1) * width)
            leaf, other = student[:, columns].clone().requires_grad_(), teacher[:, columns].clone()
            out = vocab_parallel_hybrid_loss(leaf, other, self.target, group=group, **options)
            (grad,) = torch.autograd.grad(out.loss.sum(), leaf)
            for now, before in ((leaf, student), (other, teacher)):
                assert torch.equal(now.detach().view(torch.uint8), before[:, columns].contiguous().view(torch.uint8))
            return HybridLoss(*(value.detach() for value in out)), grad

        results = run_ranks(self.ranks, on)
        for out, _ in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(out, results[0][0], strict=True)), "equal on every rank"
        return results[0][0], torch.cat([grad for _, grad in results], dim=1)


def draw_student(kind: str, rows: int, v: int) -> Tensor:
    logits = 2 * torch.randn(rows, v)
    match kind:
        case "peaked":
            logits[:, 0] += 30
        case "huge":
            logits *= 1e4
        case "forbidden":
            logits[:, 1::2] = -torch.inf
        case "identical_columns":
            logits[:] = logits[:, :1]
    return logits


def draw_teacher(kind: str, student: Tensor) -> Tensor:
    match kind:
        case "same":
            return student.clone()
        case "near":
            return student + 1e-3 * torch.randn(student.shape)
        case "shifted":
            return student + 0.1 * torch.randn(student.shape) - 70
    logits = 2 * torch.randn(student.shape)
    if kind == "huge":
        logits *= 1e4
    if kind == "forbidden":
        logits[:, 2::3] = -torch.inf
    return logits


@st.composite
def problems(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)) -> Problem:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    rows, ranks = draw(st.integers(1, 5)), draw(st.sampled_from((1, 2, 4)))
    v = draw(st.integers(1, 70))
    padded = ranks * -(-(v + draw(st.integers(0, 9))) // ranks)
    student = draw_student(draw(st.sampled_from(STUDENTS)), rows, v)
    teacher = draw_teacher(draw(st.sampled_from(TEACHERS)), student)
    garbage, dtype = draw(st.sampled_from(GARBAGE)), draw(st.sampled_from(dtypes))
    student, teacher = (
        torch.cat((x, torch.full((rows, padded - v), garbage)), dim=1).to(dtype) for x in (student, teacher)
    )
    target = torch.randint(0, v, (rows,)) // 2 * 2  # an even column: no kind of student forbids it
    target[torch.rand(rows) < draw(st.sampled_from((0.0, 0.4, 1.0)))] = -100
    dropped = (target == -100).nonzero()
    student[dropped], teacher[dropped] = garbage, garbage
    options = {
        "imitation_weight": torch.rand(rows),
        "advantage": draw(st.sampled_from((0.0, 1.0))) * torch.randn(rows),
        "student_temperature": draw(st.sampled_from((1.0, 0.6, 2.5))),
        "teacher_temperature": draw(st.sampled_from((1.0, 0.8))),
        "vocab_size": v,
        "divergence": draw(st.sampled_from(DIVERGENCES)),
        "divergence_mix": draw(st.sampled_from((0.1, 0.5, 0.9))),
    }
    return Problem(student, teacher, target, ranks, options)


def may_be_infinite(problem: Problem) -> Tensor:
    """[rows]: one of the two distributions forbids what the divergence asks of it."""
    v = problem.options["vocab_size"]
    forbids = {"reverse_kl": problem.teacher, "forward_kl": problem.student}.get(problem.options["divergence"])
    if forbids is None:
        return torch.zeros(len(problem.target), dtype=torch.bool)
    return forbids[:, :v].isneginf().any(-1)


def scale_of(out: HybridLoss, problem: Problem) -> Tensor:
    """[rows]: how large the terms are that a row of the gradient is made of, in units of probability."""
    size = out.divergence.where(out.divergence.isfinite(), 0.0).abs() + 1
    size = problem.options["imitation_weight"] * size + problem.options["advantage"].abs()
    return (size / problem.options["student_temperature"]).double()


@BOUNDED
@given(problems())
def test_results_are_finite_and_rows_that_do_not_count_and_padding_are_exactly_zero(problem: Problem):
    out, grad = problem.solve()
    assert grad.isfinite().all() and grad.dtype == problem.student.dtype
    assert grad[:, problem.options["vocab_size"] :].eq(0).all()
    for value in (*out, grad):
        assert value[~problem.counted].eq(0).all()
    finite = problem.counted & ~may_be_infinite(problem)
    assert out.loss[finite].isfinite().all() and out.divergence[finite].isfinite().all()
    assert out.log_prob.isfinite().all() and out.entropy.isfinite().all()


@settings(BOUNDED, max_examples=400)
@given(problems())
def test_values_and_gradient_are_the_judges(problem: Problem):
    out, grad = problem.solve()
    kept = problem.counted
    expected = reference_hybrid_loss(problem.student, problem.teacher, problem.target.where(kept, 0), **problem.options)
    finite = kept & expected.divergence.isfinite()
    assert torch.equal(out.divergence.isfinite() | ~kept, finite | ~kept)
    # fp32 sums; the reverse KL subtracts parts as large as the logits' distances from their maximum
    torch.testing.assert_close(out.divergence[finite].double(), expected.divergence[finite], rtol=1e-5, atol=1e-5)
    rounding = 2**-8 if grad.dtype == torch.bfloat16 else 0.0  # each entry is rounded once to the logits' type
    norm = expected.gradient.norm(dim=-1)
    error = (grad.double() - expected.gradient).norm(dim=-1)
    assert (error <= rounding * norm + 1e-5 * scale_of(out, problem))[kept].all()  # 1e-5: the op's figure in fp32


@BOUNDED
@given(problems())
def test_the_divergence_is_never_negative_beyond_rounding(problem: Problem):
    out, _ = problem.solve()
    # fp32 sums of up to 70 terms. The reverse KL subtracts parts as large as the logits' differences from the maximum.
    parts = 1.0 if problem.options["divergence"] != "reverse_kl" else 1 + out.entropy.abs()
    assert (out.divergence >= -2e-6 * parts).all()
    assert not out.kl.isnan().any() and (out.kl >= -2e-6 * (1 + out.entropy.abs())).all()


@BOUNDED
@given(problems())
def test_rows_of_the_gradient_sum_to_zero(problem: Problem):
    out, grad = problem.solve()
    rounding = 2**-8 if grad.dtype == torch.bfloat16 else 0.0  # each entry is rounded once to the logits' type
    # 1e-5: the op's figure in fp32, relative to the terms (and not to what is left of them)
    allowed = rounding * grad.double().abs().sum(-1) + 1e-5 * scale_of(out, problem)
    assert (grad.double().sum(-1).abs() <= allowed).all()


@BOUNDED
@given(problems(dtypes=(torch.float32,)), st.sampled_from((-32.0, 8.0, 64.0)), st.booleans())
def test_shifting_either_logits_changes_nothing(problem: Problem, shift: float, shift_the_student: bool):
    # Multiples of 2**-6 below 2**16 and their shifts are exact in fp32.
    student, teacher = ((x.clamp(-3e4, 3e4) * 64).round() / 64 for x in (problem.student, problem.teacher))
    student, teacher = (
        torch.where(x.isneginf(), x, y) for x, y in ((problem.student, student), (problem.teacher, teacher))
    )
    plain, expected = problem.solve(student=student, teacher=teacher)
    moved = {"student": student + shift} if shift_the_student else {"teacher": teacher + shift}
    out, grad = problem.solve(**({"student": student, "teacher": teacher} | moved))
    torch.testing.assert_close(out.divergence, plain.divergence, rtol=1e-5, atol=2e-6)  # fp32, rounded at other places
    assert ((grad - expected).double().norm(dim=-1) <= 1e-5 * scale_of(plain, problem)).all()


@BOUNDED
@given(problems(dtypes=(torch.float32,)))
def test_any_number_of_shards_gives_the_result_of_one(problem: Problem):
    out, grad = problem.solve()
    whole, expected = Problem(problem.student, problem.teacher, problem.target, 1, problem.options).solve()
    for value, reference in zip(out, whole, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=2e-6)  # fp32 sums in another order
    assert ((grad - expected).double().norm(dim=-1) <= 1e-5 * scale_of(whole, problem)).all()


@BOUNDED
@given(problems())
def test_in_place_writes_the_same_gradient_over_the_student_and_nothing_else(problem: Problem):
    if problem.ranks > 1:
        problem = Problem(problem.student, problem.teacher, problem.target, 1, problem.options)
    _, expected = problem.solve()
    logits, teacher = problem.student.clone().requires_grad_() * 1, problem.teacher.clone()
    out = vocab_parallel_hybrid_loss(logits, teacher, problem.target, inplace=True, **problem.options)
    (grad,) = torch.autograd.grad(out.loss.sum(), logits)
    assert grad.data_ptr() == logits.data_ptr() and torch.equal(grad, expected)
    assert torch.equal(teacher.view(torch.uint8), problem.teacher.view(torch.uint8))
