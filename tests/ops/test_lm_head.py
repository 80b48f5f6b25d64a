"""The fused LM head against float64 autograd through both matrix products, on one rank."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_hybrid.errors import ConfigError, ShapeError
from megatron_hybrid.ops import eager, lm_head_chunks
from megatron_hybrid.ops.api import HybridLoss, vocab_parallel_hybrid_loss
from megatron_hybrid.ops.call import read_call
from megatron_hybrid.ops.lm_head import linear_hybrid_loss
from megatron_hybrid.ops.lm_head_chunks import chunks_of
from megatron_hybrid.records import TokenStats
from tests.ops.lm_head_problem import Problem, assert_close, judged, problem

MODES = {"two_passes": {"one_pass": False}, "one_pass": {"one_pass": True}}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperatures": {"student_temperature": 0.7, "teacher_temperature": 1.3},
    "padded vocabulary": {"vocab_size": 43},
    "scaled": {"logit_scale": 0.25},
    "softcap": {"logit_softcap": 2.0},
    "all": {"logit_scale": 1.7, "logit_softcap": 3.0, "student_temperature": 0.6, "vocab_size": 41},
    "forward KL": {"divergence": "forward_kl", "logit_softcap": 4.0},
    "jsd": {"divergence": "jsd", "divergence_mix": 0.3, "student_temperature": 0.7},
}


def run(p: Problem, *, arriving: Tensor | float = 1.0, **options: Any) -> tuple[HybridLoss, Tensor, Tensor]:
    """(outputs, dh, dW) of the op where `arriving` is the gradient of each token's loss."""
    hidden, weight = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
    out = linear_hybrid_loss(
        hidden,
        weight,
        p.teacher,
        p.target,
        **{"imitation_weight": p.imitation_weight, "advantage": p.advantage, "chunk_size": 5} | options,
    )
    return out, *torch.autograd.grad((out.loss * arriving).sum(), (hidden, weight))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_both_gradients_are_those_of_float64_autograd(name: str, mode: str):
    p = problem()
    out, hidden_grad, weight_grad = run(p, **OPTIONS[name], **MODES[mode])
    loss, expected_hidden, expected_weight = judged(p, **OPTIONS[name])
    assert_close(out.loss, loss)
    assert_close(hidden_grad, expected_hidden)
    assert_close(weight_grad, expected_weight)
    assert weight_grad[OPTIONS[name].get("vocab_size", 48) :].eq(0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_size", [1, 4, 22, 23, 1000, None])
def test_chunks_of_any_size_give_the_same_numbers(chunk_size: int | None, mode: str):
    p = problem()
    out, *gradients = run(p, chunk_size=chunk_size, logit_softcap=3.0, **MODES[mode])
    loss, *expected = judged(p, logit_softcap=3.0)
    assert_close(out.loss, loss)
    for got, want in zip(gradients, expected, strict=True):
        assert_close(got, want)


def test_every_output_is_the_logits_ops_own():
    p = problem()
    p.target[2::3] = -100
    got, *_ = run(p)
    student, teacher = p.hidden @ p.weight.T, p.teacher[0] @ p.teacher[1].T
    want = vocab_parallel_hybrid_loss(
        student, teacher, p.target, imitation_weight=p.imitation_weight, advantage=p.advantage
    )
    for name, value in want._asdict().items():
        assert_close(getattr(got, name), value)


@pytest.mark.parametrize("mode", MODES)
def test_skipped_rows_are_never_read_and_get_exactly_zero(mode: str):
    p = problem()
    p.target[[0, 3, 4, 5, 22]] = -100
    kept = p.target != -100
    p.hidden[~kept] = torch.nan
    out, hidden_grad, weight_grad = run(p, **MODES[mode])
    loss, expected_hidden, expected_weight = judged(p.take(kept))
    assert out.loss[~kept].eq(0).all() and hidden_grad[~kept].eq(0).all()
    assert_close(out.loss[kept], loss)
    assert_close(hidden_grad[kept], expected_hidden)
    assert_close(weight_grad, expected_weight)


def test_two_passes_take_a_different_gradient_for_each_token():
    p, arriving = problem(), torch.linspace(-1, 2, 23)
    _, hidden_grad, weight_grad = run(p, arriving=arriving)
    _, expected_hidden, expected_weight = judged(p, arriving=arriving)
    assert_close(hidden_grad, expected_hidden)
    assert_close(weight_grad, expected_weight)


def test_one_pass_takes_any_loss_scale_and_refuses_gradients_that_differ():
    p = problem()
    _, hidden_grad, weight_grad = run(p, arriving=-1 / 3, one_pass=True)
    _, expected_hidden, expected_weight = judged(p, arriving=-1 / 3)
    assert_close(hidden_grad, expected_hidden)
    assert_close(weight_grad, expected_weight)
    with pytest.raises(RuntimeError, match="different gradients of their loss"):
        run(p, arriving=torch.linspace(1, 2, 23), one_pass=True)


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
@pytest.mark.parametrize("mode", MODES)
def test_no_token_gives_no_gradient_but_zeros(shape: tuple[int, ...], mode: str):
    p = problem()
    empty = Problem(p.hidden.new_empty(*shape, 12), p.weight, (p.hidden.new_empty(*shape, 20), p.teacher[1]), None)
    out, hidden_grad, weight_grad = run(empty, imitation_weight=1.0, advantage=0.0, **MODES[mode])
    assert out.loss.shape == shape and hidden_grad.shape == (*shape, 12)
    assert weight_grad.shape == p.weight.shape and weight_grad.eq(0).all()
    skipped = problem()
    skipped.target.fill_(-100)
    _, hidden_grad, weight_grad = run(skipped, **MODES[mode])
    assert hidden_grad.eq(0).all() and weight_grad.eq(0).all()


@pytest.mark.parametrize("teacher", ["function", "none"])
@pytest.mark.parametrize("skip", [False, True])
def test_a_teacher_may_be_a_function_of_rows_or_missing(teacher: str, skip: bool):
    p = problem()
    if skip:
        p.target[1::4] = -100
    states, head = p.teacher
    given = (lambda rows: states[rows] @ head.T) if teacher == "function" else None
    plain = run(p if teacher == "function" else p._replace(imitation_weight=torch.zeros(23)))
    for got, want in zip(run(p._replace(teacher=given)), plain, strict=True):
        got, want = (x if isinstance(x, Tensor) else x.loss for x in (got, want))
        torch.testing.assert_close(got, want, rtol=0, atol=0)  # the very same operations, or a weight of exactly 0


def test_teacher_logits_below_the_floor_are_raised():
    p = problem()
    states, head = p.teacher

    def forbidding(rows: Any) -> Tensor:
        return torch.cat([torch.full((len(states[rows]), 9), -torch.inf), (states[rows] @ head.T)[:, 9:]], dim=1)

    out, *gradients = run(p._replace(teacher=forbidding), teacher_logit_floor=-4.0, one_pass=True)
    raised = forbidding(slice(None)).clamp(min=-4.0)
    want, *expected = run(p._replace(teacher=lambda rows: raised[rows]))
    assert_close(out.kl, want.kl)
    assert_close(gradients[1], expected[1])
    assert run(p._replace(teacher=forbidding))[0].kl.isinf().all()


@pytest.mark.parametrize("mode", ["two_passes", "one_pass"])
def test_reverse_weigh_sees_later_rows_first_and_gives_the_cost_to_go(mode: str):
    p = problem()
    length, discount = 23, 0.9

    def of_all(stats: TokenStats) -> tuple[Tensor, Tensor]:
        distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
        future = torch.where(distance > 0, discount ** distance.clamp(min=0), 0.0) @ stats.kl
        return torch.ones(length), -future

    later, seen = [torch.zeros(())], []

    def from_the_end(stats: TokenStats, rows: slice) -> tuple[float, Tensor]:
        seen.append((rows.start, rows.stop))
        advantage = torch.empty_like(stats.kl)
        for i in reversed(range(len(stats.kl))):
            advantage[i] = -later[0]
            later[0] = discount * (stats.kl[i] + later[0])
        return 1.0, advantage

    free = {"imitation_weight": 1.0, "advantage": 0.0}
    want = run(p, weigh=of_all, **free)
    got = run(p, reverse_weigh=from_the_end, **free, **MODES[mode])
    assert (
        [stop for _, stop in seen] == [23, *(start for start, _ in seen[:-1])] and seen[-1][0] == 0 and len(seen) == 5
    )
    assert_close(got[0].loss, want[0].loss)
    assert_close(got[1], want[1])
    assert_close(got[2], want[2])


@pytest.mark.parametrize("mode", MODES)
def test_backward_may_run_twice(mode: str):
    p = problem()
    hidden, weight = p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_()
    loss = linear_hybrid_loss(hidden, weight, p.teacher, p.target, chunk_size=9, **MODES[mode]).loss.sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen: str, mode: str):
    p = problem()
    hidden, weight = (
        x.clone().requires_grad_(frozen != name) for name, x in (("hidden", p.hidden), ("weight", p.weight))
    )
    linear_hybrid_loss(
        hidden, weight, p.teacher, p.target, advantage=p.advantage, chunk_size=5, **MODES[mode]
    ).loss.sum().backward()
    assert (hidden.grad is None, weight.grad is None) == (frozen == "hidden", frozen == "weight")
    trained = weight if frozen == "hidden" else hidden
    _, hidden_grad, weight_grad = run(p, imitation_weight=1.0)
    assert_close(trained.grad, weight_grad if frozen == "hidden" else hidden_grad)


@pytest.mark.parametrize("elements", [1 << 21, 77])
@pytest.mark.parametrize("mode", MODES)
def test_bf16_is_within_the_roundings_of_its_logits_and_products(
    monkeypatch: pytest.MonkeyPatch, mode: str, elements: int
):
    monkeypatch.setattr(lm_head_chunks, "_PRODUCT_ELEMENTS", elements)  # 77: some rows of dW, some of them at a time
    monkeypatch.setitem(eager._BLOCK_ELEMENTS, "cpu", elements // 2)
    p = problem(n=64, dtype=torch.bfloat16)
    out, hidden_grad, weight_grad = run(p, chunk_size=16, **MODES[mode])
    assert hidden_grad.dtype == weight_grad.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    _, expected_hidden, expected_weight = judged(p)
    for got, want in ((hidden_grad, expected_hidden), (weight_grad, expected_weight)):
        # 2**-9 for each rounding: both logits (of size 3, so 3 times it in p), dz, the product, its sum
        assert (got.double() - want).norm() <= 9 * 2**-9 * want.norm()


def test_inputs_are_left_alone_and_nothing_is_differentiated_without_grad():
    p = problem()
    before = [x.clone() for x in (p.hidden, p.weight, *p.teacher)]
    with torch.no_grad():
        out = linear_hybrid_loss(p.hidden, p.weight.requires_grad_(), p.teacher, p.target, chunk_size=7, one_pass=True)
    assert not out.loss.requires_grad
    run(p, one_pass=True)
    run(p, logit_softcap=2.0, logit_scale=3.0)
    for x, old in zip((p.hidden, p.weight, *p.teacher), before, strict=True):
        assert torch.equal(x, old)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 6 * 5 - 2),
        ({"chunk_size": 23}, 4),
        ({"one_pass": True}, 4 * 5),
        ({"imitation_weight": 1.0, "advantage": 0.0, "weigh": lambda stats: (stats.kl, stats.kl)}, 6 * 5 - 2),
    ],
)
def test_a_chunk_takes_four_products_in_one_pass_and_two_more_in_two_but_for_the_one_that_is_kept(options, expected):
    with Products() as seen:
        run(problem(), **options)
    assert seen.count == expected


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden": torch.zeros(22, 12)}, r"hidden states must be \[..., h\]"),
        ({"hidden": torch.zeros(23, 12).double()}, "one floating-point type"),
        ({"teacher": (torch.zeros(23, 20), torch.zeros(40, 20))}, "padded alike"),
        ({"teacher": lambda rows: torch.zeros(1, 48)}, "for exactly the rows"),
        ({"chunk_size": 0}, "at least 1 token"),
        ({"logit_softcap": 0.0}, "logit_softcap must be"),
        ({"logit_scale": float("nan")}, "logit_scale must be"),
        ({"one_pass": True, "weigh": lambda stats: (1.0, 0.0)}, "one_pass=True makes gradients chunk by chunk"),
        ({"advantage": 1.0, "reverse_weigh": lambda stats, rows: (1.0, 0.0)}, "got reverse_weigh and also"),
        ({"backend": "abacus"}, "backend must be one of"),
    ],
)
def test_a_mistake_is_named(change: dict[str, Any], match: str):
    p = problem()
    arguments = {"hidden": p.hidden, "weight": p.weight, "teacher": p.teacher, "target": p.target}
    with pytest.raises((ConfigError, ShapeError), match=match):
        linear_hybrid_loss(**{**arguments, **change})


def test_chunks_are_nearly_equal_and_cover_every_row():
    call = read_call(torch.zeros(23, 4), None, torch.zeros(23, dtype=torch.long))
    sizes = [chunk.stop - chunk.start for chunk in chunks_of(call, 5)]
    assert sum(sizes) == 23 and max(sizes) - min(sizes) <= 1 and max(sizes) <= 5
