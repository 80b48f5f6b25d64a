"""Every divergence of the dense part on one rank, by two backends: value and gradient against the judge, limits."""

import pytest
import torch

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.ops import api, compiled_mixtures
from megatron_hybrid.ops.api import vocab_parallel_hybrid_loss
from megatron_hybrid.ops.divergence import DIVERGENCES
from megatron_hybrid.ops.reference import reference_hybrid_loss
from tests.ops.vectors import gradient, judged, load_cases, problem, run_case

CASES = load_cases()
OTHERS = DIVERGENCES[1:]
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True, params=["torch", "compile"])
def backend(request, monkeypatch):
    """Who computes what is asked of the torch backend, here by default; compile is the C++, and may not ask others."""
    if request.param == "compile":
        monkeypatch.setitem(api.BACKENDS, "torch", api.BACKENDS["compile"])
        monkeypatch.setattr(compiled_mixtures, "mixtures", None)


# Against the judge


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", CASES)
def test_every_case_of_the_ground_truth_in_fp32(name, divergence):
    case, options = CASES[name], {"divergence": divergence, "divergence_mix": 0.3}
    out, grad = run_case(case, **options)
    expected = judged(case, **options)
    torch.testing.assert_close(out.divergence.double(), expected.divergence, rtol=1e-5, atol=2e-6)
    error = (grad.double() - expected.gradient).norm(dim=-1)
    # the product's figure; 2e-6 for values that vanish: they are sums of fp32 terms of size 1 to 10
    assert (error <= 1e-5 * expected.gradient.norm(dim=-1) + 2e-6).all(), error
    assert grad[:, case["vocab_size"] :].eq(0).all()


@pytest.mark.parametrize("divergence", OTHERS)
@pytest.mark.parametrize("name", CASES)
def test_bf16_gradient_is_one_rounding_from_the_judge(name, divergence):
    _, grad = run_case(CASES[name], dtype=torch.bfloat16, divergence=divergence)
    expected = judged(CASES[name], dtype=torch.bfloat16, divergence=divergence).gradient
    # 2**-8 is bf16's unit roundoff; the rest is the fp32 error allowed before the rounding
    allowed = 2**-8 * expected.abs() + 1e-5 * expected.norm(dim=-1, keepdim=True) + 2e-6
    assert grad.dtype == torch.bfloat16
    assert (grad.double() - expected).abs().le(allowed).all()


@pytest.mark.parametrize("mix", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("offset", [-300.0, 0.0, 60.0])
@pytest.mark.parametrize("spread", [1.4e-3, 0.1, 1.0, 14.0, 45.0])
@pytest.mark.parametrize("divergence", OTHERS)
def test_value_and_gradient_keep_their_digits_from_tiny_to_huge_kl_at_any_offset(divergence, spread, offset, mix):
    student = torch.randn(32, 500) + offset
    teacher = student - 2 * offset + spread * torch.randn(32, 500)
    target, options = torch.randint(0, 500, (32,)), {"divergence": divergence, "divergence_mix": mix}
    expected = reference_hybrid_loss(student, teacher, target, **options)
    out, grad = gradient(student, teacher, target, **options)
    error = (grad.double() - expected.dense).norm(dim=-1)
    p = student.double().softmax(-1)
    # the product's figure; where p and q hardly overlap, the slope g is nearly constant: 4 ulps of it, times p
    assert (error <= 1e-5 * expected.dense.norm(dim=-1) + 2**-22 * p.norm(dim=-1)).all()
    if spread < 1:  # nothing but the figure where p and q are close
        assert (error <= 1e-5 * expected.dense.norm(dim=-1)).all()
    # a term of D is of second order in log p - log q, but its parts of first order are rounded: 1e-7 of 1e-3
    torch.testing.assert_close(out.divergence.double(), expected.divergence, rtol=1e-5, atol=1e-10)


def test_the_huge_kl_of_the_sweep_is_huge_and_the_tiny_one_tiny():
    student, noise = torch.randn(32, 500), torch.randn(32, 500)
    target = torch.zeros(32, dtype=torch.long)
    small, large = (reference_hybrid_loss(student, student + x * noise, target).kl for x in (1.4e-3, 45.0))
    assert small.max() < 2e-6 and large.max() > 1e2


# What does not depend on the divergence


@pytest.mark.parametrize("divergence", OTHERS)
def test_the_other_outputs_are_those_of_the_reverse_kl_to_the_bit(divergence):
    student, teacher, target, advantage = problem()
    plain, _ = gradient(student, teacher, target, advantage=advantage)
    out, _ = gradient(student, teacher, target, advantage=advantage, divergence=divergence)
    for field in ("kl", "log_prob", "teacher_log_prob", "entropy"):
        assert torch.equal(getattr(out, field), getattr(plain, field))
    assert torch.equal(plain.divergence, plain.kl) and not torch.equal(out.divergence, plain.kl)
    torch.testing.assert_close(out.loss, out.divergence - advantage * out.log_prob, rtol=1e-6, atol=1e-6)  # fp32


def test_weigh_sees_the_reverse_kl_whatever_the_divergence():
    student, teacher, target, _ = problem()
    seen = []

    def weigh(stats):
        seen.append(stats.kl)
        return torch.ones_like(stats.kl), -stats.kl

    out, _ = gradient(student, teacher, target, weigh=weigh, divergence="jsd")
    assert torch.equal(seen[0], out.kl)


@pytest.mark.parametrize("divergence", OTHERS)
def test_without_a_teacher_no_divergence_has_an_effect(divergence):
    student, _, target, advantage = problem()
    plain, expected = gradient(student, None, target, advantage=advantage)
    out, grad = gradient(student, None, target, advantage=advantage, divergence=divergence)
    assert torch.equal(grad, expected) and all(torch.equal(a, b) for a, b in zip(out, plain, strict=True))
    assert out.divergence.eq(0).all()


# Limits


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_teacher_equal_to_student_has_no_divergence_and_no_dense_gradient(divergence):
    student, _, target, _ = problem()
    out, grad = gradient(student, student.detach(), target, divergence=divergence)
    assert out.divergence.eq(0).all() and grad.eq(0).all()


def test_jensen_shannon_is_symmetric_and_below_log_two():
    student, teacher, target, _ = problem()
    there, back = (gradient(*pair, target, divergence="jsd")[0] for pair in ((student, teacher), (teacher, student)))
    torch.testing.assert_close(there.divergence, back.divergence, rtol=1e-6, atol=1e-7)  # fp32
    far, _ = gradient(50 * student, -50 * student.detach(), target, divergence="jsd")
    torch.testing.assert_close(far.divergence, torch.full((6,), 2.0).log(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("divergence", "limit"), [("skewed_kl", "forward_kl"), ("skewed_reverse_kl", "reverse_kl")])
def test_without_skew_a_skewed_kl_is_the_kl(divergence, limit):
    student, teacher, target, _ = problem()
    out, grad = gradient(student, teacher, target, divergence=divergence, divergence_mix=1e-9)
    expected = gradient(student, teacher, target, divergence=limit)
    torch.testing.assert_close(out.divergence, expected[0].divergence, rtol=1e-5, atol=1e-6)  # fp32
    torch.testing.assert_close(grad, expected[1], rtol=1e-5, atol=1e-6)


# Infinities and rows that do not count


def test_infinite_forward_kl_is_reported_and_has_no_dense_gradient():
    student, teacher, target, advantage = problem()
    clean = gradient(student, teacher, target, advantage=advantage, divergence="forward_kl")
    student.data[2, (target[2] + 1) % 40] = -INF
    out, grad = gradient(student, teacher, target, advantage=advantage, divergence="forward_kl")
    assert out.divergence[2] == INF and out.loss[2] == INF and out.kl[2].isfinite()
    sparse = reference_hybrid_loss(student.detach(), teacher, target, advantage=advantage).sparse
    torch.testing.assert_close(grad[2].double(), sparse[2], rtol=1e-5, atol=1e-6)  # fp32
    others = [0, 1, 3, 4, 5]
    assert torch.equal(grad[others], clean[1][others])
    out, _ = gradient(student, teacher, target, imitation_weight=0.0, advantage=advantage, divergence="forward_kl")
    assert out.loss.isfinite().all(), "a weight of 0 drops the infinite term"


@pytest.mark.parametrize("temperature", [0.01, 1.0, 2.5, 1e6])
def test_infinite_forward_kl_of_a_tiny_mass_is_still_infinite_at_any_temperature(temperature):
    student, teacher, target, _ = problem()
    student.data[0, 3], teacher[0, 3] = -INF, -80.0  # the teacher's probability is 1e-36
    out, _ = gradient(student, teacher, target, divergence="forward_kl", student_temperature=temperature)
    assert out.divergence[0] == INF and out.divergence[1:].isfinite().all()


def test_a_teachers_probability_that_is_zero_in_fp32_costs_nothing_where_the_student_forbids_the_token():
    student, teacher, target, _ = problem()
    student.data[:, 3], teacher[:, 3] = -INF, -300.0
    expected = gradient(student, teacher.index_fill(1, torch.tensor(3), -INF), target % 3, divergence="forward_kl")
    out, grad = gradient(student, teacher, target % 3, divergence="forward_kl")
    assert out.divergence.isfinite().all() and torch.equal(out.divergence, expected[0].divergence)
    assert torch.equal(grad, expected[1])


@pytest.mark.parametrize("lowest", [-INF, torch.finfo(torch.float32).min, -1e4])
@pytest.mark.parametrize(
    ("divergence", "who"),
    [
        (divergence, who)
        for divergence in OTHERS
        for who in ("student", "teacher", "both")
        if (divergence, who) != ("forward_kl", "student")  # infinite: tested above
    ],
)
def test_forbidden_tokens_leave_value_and_gradient_finite_and_true(divergence, who, lowest):
    student, teacher, target, advantage = problem()
    target %= 20
    for logits in (student.data, teacher):
        logits[0, 5] = 4.0  # where one of them is sure to have mass
    for name, logits in (("student", student.data), ("teacher", teacher)):
        if who in (name, "both"):
            logits[:, 20:], logits[0, 5] = lowest, lowest
    options = {"advantage": advantage, "divergence": divergence, "divergence_mix": 0.3}
    target[0] = 7
    out, grad = gradient(student, teacher, target, **options)
    expected = reference_hybrid_loss(student.detach(), teacher, target, **options)
    torch.testing.assert_close(out.divergence.double(), expected.divergence, rtol=1e-5, atol=1e-6)  # fp32
    torch.testing.assert_close(grad.double(), expected.gradient, rtol=1e-5, atol=1e-6)
    if who != "teacher":
        assert grad[:, 20:].eq(0).all()


@pytest.mark.parametrize(("divergence", "who"), [("skewed_kl", 0), ("skewed_reverse_kl", 1)])
def test_a_share_that_fp32_cannot_tell_from_one_still_bounds_the_divergence(divergence, who):
    tensors = problem()
    tensors[who].data[:, 5] = -INF
    student, teacher, target, _ = tensors
    options = {"divergence": divergence, "divergence_mix": 1e-9}
    out, grad = gradient(student, teacher, torch.zeros_like(target), **options)
    expected = reference_hybrid_loss(student.detach(), teacher, torch.zeros_like(target), **options)
    torch.testing.assert_close(out.divergence.double(), expected.divergence, rtol=1e-5, atol=1e-6)  # fp32
    torch.testing.assert_close(grad.double(), expected.gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("divergence", OTHERS)
def test_a_nan_that_counts_is_never_silent(divergence, who):
    tensors = problem()
    tensors[who].data[3, 7] = NAN
    student, teacher, target, _ = tensors
    out, grad = gradient(student, teacher, target, divergence=divergence)
    assert out.loss[3].isnan() and out.divergence[3].isnan() and grad[3].isnan().all()
    assert out.loss[[0, 1, 2, 4, 5]].isfinite().all()


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
@pytest.mark.parametrize("divergence", OTHERS)
def test_ignored_rows_and_padded_columns_are_exactly_zero_whatever_they_hold(divergence, garbage):
    student, teacher, target, advantage = problem()
    options = {"divergence": divergence, "advantage": advantage}
    clean = gradient(student, teacher, target, **options)
    padded = [torch.cat((x.detach(), torch.full((6, 9), garbage)), dim=1) for x in (student, teacher)]
    for logits in padded:
        logits[[1, 4]] = garbage
    target = target.clone()
    target[[1, 4]] = -100
    out, grad = gradient(*padded, target, vocab_size=40, **options)
    kept = [0, 2, 3, 5]
    assert grad[:, 40:].eq(0).all() and torch.equal(grad[kept, :40], clean[1][kept])
    for value, expected in zip((*out, grad), (*clean[0], clean[1]), strict=True):
        assert value[[1, 4]].eq(0).all()
        assert value is grad or torch.equal(value[kept], expected[kept])


def test_all_rows_ignored_gives_zeros():
    student, teacher, target, _ = problem()
    out, grad = gradient(student, teacher, torch.full_like(target, -100), divergence="jsd")
    assert all(value.eq(0).all() for value in (*out, grad))


# Blocks and autograd


@pytest.mark.parametrize("divergence", OTHERS)
def test_blocks_of_rows_change_nothing(monkeypatch, divergence):
    student, teacher, target, advantage = problem(n=7)
    options = {"divergence": divergence, "advantage": advantage}
    whole = gradient(student, teacher, target, **options)
    monkeypatch.setitem(api.eager._BLOCK_ELEMENTS, "cpu", 80)  # two rows of 40 at a time, the last block a single one
    blocks = gradient(student, teacher, target, **options)
    assert all(torch.equal(a, b) for a, b in zip((*whole[0], whole[1]), (*blocks[0], blocks[1]), strict=True))


@pytest.mark.parametrize("divergence", OTHERS)
def test_backward_runs_twice_or_once_in_place_and_inputs_are_not_mutated(divergence):
    student, teacher, target, advantage = problem()  # fp32: a cast to fp32 makes no copy
    before = student.detach().clone(), teacher.clone()
    options = {"divergence": divergence, "advantage": advantage}
    loss = vocab_parallel_hybrid_loss(student, teacher, target, **options).loss.sum()
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.data_ptr() != student.data_ptr()
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])
    logits = student * 1
    loss = vocab_parallel_hybrid_loss(logits, teacher, target, inplace=True, **options).loss.sum()
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert grad.data_ptr() == logits.data_ptr() and torch.equal(grad, first)
    with pytest.raises(ConfigError, match="inplace=False"):
        torch.autograd.grad(loss, logits)


# Mistakes


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"divergence": "kl"}, "divergence must be one of"),
        ({"divergence_mix": 0.0}, "strictly between 0 and 1"),
        ({"divergence_mix": 1.0}, "strictly between 0 and 1"),
        ({"divergence_mix": NAN}, "strictly between 0 and 1"),
    ],
)
def test_a_mistake_is_named(change, match):
    student, teacher, target, _ = problem()
    with pytest.raises(ConfigError, match=match):
        vocab_parallel_hybrid_loss(student, teacher, target, **({"divergence": "jsd"} | change))
