"""Cost-to-go: by hand, against a plain double loop, and where sums must stop."""

import pytest
import torch
from torch import Tensor

from megatron_hybrid.errors import ConfigError, ShapeError
from megatron_hybrid.returns.returns_to_go import cost_to_go


def loop(costs: Tensor, mask: Tensor, discount: float, segments: Tensor) -> Tensor:
    """The definition, one addition at a time, float64."""
    out = torch.zeros(costs.shape, dtype=torch.float64)
    for b, row in enumerate(costs.double()):
        for t in range(len(row)):
            for later in range(t + 1, len(row)):
                if segments[b, later] != segments[b, later - 1]:
                    break
                out[b, t] += discount ** (later - t) * (row[later] if mask[b, later] else 0)
    return out


def everywhere(costs: Tensor) -> Tensor:
    return torch.ones_like(costs, dtype=torch.bool)


def test_cost_to_go_by_hand():
    costs = torch.tensor([[1.0, 2.0, 4.0]])
    assert cost_to_go(costs, everywhere(costs), 0.5).tolist() == [[2.0, 2.0, 0.0]]  # 2/2 + 4/4, 4/2, nothing


def test_discount_one_sums_the_strict_future_and_zero_gives_zero():
    costs = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    assert cost_to_go(costs, everywhere(costs), 1.0).tolist() == [[14.0, 12.0, 8.0, 0.0]]
    assert cost_to_go(torch.full_like(costs, torch.inf), everywhere(costs), 0.0).tolist() == [[0.0] * 4]


def test_masked_positions_cost_nothing_but_count_as_distance():
    costs, mask = torch.tensor([[torch.nan, torch.inf, 4.0]]), torch.tensor([[False, False, True]])
    assert cost_to_go(costs, mask, 0.5).tolist() == [[1.0, 2.0, 0.0]]


def test_sums_stop_at_packed_boundaries_even_where_an_id_comes_back():
    costs = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]])
    segments = torch.tensor([[7, 7, 3, 7, 7]])
    assert cost_to_go(costs, everywhere(costs), 1.0, segments).tolist() == [[2.0, 0.0, 0.0, 16.0, 0.0]]


@pytest.mark.parametrize("discount", [0.01, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("length", [1, 2, 3, 17, 64])
def test_scan_equals_the_double_loop(discount: float, length: int):
    costs, mask = torch.randn(3, length), torch.rand(3, length) < 0.7
    segments = (torch.rand(3, length) < 0.2).cumsum(1)
    for ids in (segments, torch.zeros_like(segments)):
        # fp32 sums of up to 64 terms of size 1
        torch.testing.assert_close(
            cost_to_go(costs, mask, discount, ids).double(), loop(costs, mask, discount, ids), rtol=1e-5, atol=1e-5
        )
    assert torch.equal(cost_to_go(costs, mask, discount), cost_to_go(costs, mask, discount, torch.zeros_like(segments)))


@pytest.mark.parametrize("discount", [1e-30, 0.001, 0.9])
def test_long_rows_and_small_discounts_stay_finite(discount: float):
    costs = torch.ones(1, 5000)
    result = cost_to_go(costs, everywhere(costs), discount)
    assert result[0, 0].item() == pytest.approx(discount / (1 - discount), rel=1e-5)  # the geometric series


def test_an_infinite_cost_is_infinite_before_it_and_never_nan():
    costs = torch.zeros(1, 300)
    costs[0, 290] = torch.inf  # 256 after others: 0.5**256 is 0 in fp32
    result = cost_to_go(costs, everywhere(costs), 0.5)
    assert result[0, 289] == torch.inf and not result.isnan().any() and result[0, 290:].eq(0).all()


def test_costs_are_constants_to_autograd():
    costs = torch.ones(1, 3, requires_grad=True)
    assert not cost_to_go(costs, everywhere(costs), 1.0).requires_grad


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"costs": torch.zeros(3)}, ShapeError),
        ({"mask": torch.ones(2, 3)}, ShapeError),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, ShapeError),
        ({"segments": torch.zeros(2, 3)}, ShapeError),
        ({"segments": torch.zeros(2, 4, dtype=torch.long)}, ShapeError),
        ({"discount": 1.1}, ConfigError),
        ({"discount": float("nan")}, ConfigError),
    ],
)
def test_a_mistake_is_named(change, error):
    arguments = {"costs": torch.zeros(2, 3), "mask": torch.ones(2, 3, dtype=torch.bool), "discount": 1.0}
    with pytest.raises(error):
        cost_to_go(**(arguments | change))
