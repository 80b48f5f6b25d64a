"""What holds of the top-k loss for any input: drawn shapes, types, shards, masks, temperatures, slots and teachers."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_hybrid.ops.api import HybridLoss
from megatron_hybrid.ops.topk import vocab_parallel_topk_hybrid_loss
from tests.ops.one_process import run_ranks
from tests.ops.test_properties import BOUNDED, GARBAGE, STUDENTS, TEACHERS, draw_student, draw_teacher
from tests.ops.topk_cases import judge


@dataclass(frozen=True)
class Problem:
    """One drawn call; logits hold the padded vocabulary, one slice of columns per rank."""

    student: Tensor
    slots: tuple[Tensor, Tensor]
    target: Tensor
    ranks: int
    options: dict[str, Any]

    @property
    def counted(self) -> Tensor:
        return self.target != -100

    def solve(self, ranks: int | None = None, **changes: Any) -> tuple[HybridLoss, Tensor]:
        """(outputs, gradient of the summed loss over all columns)."""
        ranks = ranks or self.ranks
        width = self.student.shape[-1] // ranks

        def on(rank: int, group: Any) -> tuple[HybridLoss, Tensor]:
            leaf = self.student[:, rank * width : (rank + 1) * width].clone().requires_grad_()
            options = self.options | changes
            out = vocab_parallel_topk_hybrid_loss(leaf * 1, *self.slots, self.target, group=group, **options)
            (grad,) = torch.autograd.grad(out.loss.sum(), leaf)
            return HybridLoss(*(value.detach() for value in out)), grad

        results = run_ranks(ranks, on)
        for out, _ in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(out, results[0][0], strict=True)), "equal on every rank"
        return results[0][0], torch.cat([grad for _, grad in results], dim=1)

    def judged(self) -> dict[str, Tensor]:
        ids, log_probs = self.slots
        case = {"student_logits": self.student.float(), "teacher_ids": ids, "teacher_log_probs": log_probs}
        return judge(case | {"target": self.target.clamp(min=0)} | self.options)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    rows, ranks = draw(st.integers(1, 5)), draw(st.sampled_from((1, 2, 4)))
    v = draw(st.integers(2, 70))
    padded = ranks * -(-(v + draw(st.integers(0, 9))) // ranks)
    student = draw_student(draw(st.sampled_from(STUDENTS)), rows, v)
    teacher = draw_teacher(draw(st.sampled_from(TEACHERS)), student)
    log_probs, ids = torch.log_softmax(teacher.double(), dim=-1).topk(draw(st.integers(0, v)))
    unused = (torch.rand(ids.shape) < draw(st.sampled_from((0.0, 0.3)))) | log_probs.isneginf()
    ids[unused] = -1
    dtype, garbage = draw(st.sampled_from((torch.float32, torch.bfloat16))), draw(st.sampled_from(GARBAGE))
    log_probs = log_probs.float().masked_fill(unused, garbage)
    student = torch.cat((student, torch.full((rows, padded - v), garbage)), dim=1).to(dtype)
    target = torch.randint(0, v, (rows,)) // 2 * 2  # an even column: no kind of student forbids it
    target[torch.rand(rows) < draw(st.sampled_from((0.0, 0.4, 1.0)))] = -100
    student[target == -100] = garbage
    options = {
        "imitation_weight": torch.rand(rows),
        "advantage": draw(st.sampled_from((0.0, 1.0))) * torch.randn(rows),
        "student_temperature": draw(st.sampled_from((1.0, 0.6, 2.5))),
        "vocab_size": v,
    }
    return Problem(student, (ids, log_probs), target, ranks, options)


def scale_of(out: HybridLoss, problem: Problem) -> Tensor:
    """[rows]: how large the terms are that a row of the gradient is made of, in units of probability."""
    size = problem.options["imitation_weight"] * (out.kl + 1) + problem.options["advantage"].abs()
    return (size / problem.options["student_temperature"]).double()


def rounding_of(grad: Tensor) -> float:
    return 2**-8 if grad.dtype == torch.bfloat16 else 0.0  # each entry is rounded once to the logits' type


@BOUNDED
@given(problems())
def test_values_and_gradient_are_the_judges(problem: Problem):
    out, grad = problem.solve()
    expected, kept = problem.judged(), problem.counted
    # 1e-5: the op's figure in fp32, of terms as large as the KL and 1
    torch.testing.assert_close(out.kl[kept].double(), expected["kl"][kept], rtol=1e-5, atol=1e-5)
    error = (grad.double() - expected["grad"]).norm(dim=-1)
    allowed = rounding_of(grad) * expected["grad"].norm(dim=-1) + 1e-5 * scale_of(out, problem)
    assert (error <= allowed)[kept].all()


@BOUNDED
@given(problems())
def test_results_are_finite_and_rows_that_do_not_count_and_padding_are_exactly_zero(problem: Problem):
    out, grad = problem.solve()
    assert all(value.isfinite().all() for value in (*out, grad)) and grad.dtype == problem.student.dtype
    assert grad[:, problem.options["vocab_size"] :].eq(0).all()
    assert all(value[~problem.counted].eq(0).all() for value in (*out, grad))


@BOUNDED
@given(problems())
def test_the_divergence_is_not_negative_and_rows_of_the_gradient_sum_to_zero(problem: Problem):
    out, grad = problem.solve()
    assert (out.kl >= -1e-6).all()  # fp32 exponentials of up to 70 columns that sum to 1
    allowed = rounding_of(grad) * grad.double().abs().sum(-1) + 1e-5 * scale_of(out, problem)  # the op's figure
    assert (grad.double().sum(-1).abs() <= allowed).all()


@BOUNDED
@given(problems())
def test_any_number_of_shards_gives_the_result_of_one(problem: Problem):
    (out, grad), (whole, expected) = problem.solve(), problem.solve(ranks=1)
    for value, reference in zip(out, whole, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=2e-6)  # fp32 sums in another order
    # Two fp32 results that differ a little may round to neighbouring bf16 numbers.
    allowed = 2 * rounding_of(grad) * expected.double().norm(dim=-1) + 1e-5 * scale_of(whole, problem)
    assert ((grad - expected).double().norm(dim=-1) <= allowed).all()


@BOUNDED
@given(problems())
def test_in_place_writes_the_same_gradient(problem: Problem):
    (_, grad), (_, expected) = problem.solve(inplace=True), problem.solve()
    assert torch.equal(grad, expected)
