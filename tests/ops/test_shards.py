"""The op on a vocabulary split over real gloo ranks: the whole vocabulary's values and gradient, one collective."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_hybrid.ops import compiled, eager
from megatron_hybrid.ops.api import vocab_parallel_hybrid_loss
from megatron_hybrid.ops.call import Call, Shard
from megatron_hybrid.ops.diagnostics import logit_gradient_norms
from megatron_hybrid.ops.divergence import DIVERGENCES
from megatron_hybrid.ops.reference import reference_hybrid_loss
from tests.ops.vectors import assert_close_to, judged, load_cases, outputs_of
from tests.ranks import Ranks

Case = dict[str, Any]
Pools = Callable[..., Ranks]


def extra_cases() -> dict[str, Case]:
    """Problems that only shards have, answered by the judge; columns beyond the vocabulary hold NaN and infinity."""
    generator = torch.Generator().manual_seed(0)

    def case(spread: float, vocab_size: int, offset: float = 0.0, forbid: slice | None = None) -> Case:
        student = torch.randn(12, 64, generator=generator)
        teacher = student + offset + spread * torch.randn(12, 64, generator=generator)
        target = torch.randint(0, vocab_size, (12,), generator=generator)
        if forbid is not None:
            student[:, forbid], teacher[:, forbid] = -torch.inf, -torch.inf
            target %= forbid.start
        student[:, vocab_size:], teacher[:, vocab_size:] = torch.nan, torch.inf
        inputs: Case = {
            "student_logits": student.double(),
            "teacher_logits": teacher.double(),
            "target": target,
            "imitation_weight": torch.rand(12, generator=generator).double(),
            "advantage": torch.randn(12, generator=generator).double(),
            "student_temperature": 1.0,
            "teacher_temperature": 1.0,
            "vocab_size": vocab_size,
        }
        answer = reference_hybrid_loss(**inputs)
        return inputs | answer._asdict() | {"grad": answer.gradient}

    return {
        "ranks_with_only_padding": case(1.0, 15),
        "uneven": case(1.0, 37),
        "close": case(2e-3, 64),
        "close_after_an_offset": case(2e-3, 64, offset=-150.0),
        "ranks_with_only_forbidden_tokens": case(1.0, 64, forbid=slice(16, 64)),
    }


def run_shards(
    cases: dict[str, Case], dtype: torch.dtype = torch.float32, divergences: tuple[str, ...] = ("reverse_kl",)
) -> dict[tuple[str, str], dict[str, Tensor]]:
    """On each rank: every case on its columns, with every divergence."""
    options = {"rank": dist.get_rank(), "ranks": dist.get_world_size(), "group": dist.group.WORLD, "dtype": dtype}
    return {
        (divergence, name): outputs_of(case, divergence=divergence, divergence_mix=0.3, **options)
        for divergence in divergences
        for name, case in cases.items()
    }


def whole_of(shards: list[Any], *key: str) -> dict[str, Tensor]:
    """One result of the whole vocabulary from the ranks' parts; what is not sharded must be the same bits on all."""
    parts = [shard[key] for shard in shards]
    for part in parts[1:]:
        assert all(torch.equal(part[name], parts[0][name]) for name in part if name != "grad")
    return parts[0] | {"grad": torch.cat([part["grad"] for part in parts], dim=1)}


def count_collectives(divergence: str) -> tuple[list[str], list[str], list[str]]:
    """On each rank: names of the collectives in a forward, in its backward, and in a forward where no row counts."""
    student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    target = torch.zeros(8, dtype=torch.long)

    def during(run: Callable[[], Any]) -> tuple[Any, list[str]]:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            result = run()
        return result, [event.name for event in seen.events() or [] if event.name.startswith("c10d::")]

    def forward(target: Tensor) -> Any:
        return vocab_parallel_hybrid_loss(
            student, teacher, target, advantage=1.0, group=dist.group.WORLD, divergence=divergence
        )

    out, forwards = during(lambda: forward(target))
    _, backwards = during(out.loss.sum().backward)
    _, idle = during(lambda: forward(target - 100))
    return forwards, backwards, idle


def cross_entropy_shard(student: Tensor, target: Tensor) -> Tensor:
    """On each rank: the gradient without a teacher, the imitation weight left at its default."""
    logits = student.chunk(dist.get_world_size(), dim=1)[dist.get_rank()].clone().requires_grad_()
    out = vocab_parallel_hybrid_loss(logits, None, target, advantage=1.0, group=dist.group.WORLD)
    out.loss.sum().backward()
    assert logits.grad is not None
    return logits.grad


def norms_of_shard(case: Case, divergence: str) -> tuple[Tensor, Tensor]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    student, teacher = (case[f"{who}_logits"].float().chunk(ranks, dim=1)[rank] for who in ("student", "teacher"))
    return logit_gradient_norms(
        student,
        teacher,
        case["target"],
        case["imitation_weight"],
        case["advantage"],
        vocab_size=case["vocab_size"],
        group=dist.group.WORLD,
        divergence=divergence,
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("backend", [eager, compiled])
def test_a_shard_that_the_teacher_forbids_whole_has_an_infinite_cost_and_no_nan(backend: Any, temperature: float):
    student, teacher = torch.randn(3, 8), torch.full((3, 8), -torch.inf)
    shard = Shard(0, 8, 1 / temperature, 1 / temperature, None)
    stats = backend.shard_stats(
        student, teacher, Call(torch.zeros(3, dtype=torch.long), None, torch.Size([3]), shard, None)
    )
    assert (stats[:, 4] == torch.inf).all() and not stats.isnan().any()


@pytest.mark.parametrize("ranks", [2, 4])
def test_vocabulary_shards_give_the_whole_vocabularys_values_and_gradient(rank_pool: Pools, ranks: int):
    cases = load_cases() | extra_cases()
    shards = rank_pool(ranks).run(run_shards, cases)
    for name, case in cases.items():
        assert_close_to(case, whole_of(shards, "reverse_kl", name))


@pytest.mark.parametrize("ranks", [2, 4])
def test_vocabulary_shards_give_every_divergences_value_and_gradient(rank_pool: Pools, ranks: int):
    cases = load_cases() | extra_cases()
    shards = rank_pool(ranks).run(run_shards, cases, divergences=DIVERGENCES[1:])
    for divergence, name in shards[0]:
        expected = judged(cases[name], divergence=divergence, divergence_mix=0.3)
        got = whole_of(shards, divergence, name)
        torch.testing.assert_close(got["divergence"].double(), expected.divergence, rtol=1e-5, atol=2e-6)
        assert_close_to(cases[name] | {"grad": expected.gradient}, got)


@pytest.mark.parametrize("ranks", [2, 4])
def test_close_logits_keep_their_digits_across_shards(rank_pool: Pools, ranks: int):
    cases = {name: case for name, case in extra_cases().items() if "close" in name}
    for case in cases.values():
        case["advantage"] = torch.zeros_like(case["advantage"])  # the dense part alone, far smaller than the sparse one
    shards = rank_pool(ranks).run(run_shards, cases, divergences=DIVERGENCES)
    for divergence, name in shards[0]:
        expected = judged(cases[name], divergence=divergence, divergence_mix=0.3).dense
        error = (whole_of(shards, divergence, name)["grad"].double() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert error.max() < 1e-5  # the product's figure; a KL of 2e-6


def test_bf16_shards_are_within_one_rounding_of_one_shard(rank_pool: Pools):
    cases = load_cases()
    shards = rank_pool(2).run(run_shards, cases, torch.bfloat16, DIVERGENCES)
    for divergence, name in shards[0]:
        options = {"divergence": divergence, "divergence_mix": 0.3}
        whole = outputs_of(cases[name], dtype=torch.bfloat16, **options)["grad"].double()
        grad = whole_of(shards, divergence, name)["grad"].double()
        # two fp32 results that differ a little may round to neighbouring bf16 numbers, 2**-7 apart
        assert (grad - whole).abs().le(2**-7 * whole.abs() + 1e-5 * whole.norm(dim=-1, keepdim=True) + 2e-6).all()


@pytest.mark.parametrize(("divergence", "expected"), [("reverse_kl", 1), ("forward_kl", 2), ("jsd", 2)])
def test_one_collective_forward_two_for_another_divergence_and_none_backward(
    rank_pool: Pools, divergence: str, expected: int
):
    for forwards, backwards, idle in rank_pool(2).run(count_collectives, divergence):
        assert len(forwards) == expected and all("allgather" in name for name in forwards)
        assert backwards == [] and idle == []


def test_without_a_teacher_shards_give_the_cross_entropy_gradient(rank_pool: Pools):
    student, target = torch.randn(6, 16), torch.randint(0, 16, (6,))
    grad = torch.cat(rank_pool(2).run(cross_entropy_shard, student, target), dim=1)
    expected = torch.softmax(student, -1) - torch.nn.functional.one_hot(target, 16)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)  # both fp32


@pytest.mark.parametrize("divergence", ["reverse_kl", "skewed_kl"])
def test_gradient_norms_are_those_of_the_whole_vocabulary(rank_pool: Pools, divergence: str):
    case = extra_cases()["uneven"]
    expected = judged(case, divergence=divergence)
    for dense_sq, sparse_sq in rank_pool(2).run(norms_of_shard, case, divergence):
        torch.testing.assert_close(dense_sq.double(), expected.dense.square().sum(-1), rtol=1e-5, atol=1e-9)  # fp32
        torch.testing.assert_close(sparse_sq.double(), expected.sparse.square().sum(-1), rtol=1e-5, atol=1e-9)
