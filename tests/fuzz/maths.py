"""Cost-to-go against its definition, and statistics of any cut of the vocabulary merged to those of the whole."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from megatron_hybrid.ops import eager, topk_passes
from megatron_hybrid.ops.call import Call, Shard
from megatron_hybrid.ops.function import merge_shards
from megatron_hybrid.returns.returns_to_go import cost_to_go
from tests.fuzz.targets import Target
from tests.ops.test_properties import STUDENTS, TEACHERS, draw_student, draw_teacher

SEEDS = st.integers(0, 2**32)
GARBAGE = (0.0, float("nan"), float("inf"), 3e38)


def double_loop(costs: list[float], counts: list[bool], discount: float, ids: list[int]) -> list[float]:
    """The definition, float64."""
    result = [0.0] * len(costs)
    for start in range(len(costs)):
        for t in range(start + 1, len(costs)):
            if ids[t] != ids[start]:
                break
            result[start] += discount ** (t - start) * costs[t] if counts[t] else 0.0
    return result


def check_cost_to_go(case: tuple[int, int, float, float, int]) -> None:
    number, length, discount, garbage, changes = case
    generator = torch.Generator().manual_seed(number)
    costs = torch.randn(1, length, generator=generator)
    mask = torch.rand(1, length, generator=generator) < 0.7
    ids = (torch.rand(1, length, generator=generator) * 10 < changes).cumsum(1) % 3
    costs[~mask] = garbage
    got = cost_to_go(costs, mask, discount, ids)
    expected = double_loop(costs[0].tolist(), mask[0].tolist(), discount, ids[0].tolist())
    # fp32 sums of up to 24 terms of size 1
    torch.testing.assert_close(got[0].double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def shards_of(target: Tensor, cuts: tuple[int, ...], v: int, temperatures: tuple[float, float]) -> list[Call]:
    """Calls of neighbouring ranges of columns, some of them empty."""
    bounds = [0, *sorted(cut % (v + 1) for cut in cuts), v]
    scales = [1 / temperature for temperature in temperatures]
    return [
        Call(target, None, target.shape, Shard(first, stop - first, *scales, None), None)
        for first, stop in pairwise(bounds)
    ]


def assert_same(parts: Any, whole: Any, size: float) -> None:
    """1e-6: a few roundings of fp32, of terms as large as the logits' differences."""
    for name in ("kl", "log_prob", "teacher_log_prob", "entropy"):
        one, other = getattr(parts, name), getattr(whole, name)
        same = torch.isclose(one, other, rtol=1e-5, atol=2e-6 * (1 + size)) | (one == other)
        if name == "teacher_log_prob":  # a bucket's is shared out as the student shares it: not where fp32 gives it 0
            same |= whole.log_prob < -80
        assert same.all(), (name, one, other)


def check_merge(case: tuple[int, str, str, int, tuple[int, ...], tuple[float, float]]) -> None:
    number, kind, teacher_kind, v, cuts, temperatures = case
    torch.manual_seed(number)
    student = draw_student(kind, 2, v)
    teacher = draw_teacher(teacher_kind, student)
    target = torch.randint(0, v, (2,)) // 2 * 2  # an even column: no kind of student forbids it
    calls, whole = shards_of(target, cuts, v, temperatures), shards_of(target, (), v, temperatures)

    def merged(calls: list[Call]) -> Any:
        columns = [slice(call.shard.first, call.shard.first + max(call.shard.width, 1)) for call in calls]
        stats = [eager.shard_stats(student[:, c], teacher[:, c], call) for c, call in zip(columns, calls, strict=True)]
        return merge_shards(torch.stack(stats), calls[0].shard, has_teacher=True).stats

    finite = [logits[logits.isfinite()].abs().max().item() for logits in (student, teacher)]
    assert_same(merged(calls), merged(whole), max(finite) / min(temperatures))


def check_topk_merge(case: tuple[int, str, str, int, int, tuple[int, ...], float]) -> None:
    number, kind, teacher_kind, v, k, cuts, temperature = case
    torch.manual_seed(number)
    student = draw_student(kind, 2, v)
    log_probs, ids = torch.log_softmax(draw_teacher(teacher_kind, student).double(), dim=-1).topk(min(k, v))
    ids[log_probs.isneginf()] = -1
    target = torch.randint(0, v, (2,)) // 2 * 2
    calls = shards_of(target, cuts, v, (temperature, 1.0))
    whole = shards_of(target, (), v, (temperature, 1.0))

    def merged(calls: list[Call]) -> Any:
        slots = topk_passes.read_slots(ids, log_probs, calls[0], v=v, rest_floor=topk_passes.REST_FLOOR)
        stats = []
        for call in calls:
            columns = student[:, call.shard.first : call.shard.first + max(call.shard.width, 1)]
            stats.append(topk_passes.shard_stats(columns, slots, call))
        return topk_passes.merge_shards(torch.stack(stats), slots, calls[0]).stats

    size = student[student.isfinite()].abs().max().item() / temperature
    parts, one = merged(calls), merged(whole)
    assert_same(parts, one, size)
    assert not parts.kl.isnan().any() and (parts.kl >= -1e-6 * (1 + size)).all()


VOCABULARIES, CUTS = st.integers(2, 40), st.lists(st.integers(0, 40), max_size=3).map(tuple)
TEMPERATURES = st.sampled_from((1.0, 0.6, 2.5))
TARGETS = {
    "cost-to-go": Target(
        st.tuples(
            SEEDS,
            st.integers(1, 24),
            st.sampled_from((0.0, 1e-30, 0.3, 0.999, 1.0)),
            st.sampled_from(GARBAGE),
            st.sampled_from((0, 2, 10)),
        ),
        check_cost_to_go,
    ),
    "merge of shards": Target(
        st.tuples(
            SEEDS,
            st.sampled_from(STUDENTS),
            st.sampled_from(TEACHERS),
            VOCABULARIES,
            CUTS,
            st.tuples(TEMPERATURES, TEMPERATURES),
        ),
        check_merge,
    ),
    "merge of top k and bucket": Target(
        st.tuples(
            SEEDS,
            st.sampled_from(STUDENTS),
            st.sampled_from(TEACHERS),
            VOCABULARIES,
            st.integers(0, 40),
            CUTS,
            TEMPERATURES,
        ),
        check_topk_merge,
    ),
}
