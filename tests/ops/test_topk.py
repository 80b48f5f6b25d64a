"""The loss against a teacher's top k: values and gradient against float64, on one rank and on vocabulary shards.

Two judges that share only a softmax: the closed form of D's gradient, and the loss alone, for torch to differentiate.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_hybrid.errors import ConfigError, ShapeError
from megatron_hybrid.ops import eager
from megatron_hybrid.ops.api import vocab_parallel_hybrid_loss
from megatron_hybrid.ops.topk import REST_FLOOR, vocab_parallel_topk_hybrid_loss
from megatron_hybrid.runtime.spawn import RankPool

Pools = Callable[..., RankPool]
Case = dict[str, Any]
INF, NAN = float("inf"), float("nan")
OUTPUTS = ("loss", "kl", "log_prob", "teacher_log_prob", "entropy")


def make_case(
    k: int = 5, *, n: int = 8, v: int = 40, columns: int = 40, spread: float = 1.0, offset: float = 0.0, **changes: Any
) -> Case:
    """A student near a teacher of which k tokens are kept, the likeliest; columns beyond v hold NaN and infinity."""
    logits = torch.randn(n, v) * 2
    teacher = logits + spread * torch.randn(n, v)
    log_probs, ids = torch.log_softmax(teacher.double() / 1.5, dim=-1).topk(k)
    student = torch.full((n, columns), NAN)
    student[:, v::2] = INF
    student[:, :v] = logits + offset
    return {
        "student_logits": student,
        "teacher_logits": teacher,  # at temperature 1.5
        "teacher_ids": ids,
        "teacher_log_probs": log_probs.float(),
        "target": torch.randint(0, v, (n,)),
        "imitation_weight": torch.rand(n) + 0.5,
        "advantage": torch.randn(n),
        "student_temperature": 1.0,
        "vocab_size": v,
    } | changes


def judge(case: Case, rest_floor: float = REST_FLOOR) -> dict[str, Tensor]:
    """The closed form, float64, line by line: outputs, gradient of the summed loss, its dense and sparse part."""
    v, t, y = case["vocab_size"], case["student_temperature"], case["target"]
    log_p = torch.log_softmax(case["student_logits"][:, :v].double() / t, dim=-1)
    p = log_p.exp()
    log_q = torch.full_like(log_p, NAN)
    for row, (ids, log_probs) in enumerate(zip(case["teacher_ids"], case["teacher_log_probs"], strict=True)):
        kept = ids >= 0
        log_q[row, ids[kept]] = log_probs[kept].double()
        others = log_q[row].isnan()
        rest = (1 - log_probs[kept].double().exp().sum()).clamp(min=math.exp(rest_floor))
        log_q[row, others] = log_p[row, others] - p[row, others].sum().log() + rest.log()
    g = torch.where(p > 0, log_p - log_q, 0.0)
    kl = (p * g).sum(-1)
    beta, a = case["imitation_weight"].double()[:, None], case["advantage"].double()[:, None]
    at_target = torch.nn.functional.one_hot(y, v)
    log_prob, teacher_log_prob = (x.gather(1, y[:, None])[:, 0] for x in (log_p, log_q))
    padding = (0, case["student_logits"].shape[1] - v)
    dense, sparse = (
        torch.nn.functional.pad(x / t, padding) for x in (beta * p * (g - kl[:, None]), a * (p - at_target))
    )
    return {
        "loss": beta[:, 0] * kl - a[:, 0] * log_prob,
        "kl": kl,
        "log_prob": log_prob,
        "teacher_log_prob": teacher_log_prob,
        "entropy": -torch.where(p > 0, p * log_p, 0.0).sum(-1),
        "grad": dense + sparse,
        "dense": dense,
        "sparse": sparse,
    }


def coarse_loss(student: Tensor, case: Case) -> Tensor:
    """The loss [n] alone, float64, differentiable by torch: a KL over k + 1 outcomes. Every slot in use."""
    log_p = torch.log_softmax(student / case["student_temperature"], dim=-1)
    kept_p, kept_q = log_p.gather(1, case["teacher_ids"]), case["teacher_log_probs"].double()
    others = torch.ones_like(log_p, dtype=torch.bool).scatter_(1, case["teacher_ids"], False)
    rest_p = torch.where(others, log_p, -INF).logsumexp(-1, keepdim=True)
    coarse_p = torch.cat((kept_p, rest_p), dim=1)
    coarse_q = torch.cat((kept_q, torch.log(1 - kept_q.exp().sum(-1, keepdim=True))), dim=1)
    kl = torch.nn.functional.kl_div(coarse_q, coarse_p, reduction="none", log_target=True).sum(-1)
    return case["imitation_weight"] * kl - case["advantage"] * log_p.gather(1, case["target"][:, None])[:, 0]


def run(
    case: Case, *, dtype: torch.dtype = torch.float32, rank: int = 0, ranks: int = 1, group: Any = None, **options: Any
) -> dict[str, Tensor]:
    """The op on this rank's columns: its outputs and the gradient of the summed loss, detached."""
    columns = case["student_logits"].shape[1] // ranks
    student = case["student_logits"][:, rank * columns : (rank + 1) * columns].to(dtype).requires_grad_()
    fields = ("imitation_weight", "advantage", "student_temperature", "vocab_size")
    out = vocab_parallel_topk_hybrid_loss(
        student,
        case["teacher_ids"],
        case["teacher_log_probs"],
        case["target"],
        **{field: case[field] for field in fields} | options,
        group=group,
    )
    out.loss.sum().backward()
    assert student.grad is not None
    return {name: value.detach() for name, value in out._asdict().items()} | {"grad": student.grad}


def run_shards(cases: dict[str, Case], dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Tensor]]:
    """On each rank: every case on its columns."""
    where = {"rank": dist.get_rank(), "ranks": dist.get_world_size(), "group": dist.group.WORLD}
    return {name: run(case, dtype=dtype, **where) for name, case in cases.items()}


def count_collectives(case: Case) -> tuple[list[str], list[str], list[str]]:
    """On each rank: names of the collectives in a forward, in its backward, and in a forward where no row counts."""
    student = torch.randn(8, 10, requires_grad=True)

    def during(function: Callable[[], Any]) -> tuple[Any, list[str]]:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            result = function()
        return result, [event.name for event in seen.events() or [] if event.name.startswith("c10d::")]

    def forward(target: Tensor) -> Any:
        slots = case["teacher_ids"] % 10, case["teacher_log_probs"]
        return vocab_parallel_topk_hybrid_loss(student, *slots, target, group=dist.group.WORLD)

    out, forwards = during(lambda: forward(case["target"] % 10))
    _, backwards = during(out.loss.sum().backward)
    _, idle = during(lambda: forward(torch.full_like(case["target"], -100)))
    return forwards, backwards, idle


def assert_as_judged(case: Case, got: dict[str, Tensor], expected: dict[str, Tensor] | None = None) -> None:
    """1e-5 relative (the product's figure), for the gradient per row; 2e-6 absolute: fp32 terms of size 1 to 10."""
    expected = judge(case) if expected is None else expected
    for name in OUTPUTS:
        torch.testing.assert_close(got[name].double(), expected[name], rtol=1e-5, atol=2e-6)
    error = (got["grad"].double() - expected["grad"]).norm(dim=-1)
    assert (error <= 1e-5 * expected["grad"].norm(dim=-1)).all(), error
    assert got["grad"][:, case["vocab_size"] :].eq(0).all()


def some_cases() -> dict[str, Case]:
    unused = make_case(6)
    unused["teacher_ids"][:4, 3:] = -1
    unused["teacher_ids"][4] = -1
    unused["teacher_log_probs"][:5, 4:] = NAN  # an unused slot is never read
    unlikely = make_case(40)
    unlikely["student_logits"][:, 20:] -= 1e3  # a probability of exactly 0, and on shards a whole rank of it
    unlikely["teacher_log_probs"][unlikely["teacher_ids"] >= 20] = -INF
    unlikely["target"] %= 20
    return {
        "plain": make_case(),
        "one": make_case(1),
        "all_but_one": make_case(39),
        "all": make_case(40),
        "padded": make_case(v=27),
        "last_shards_only_padding": make_case(v=9),
        "unused_slots": unused,
        "forbidden_where_the_student_has_nothing": unlikely,
        "warm_student": make_case(student_temperature=1.7),
        "cold_student": make_case(student_temperature=0.6),
        "far_apart": make_case(spread=12.0),
        "offset": make_case(offset=-300.0),
    }


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
