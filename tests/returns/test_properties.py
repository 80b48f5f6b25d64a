"""Cost-to-go over drawn rows, masks and packed layouts: the definition, where sums stop, and what cannot matter."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_hybrid.returns.returns_to_go import cost_to_go

BOUNDED = settings(derandomize=True, deadline=None, max_examples=100, database=None)
"""The same examples in every run; no deadline, because the first example pays for torch's start."""

DISCOUNTS = st.sampled_from((0.0, 1e-30, 0.3, 0.9, 0.999, 1.0))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Costs [b, s], mask, segments: lengths as packing gives them, ids that may come back after another one."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    segments = torch.zeros(rows, length, dtype=torch.long)
    for row in segments:
        lengths = torch.tensor(draw(st.lists(st.integers(1, 12), min_size=1, max_size=8)))
        ids = torch.tensor(draw(st.lists(st.integers(-1, 3), min_size=len(lengths), max_size=len(lengths))))
        packed = ids.repeat_interleave(lengths)[:length]
        row[: len(packed)] = packed
    mask = torch.rand(rows, length) < draw(st.sampled_from((0.0, 0.5, 1.0)))
    return torch.randn(rows, length), mask, segments


def double_loop(costs: Tensor, mask: Tensor, discount: float, segments: Tensor) -> Tensor:
    """The definition, float64: from each position on, until the id changes."""
    result = torch.zeros(costs.shape, dtype=torch.float64)
    for out, cost, counts, ids in zip(result, costs.tolist(), mask.tolist(), segments.tolist(), strict=True):
        for start in range(len(cost)):
            for t in range(start + 1, len(cost)):
                if ids[t] != ids[start]:
                    break
                out[start] += discount ** (t - start) * cost[t] * counts[t]
    return result


@BOUNDED
@given(layouts(), DISCOUNTS)
def test_cost_to_go_is_the_double_loop(layout: tuple[Tensor, Tensor, Tensor], discount: float):
    costs, mask, segments = layout
    expected = double_loop(costs, mask, discount, segments)
    got = cost_to_go(costs, mask, discount, segments)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)  # fp32 sums of up to 40 terms of size 1


@BOUNDED
@given(layouts(), DISCOUNTS, st.sampled_from((float("nan"), float("inf"), 1e30)))
def test_nothing_outside_a_segment_or_the_mask_can_reach_it(layout, discount: float, garbage: float):
    costs, mask, segments = layout
    expected = cost_to_go(costs, mask, discount, segments)
    poisoned = costs.clone()
    poisoned[~mask] = garbage
    assert torch.equal(cost_to_go(poisoned, mask, discount, segments), expected)
    last = torch.ones_like(mask)  # the last position of each segment
    last[:, :-1] = segments[:, 1:] != segments[:, :-1]
    assert expected[last].eq(0).all()
    first = torch.ones_like(mask)
    first[:, 1:] = last[:, :-1]
    poisoned = costs.masked_fill(first, garbage)  # a segment's first cost lies in nobody's future
    assert torch.equal(cost_to_go(poisoned, mask, discount, segments), expected)


@BOUNDED
@given(layouts(), DISCOUNTS)
def test_each_packed_sequence_gets_what_it_gets_alone(layout, discount: float):
    costs, mask, segments = layout
    packed = cost_to_go(costs, mask, discount, segments)
    for row in range(len(costs)):
        lengths = segments[row].unique_consecutive(return_counts=True)[1].tolist()
        alone = [
            cost_to_go(cost[None], counts[None], discount)[0]
            for cost, counts in zip(costs[row].split(lengths), mask[row].split(lengths), strict=True)
        ]
        torch.testing.assert_close(packed[row], torch.cat(alone), rtol=1e-5, atol=1e-6)  # fp32, other partial sums
