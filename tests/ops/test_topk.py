"""The loss against a teacher's top k: values and gradient against float64, on one rank and on vocabulary shards."""

from collections.abc import Callable

import pytest
import torch

from megatron_hybrid.ops import eager
from megatron_hybrid.ops.api import vocab_parallel_hybrid_loss
from tests.ops.topk_cases import (
    OUTPUTS,
    assert_as_judged,
    coarse_loss,
    count_collectives,
    judge,
    make_case,
    run,
    run_shards,
    some_cases,
)
from tests.ranks import Ranks

Pools = Callable[..., Ranks]


# Against the judges


@pytest.mark.parametrize("name", some_cases())
def test_values_and_gradient_are_those_of_float64(name: str):
    case = some_cases()[name]
    assert_as_judged(case, run(case))


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_autograd_of_the_coarse_grained_loss_gives_the_same_gradient(temperature: float):
    case = make_case(student_temperature=temperature)
    student = case["student_logits"].double().requires_grad_()
    loss = coarse_loss(student, case)
    (expected,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(judge(case)["grad"], expected, rtol=1e-10, atol=1e-12)  # both float64
    torch.testing.assert_close(judge(case)["loss"], loss.detach(), rtol=1e-10, atol=1e-12)
    assert_as_judged(case, run(case), judge(case) | {"grad": expected})


def test_finite_differences_of_the_op_give_its_gradient():
    case = make_case(3, n=2, v=7, columns=7)
    grad, step = run(case)["grad"], 2.0**-6
    for row in range(2):
        for column in range(7):
            losses = []
            for sign in (1, -1):
                moved = case["student_logits"].clone()
                moved[row, column] += sign * step
                losses.append(run(case | {"student_logits": moved})["loss"][row].double())
            # second-order differences err by step**2 / 6 of a third derivative of size 1, and by 1e-6 / step of fp32
            assert abs((losses[0] - losses[1]) / (2 * step) - grad[row, column]) < 2e-4


def test_all_tokens_give_the_full_kl():
    case = make_case(40)
    student = case["student_logits"].clone().requires_grad_()
    weights = {"imitation_weight": case["imitation_weight"], "advantage": case["advantage"]}
    full = vocab_parallel_hybrid_loss(
        student, case["teacher_logits"], case["target"], teacher_temperature=1.5, **weights
    )
    full.loss.sum().backward()
    got = run(case)
    for name in OUTPUTS:
        torch.testing.assert_close(got[name], getattr(full, name).detach(), rtol=1e-5, atol=2e-6)  # both fp32
    torch.testing.assert_close(got["grad"], student.grad, rtol=1e-5, atol=2e-6)


def test_more_tokens_never_lower_the_kl_and_none_reaches_the_full_one():
    case = make_case(40)
    student = case["student_logits"]
    full = vocab_parallel_hybrid_loss(student, case["teacher_logits"], case["target"], teacher_temperature=1.5).kl
    smaller = torch.zeros(8)
    for k in range(41):
        slots = {name: case[name][:, :k] for name in ("teacher_ids", "teacher_log_probs")}
        kl = run(case | slots)["kl"]
        assert (kl >= smaller - 1e-6).all() and (kl <= full + 1e-6).all(), k  # fp32 results of size 1
        smaller = kl


def test_sampled_cost_has_the_kl_as_its_mean():
    case = make_case(n=1)
    costs = []
    for y in range(40):
        got = run(case | {"target": torch.tensor([y])})
        costs.append(got["log_prob"].exp() * (got["log_prob"] - got["teacher_log_prob"]))
    torch.testing.assert_close(torch.stack(costs).sum(0), got["kl"], rtol=1e-5, atol=1e-6)  # a sum of 40 fp32 terms


@pytest.mark.parametrize("spread", [1e-3, 0.1, 14.0])
@pytest.mark.parametrize("k", [1, 8, 64])
def test_gradient_keeps_its_digits_from_tiny_to_huge_kl(spread: float, k: int):
    case = make_case(k, n=16, v=2000, columns=2000, spread=spread)
    log_q, ids = torch.log_softmax(case["teacher_logits"].double(), dim=-1).topk(k)
    case |= {"teacher_ids": ids, "teacher_log_probs": log_q.float(), "advantage": torch.zeros(16)}
    expected, got = judge(case), run(case)
    error = (got["grad"].double() - expected["dense"]).norm(dim=-1) / expected["dense"].norm(dim=-1)
    # The product's figure from a KL of 1e-6 up. Below, the log-ratios go on shrinking as its root, and the error, which
    # the fp32 exponentials of the bucket leave in one of them, does not.
    assert (error < 1e-5 * (1e-6 / expected["kl"]).sqrt().clamp(min=1)).all()


def test_bf16_gradient_is_one_rounding_from_the_judge():
    case = make_case(v=33)
    case["student_logits"] = case["student_logits"].bfloat16()
    expected, got = judge(case), run(case, dtype=torch.bfloat16)
    # 2**-8 is bf16's unit roundoff; the rest is the fp32 error allowed before the rounding
    allowed = 2**-8 * expected["grad"].abs() + 1e-5 * expected["grad"].norm(dim=-1, keepdim=True)
    assert got["grad"].dtype == torch.bfloat16
    assert (got["grad"].double() - expected["grad"]).abs().le(allowed).all()
    torch.testing.assert_close(got["kl"].double(), expected["kl"], rtol=1e-5, atol=2e-6)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch):
    case = make_case(n=7)
    whole = run(case)
    monkeypatch.setitem(eager._BLOCK_ELEMENTS, "cpu", 80)  # two rows of 40 at a time, the last block a single one
    assert all(torch.equal(value, whole[name]) for name, value in run(case).items())


# On shards


@pytest.mark.parametrize("ranks", [2, 4])
def test_vocabulary_shards_give_the_whole_vocabularys_values_and_gradient(rank_pool: Pools, ranks: int):
    cases = some_cases()
    masked = make_case()
    masked["target"][::3] = -100
    cases |= {"masked": masked, "close": make_case(spread=1e-2, advantage=torch.zeros(8))}
    log_q, ids = torch.log_softmax(cases["close"]["teacher_logits"].double(), dim=-1).topk(5)
    cases["close"] |= {"teacher_ids": ids, "teacher_log_probs": log_q.float()}
    shards = rank_pool(ranks).run(run_shards, cases)
    for name, case in cases.items():
        for shard in shards[1:]:  # the same bits on every rank
            assert all(torch.equal(shard[name][key], shards[0][name][key]) for key in shard[name] if key != "grad")
        got = shards[0][name] | {"grad": torch.cat([shard[name]["grad"] for shard in shards], dim=1)}
        expected = judge(case | {"target": case["target"].clamp(min=0)})
        for value in expected.values():
            value[case["target"] < 0] = 0
        assert_as_judged(case, got, expected)


def test_bf16_shards_are_within_one_rounding_of_one_shard(rank_pool: Pools):
    cases = some_cases()
    shards = rank_pool(2).run(run_shards, cases, torch.bfloat16)
    for name, case in cases.items():
        whole = run(case, dtype=torch.bfloat16)["grad"].double()
        grad = torch.cat([shard[name]["grad"] for shard in shards], dim=1).double()
        # two fp32 results that differ a little may round to neighbouring bf16 numbers, 2**-7 apart
        assert (grad - whole).abs().le(2**-7 * whole.abs() + 1e-5 * whole.norm(dim=-1, keepdim=True)).all()


def test_one_collective_forward_and_none_backward(rank_pool: Pools):
    for forwards, backwards, idle in rank_pool(2).run(count_collectives, make_case()):
        assert len(forwards) == 1 and "allgather" in forwards[0]
        assert backwards == [] and idle == []
