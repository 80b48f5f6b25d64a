"""The loss against a teacher's top k at its edges: no mass, no rows, no rest; infinities, and how it is called."""

import pytest
import torch

from megatron_hybrid.errors import ConfigError, ShapeError
from megatron_hybrid.ops.topk import REST_FLOOR, vocab_parallel_topk_hybrid_loss
from tests.ops.topk_cases import INF, NAN, Case, assert_as_judged, judge, make_case, run

# What there is none of: mass, rows, a rest


def test_a_teacher_that_leaves_nothing_to_others_is_floored():
    case = make_case(2, advantage=torch.zeros(8))
    case["teacher_log_probs"] = torch.tensor([0.3, 0.7]).log().expand(8, 2)
    for floor in (REST_FLOOR, -30.0):
        expected, got = judge(case, floor), run(case, rest_floor=floor)
        # 0.3 and 0.7 in fp32 sum to 1 within 6e-8, so the lower floor is not met: the judge reads the same numbers
        torch.testing.assert_close(got["kl"].double(), expected["kl"], rtol=1e-5, atol=0)
        torch.testing.assert_close(got["grad"].double(), expected["grad"], rtol=1e-5, atol=1e-6)
    case["teacher_log_probs"] = torch.tensor([0.0, -INF]).expand(8, 2)
    case["teacher_ids"] = torch.stack((case["target"], torch.full((8,), -1)), dim=1)
    got, p = run(case), judge(case)["log_prob"].exp()
    by_hand = p * p.log() + (1 - p) * ((1 - p).log() - REST_FLOOR)
    torch.testing.assert_close(got["kl"].double(), by_hand, rtol=1e-5, atol=0)
    assert run(case, rest_floor=-40.0)["kl"].gt(got["kl"]).all()


def test_no_token_at_all_says_nothing():
    case = make_case(0, advantage=torch.zeros(8))
    got = run(case)
    assert got["kl"].abs().max() < 1e-15 and got["grad"].abs().max() < 1e-15  # float64 rounding
    torch.testing.assert_close(got["teacher_log_prob"], got["log_prob"])


def test_tokens_the_student_forbids_contribute_exactly_zero():
    case = make_case(10, v=20)
    case["target"] %= 10
    case["teacher_ids"][:, :3] = torch.tensor([10, 11, 12])  # forbidden, and the teacher's favourites
    case["teacher_ids"][:, 3:] = torch.arange(7)
    case["student_logits"][:, 10:20] = -INF
    got, expected = run(case), judge(case)
    assert got["grad"][:, 10:].eq(0).all()
    assert_as_judged(case, got, expected)


def test_a_student_that_has_only_the_teachers_tokens_has_no_bucket():
    case = make_case(5)
    case["target"] = case["teacher_ids"][:, 0]
    allowed = torch.zeros(8, 40, dtype=torch.bool).scatter_(1, case["teacher_ids"], True)
    case["student_logits"][~allowed] = -INF
    got = run(case)
    assert_as_judged(case, got)
    assert torch.equal(got["kl"], run(case, rest_floor=-1e-3)["kl"])


def test_infinite_kl_is_reported_and_has_no_dense_gradient():
    case = make_case()
    clean = run(case)
    case["teacher_log_probs"][2, 1] = -INF
    got = run(case)
    assert got["kl"][2] == INF and got["loss"][2] == INF
    torch.testing.assert_close(got["grad"][2].double(), judge(case)["sparse"][2], rtol=1e-5, atol=1e-6)  # fp32
    others = [0, 1, 3, 4, 5, 6, 7]
    assert torch.equal(got["grad"][others], clean["grad"][others])


@pytest.mark.parametrize("where", ["student", "teacher"])
def test_a_nan_that_counts_is_never_silent(where: str):
    case = make_case()
    (case["student_logits"] if where == "student" else case["teacher_log_probs"])[3, 4] = NAN
    got = run(case)
    assert got["loss"][3].isnan() and got["grad"][3].isnan().all()
    assert got["loss"][[0, 1, 2, 4, 5, 6, 7]].isfinite().all()


@pytest.mark.parametrize("inplace", [False, True])
def test_ignored_rows_are_exactly_zero_whatever_they_hold(inplace: bool):
    case = make_case()
    clean, dropped, kept = run(case), [1, 4], [0, 2, 3, 5, 6, 7]
    case["target"][dropped] = -100
    case["student_logits"][dropped], case["teacher_log_probs"][dropped], case["teacher_ids"][dropped] = NAN, INF, 10**9
    student = case["student_logits"].clone().requires_grad_()
    slots = case["teacher_ids"], case["teacher_log_probs"], case["target"]
    weights = {"imitation_weight": case["imitation_weight"], "advantage": case["advantage"]}
    out = vocab_parallel_topk_hybrid_loss(student * 1, *slots, **weights, inplace=inplace)
    out.loss.sum().backward()
    for name, value in (out._asdict() | {"grad": student.grad}).items():
        assert value[dropped].eq(0).all()
        assert torch.equal(value[kept], clean[name][kept])


# The interface


def test_weigh_gives_the_weights_from_the_stats():
    case = make_case()
    expected = run(case)
    got = run(
        case,
        imitation_weight=1.0,
        advantage=0.0,
        weigh=lambda stats: (case["imitation_weight"], case["advantage"] * (stats.kl / stats.kl)),
    )
    assert torch.equal(got["grad"], expected["grad"]) and torch.equal(got["loss"], expected["loss"])


def test_inplace_writes_the_same_gradient_over_the_logits_once():
    case = make_case()
    slots, target = (case["teacher_ids"], case["teacher_log_probs"]), case["target"]
    logits = case["student_logits"].clone().requires_grad_() * 1
    loss = vocab_parallel_topk_hybrid_loss(logits, *slots, target, inplace=True).loss.sum()
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    plain = run(case, imitation_weight=1.0, advantage=0.0)["grad"]
    assert grad.data_ptr() == logits.data_ptr() and torch.equal(grad, plain)
    with pytest.raises(ConfigError, match="inplace=False"):
        torch.autograd.grad(loss, logits)


def test_inputs_are_not_mutated_and_backward_runs_twice():
    case = make_case()
    student = case["student_logits"].clone().requires_grad_()
    slots = case["teacher_ids"].clone(), case["teacher_log_probs"].clone()
    loss = vocab_parallel_topk_hybrid_loss(student, *slots, case["target"]).loss.sum()
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    given = case["student_logits"], case["teacher_ids"], case["teacher_log_probs"]
    assert all(torch.equal(now, before) for now, before in zip((student, *slots), given, strict=True))


@pytest.mark.parametrize("rows", [(), (0,), (2, 3)])
def test_any_leading_shape(rows: tuple[int, ...]):
    student = torch.randn(*rows, 11, requires_grad=True)
    log_probs, ids = torch.randn(*rows, 11).log_softmax(-1).topk(4)
    out = vocab_parallel_topk_hybrid_loss(student, ids, log_probs, torch.randint(0, 11, rows))
    out.loss.sum().backward()
    assert out.kl.shape == torch.Size(rows) and student.grad is not None and student.grad.shape == student.shape


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"teacher_ids": torch.zeros(8, 4, dtype=torch.long)}, ShapeError, "k slots"),
        ({"teacher_ids": torch.zeros(8, 5)}, ShapeError, "integer ids"),
        ({"teacher_ids": torch.zeros(8, dtype=torch.long)}, ShapeError, "k slots"),
        ({"teacher_ids": torch.full((8, 5), 40)}, RuntimeError, "teacher id lies outside the vocabulary"),
        ({"teacher_ids": torch.full((8, 5), -2)}, RuntimeError, "teacher id lies outside the vocabulary"),
        ({"target": torch.full((8,), 40)}, RuntimeError, "target lies outside the vocabulary"),
        ({"rest_floor": 0.5}, ConfigError, "rest_floor"),
        ({"rest_floor": -INF}, ConfigError, "rest_floor"),
        ({"weigh": lambda stats: (stats.kl, stats.kl)}, ConfigError, "got weigh"),
    ],
)
def test_mistakes_are_named(change: Case, error: type[Exception], match: str):
    arguments = make_case() | change
    del arguments["teacher_logits"]
    with pytest.raises(error, match=match):
        vocab_parallel_topk_hybrid_loss(**arguments)
