"""The op on one rank: values and gradient against the judge, its limits, and what may not poison it."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from megatron_hybrid.errors import ConfigError, ShapeError
from megatron_hybrid.ops import eager
from megatron_hybrid.ops.api import vocab_parallel_hybrid_loss
from megatron_hybrid.ops.reference import reference_hybrid_loss
from tests.ops.vectors import assert_close_to, gradient, load_cases, problem, run_case

CASES = load_cases()
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("name", CASES)
def test_every_case_of_the_ground_truth_in_fp32(name):
    out, grad = run_case(CASES[name])
    assert_close_to(CASES[name], out._asdict() | {"grad": grad})


@pytest.mark.parametrize("name", CASES)
def test_bf16_gradient_is_one_rounding_from_the_judge(name):
    fields = ("imitation_weight", "advantage", "student_temperature", "teacher_temperature", "vocab_size")
    case = CASES[name]
    logits = [case[f"{who}_logits"].bfloat16() for who in ("student", "teacher")]
    expected = reference_hybrid_loss(*logits, case["target"], **{field: case[field] for field in fields}).gradient
    _, grad = run_case(case, dtype=torch.bfloat16)
    # 2**-8 is bf16's unit roundoff; the rest is the fp32 error allowed before the rounding
    allowed = 2**-8 * expected.abs() + 1e-5 * expected.norm(dim=-1, keepdim=True) + 2e-6
    assert grad.dtype == torch.bfloat16
    assert (grad.double() - expected).abs().le(allowed).all()


@pytest.mark.parametrize("offset", [-300.0, 0.0, 60.0])
@pytest.mark.parametrize("spread", [1e-3, 0.1, 1.0, 14.0])
def test_gradient_keeps_its_digits_from_tiny_to_huge_kl_at_any_offset(spread, offset):
    student = torch.randn(32, 500) + offset
    teacher = student - 2 * offset + spread * torch.randn(32, 500)
    target = torch.randint(0, 500, (32,))
    expected = reference_hybrid_loss(student, teacher, target)
    out, grad = gradient(student, teacher, target)
    error = (grad.double() - expected.gradient).norm(dim=-1) / expected.gradient.norm(dim=-1)
    assert error.max() < 1e-5  # the product's figure
    torch.testing.assert_close(out.kl.double(), expected.kl, rtol=1e-5, atol=2e-6)


def test_blocks_of_rows_change_nothing(monkeypatch):
    student, teacher, target, advantage = problem(n=7)
    whole = gradient(student, teacher, target, advantage=advantage)
    monkeypatch.setitem(eager._BLOCK_ELEMENTS, "cpu", 80)  # two rows of 40 at a time, the last block a single one
    blocks = gradient(student, teacher, target, advantage=advantage)
    assert all(torch.equal(a, b) for a, b in zip(whole[0], blocks[0], strict=True))
    assert torch.equal(whole[1], blocks[1])


# Limits of the objective


def test_no_reward_and_no_future_is_reverse_kl_distillation():
    student, teacher, target, _ = problem()
    _, grad = gradient(student, teacher, target)
    p, q = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    (p.exp() * (p - q)).sum().backward()
    torch.testing.assert_close(grad, student.grad, rtol=1e-5, atol=1e-6)  # fp32


def test_no_imitation_is_the_policy_gradient():
    student, teacher, target, advantage = problem()
    _, grad = gradient(student, teacher, target, imitation_weight=0.0, advantage=advantage)
    (-advantage * student.double().log_softmax(-1).gather(1, target[:, None])[:, 0]).sum().backward()
    torch.testing.assert_close(grad, student.grad, rtol=1e-5, atol=1e-6)  # fp32


def test_teacher_equal_to_student_has_no_dense_gradient():
    student, _, target, advantage = problem()
    out, grad = gradient(student, student.detach(), target)
    assert out.kl.abs().max() == 0 and grad.abs().max() == 0
    shifted, _ = gradient(student, student.detach() + 4, target)  # an exact shift of most logits, rounding in the rest
    assert shifted.kl.abs().max() < 1e-6


@pytest.mark.parametrize("with_teacher", [True, False])
def test_no_imitation_and_advantage_one_is_cross_entropy(with_teacher):
    student, teacher, target, _ = problem()
    teacher = teacher if with_teacher else None
    weights = {"imitation_weight": 0.0} if with_teacher else {}  # without a teacher the weight has no effect
    out, grad = gradient(student, teacher, target, advantage=1.0, **weights)
    loss = cross_entropy(student, target, reduction="none")
    loss.sum().backward()
    torch.testing.assert_close(out.loss, loss, rtol=1e-6, atol=1e-6)  # both fp32
    torch.testing.assert_close(grad, student.grad, rtol=1e-5, atol=1e-6)


def test_without_a_teacher_the_imitation_outputs_are_zero():
    student, _, target, _ = problem()
    out, _ = gradient(student, None, target, advantage=1.0)
    assert out.kl.eq(0).all() and out.teacher_log_prob.eq(0).all()


def test_gradient_rows_sum_to_zero():
    student, teacher, target, advantage = problem(v=3000)
    _, grad = gradient(student, teacher, target, advantage=advantage)
    assert grad.double().sum(-1).abs().max() < 1e-6 * grad.abs().sum(-1).max()  # 3000 fp32 roundings of mixed sign


def test_shifting_the_teachers_logits_changes_nothing():
    student, teacher, target, _ = problem()
    teacher = teacher.bfloat16().float()  # so that the shift is exact
    plain, shifted = (gradient(student, logits, target)[1] for logits in (teacher, teacher + 64))
    torch.testing.assert_close(plain, shifted, rtol=1e-5, atol=1e-7)  # both fp32, rounded at other places


# Rows and columns that do not count


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_ignored_rows_are_exactly_zero_whatever_they_hold(garbage, inplace):
    student, teacher, target, advantage = problem()
    clean = gradient(student, teacher, target, advantage=advantage)
    target = target.clone()
    target[[1, 4]] = -100
    with torch.no_grad():
        student[[1, 4]], teacher[[1, 4]] = garbage, garbage
    logits = student.detach().clone().requires_grad_()
    out = vocab_parallel_hybrid_loss(logits * 1, teacher, target, advantage=advantage, inplace=inplace)
    out.loss.sum().backward()
    kept = [0, 2, 3, 5]
    for value, expected in zip((*out, logits.grad), (*clean[0], clean[1]), strict=True):
        assert value[[1, 4]].eq(0).all()
        assert torch.equal(value[kept], expected[kept])


def test_all_rows_ignored_gives_zeros():
    student, teacher, target, _ = problem()
    out, grad = gradient(student, teacher, torch.full_like(target, -100))
    assert all(value.eq(0).all() for value in (*out, grad))


@pytest.mark.parametrize("garbage", [NAN, INF, 1e30])
def test_padded_columns_get_exactly_zero_whatever_they_hold(garbage):
    student, teacher, target, advantage = problem()
    clean = gradient(student, teacher, target, advantage=advantage)
    padded = [torch.cat((x.detach(), torch.full((6, 9), garbage)), dim=1) for x in (student, teacher)]
    out, grad = gradient(*padded, target, advantage=advantage, vocab_size=40)
    assert grad[:, 40:].eq(0).all()
    assert torch.equal(grad[:, :40], clean[1])
    assert all(torch.equal(a, b) for a, b in zip(out, clean[0], strict=True))


def test_zero_weight_row_has_exactly_zero_gradient():
    student, teacher, target, _ = problem()
    weights = torch.tensor([1.0, 0, 1, 1, 1, 1])
    _, grad = gradient(student, teacher, target, imitation_weight=weights, advantage=weights)
    assert grad[1].eq(0).all() and grad[0].ne(0).any()


# Infinities


@pytest.mark.parametrize("lowest", [-INF, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("both", [False, True])
def test_forbidden_student_tokens_contribute_exactly_zero(both, lowest):
    student, teacher, target, advantage = problem()
    target, allowed = target % 20, slice(0, 20)
    expected = gradient(student[:, allowed], teacher[:, allowed], target, advantage=advantage, imitation_weight=4.0)
    for logits in (student, teacher) if both else (student,):
        logits.data[:, 20:] = lowest
    out, grad = gradient(student, teacher, target, advantage=advantage, imitation_weight=4.0)
    assert grad[:, 20:].eq(0).all()
    if both:  # the teacher's mass is on the same tokens: everything as if the others did not exist
        torch.testing.assert_close(out.loss, expected[0].loss, rtol=1e-6, atol=1e-6)  # sums in another order
        torch.testing.assert_close(grad[:, allowed], expected[1], rtol=1e-5, atol=1e-6)
    assert out.loss.isfinite().all() and grad.isfinite().all()


def test_infinite_kl_is_reported_and_has_no_dense_gradient():
    student, teacher, target, advantage = problem()
    clean = gradient(student, teacher, target, advantage=advantage)
    teacher[2, (target[2] + 1) % 40] = -INF
    out, grad = gradient(student, teacher, target, advantage=advantage)
    assert out.kl[2] == INF and out.loss[2] == INF
    sparse = reference_hybrid_loss(student.detach(), teacher, target, advantage=advantage).sparse
    torch.testing.assert_close(grad[2].double(), sparse[2], rtol=1e-5, atol=1e-6)  # fp32
    others = [0, 1, 3, 4, 5]
    assert torch.equal(grad[others], clean[1][others])
    out, _ = gradient(student, teacher, target, imitation_weight=0.0, advantage=advantage)
    assert out.loss.isfinite().all(), "a weight of 0 drops the infinite term"


def test_infinite_kl_of_a_tiny_mass_is_still_infinite():
    student, teacher, target, _ = problem()
    student.data[0, 3], teacher[0, 3] = -80.0, -INF  # a probability of 1e-36
    assert gradient(student, teacher, target)[0].kl[0] == INF


def test_teacher_logit_floor_makes_the_kl_finite():
    student, teacher, target, _ = problem()
    teacher[2, 5] = -INF
    raised = teacher.clamp(min=-30)
    assert torch.equal(
        gradient(student, teacher, target, teacher_logit_floor=-30.0)[1], gradient(student, raised, target)[1]
    )


@pytest.mark.parametrize("who", [0, 1])
def test_a_nan_that_counts_is_never_silent(who):
    tensors = problem()
    tensors[who].data[3, 7] = NAN
    student, teacher, target, _ = tensors
    out, grad = gradient(student, teacher, target)
    assert out.loss[3].isnan() and grad[3].isnan().all()  # all: on shards, every rank must see it
    assert out.loss[[0, 1, 2, 4, 5]].isfinite().all()


# Autograd


def test_gradient_that_arrives_is_applied_before_the_single_rounding():
    student, teacher, target, advantage = problem(dtype=torch.bfloat16)
    arriving = torch.rand(6) * 100
    out = vocab_parallel_hybrid_loss(student, teacher, target, advantage=advantage)
    out.loss.backward(arriving)
    expected = reference_hybrid_loss(student.detach(), teacher, target, advantage=advantage).gradient
    expected = arriving[:, None] * expected
    allowed = 2**-8 * expected.abs() + 1e-5 * expected.norm(dim=-1, keepdim=True)  # one rounding to bf16, plus fp32
    assert (student.grad.double() - expected).abs().le(allowed).all()


def test_only_the_loss_is_differentiable_and_only_in_the_student():
    student, teacher, target, advantage = problem()
    weight, teacher = advantage.clone().requires_grad_(), teacher.requires_grad_()
    out = vocab_parallel_hybrid_loss(student, teacher, target, imitation_weight=weight, advantage=weight)
    assert [value.requires_grad for value in out] == [True, False, False, False, False, False]
    out.loss.sum().backward()
    assert student.grad is not None and teacher.grad is None and weight.grad is None


def test_backward_runs_twice_and_inputs_are_not_mutated():
    student, teacher, target, advantage = problem()  # fp32: a cast to fp32 makes no copy
    before = student.detach().clone(), teacher.clone()
    loss = vocab_parallel_hybrid_loss(student, teacher, target, advantage=advantage).loss.sum()
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.data_ptr() != student.data_ptr()
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


def test_inplace_writes_over_the_logits_once_and_says_so_the_second_time():
    student, teacher, target, advantage = problem()
    expected = gradient(student, teacher, target, advantage=advantage)[1]
    logits = student * 1
    loss = vocab_parallel_hybrid_loss(logits, teacher, target, advantage=advantage, inplace=True).loss.sum()
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert grad.data_ptr() == logits.data_ptr() and torch.equal(grad, expected)
    with pytest.raises(ConfigError, match="inplace=False"):
        torch.autograd.grad(loss, logits)


def test_inplace_does_not_corrupt_another_reader_of_the_logits():
    student, teacher, target, _ = problem()
    logits = student * 1
    other = logits.square().sum()  # saves the logits
    loss = vocab_parallel_hybrid_loss(logits, teacher, target, inplace=True).loss.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("rows", [(), (0,), (2, 3)])
def test_any_leading_shape(rows):
    student, teacher = torch.randn(*rows, 11), torch.randn(*rows, 11)
    target = torch.randint(0, 11, rows)
    out, grad = gradient(student, teacher, target)
    assert out.loss.shape == target.shape and grad.shape == student.shape


def test_transposed_logits_get_their_gradient_in_place_of_a_view():
    student, teacher = torch.randn(3, 2, 11), torch.randn(3, 2, 11)
    target = torch.randint(0, 11, (2, 3))
    expected = gradient(student.transpose(0, 1).contiguous(), teacher.transpose(0, 1).contiguous(), target)[1]
    _, grad = gradient(student.transpose(0, 1), teacher.transpose(0, 1), target)
    assert torch.equal(grad, expected)
    with pytest.raises(ShapeError, match="contiguous"):
        vocab_parallel_hybrid_loss(student.transpose(0, 1), teacher.transpose(0, 1), target, inplace=True)


def test_weigh_sees_detached_stats_and_its_weights_are_used():
    student, teacher, target, advantage = problem()
    seen = []

    def weigh(stats):
        seen.append(stats)
        return torch.full_like(stats.kl, 0.5), advantage - stats.kl

    out, grad = gradient(student, teacher, target, weigh=weigh)
    (stats,) = seen
    assert not stats.kl.requires_grad and torch.equal(stats.entropy, out.entropy)
    expected = gradient(student, teacher, target, imitation_weight=0.5, advantage=advantage - out.kl)[1]
    assert torch.equal(grad, expected)


# Mistakes


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"teacher_logits": torch.zeros(6, 39)}, ShapeError, "padded alike"),
        ({"target": torch.zeros(5, dtype=torch.long)}, ShapeError, "target must hold"),
        ({"target": torch.zeros(6)}, ShapeError, "target must hold"),
        ({"student_logits": torch.zeros(6, 40, dtype=torch.long)}, ShapeError, "floating point"),
        ({"vocab_size": 41}, ShapeError, "vocab_size"),
        ({"vocab_size": 0}, ShapeError, "vocab_size"),
        ({"advantage": torch.zeros(5)}, ShapeError, "advantage of shape"),
        ({"advantage": torch.zeros(6, device="meta")}, ShapeError, "advantage is on meta"),
        ({"teacher_logits": torch.zeros(6, 40, device="meta")}, ShapeError, "teacher logits are on meta"),
        ({"student_temperature": 0.0}, ConfigError, "student_temperature"),
        ({"teacher_temperature": NAN}, ConfigError, "teacher_temperature"),
        ({"teacher_logit_floor": -INF}, ConfigError, "teacher_logit_floor"),
        ({"backend": "magic"}, ConfigError, "backend"),
        ({"weigh": lambda stats: (stats.kl, stats.kl), "advantage": 1.0}, ConfigError, "weigh"),
        ({"weigh": lambda stats: (stats.kl, stats.kl[:3])}, ShapeError, "advantage of shape"),
        ({"target": torch.full((6,), 40)}, RuntimeError, "outside the vocabulary"),
        ({"target": torch.full((6,), -1)}, RuntimeError, "outside the vocabulary"),
        ({"target": torch.full((6,), -100), "ignore_index": None}, RuntimeError, "outside the vocabulary"),
        ({"target": torch.full((6,), 30), "vocab_size": 30}, RuntimeError, "outside the vocabulary"),
    ],
)
def test_a_mistake_is_named(change, error, match):
    student, teacher, target, _ = problem()
    arguments = {"student_logits": student, "teacher_logits": teacher, "target": target} | change
    with pytest.raises(error, match=match):
        vocab_parallel_hybrid_loss(**arguments)


def test_every_backend_of_the_settings_is_one_of_the_op():
    from megatron_hybrid import config
    from megatron_hybrid.ops.api import BACKENDS

    assert set(config.BACKENDS) == set(BACKENDS)
