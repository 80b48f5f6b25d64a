"""Cases of the loss against a teacher's top k, run on any number of shards, and their two judges in float64.

The judges share only a softmax: the closed form of D's gradient, and the loss alone, for torch to differentiate.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_hybrid.ops.topk import REST_FLOOR, vocab_parallel_topk_hybrid_loss

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
