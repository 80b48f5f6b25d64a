"""The one divisor: what a micro-batch adds to the global count and what share of its sequence a token has."""

from __future__ import annotations

import pytest
import torch

from megatron_hybrid.config import AGGREGATIONS
from megatron_hybrid.errors import ConfigError
from megatron_hybrid.schedule.normalise import normaliser

# Lengths 2, 0 and 4.
MASK = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize(
    ("aggregation", "count", "scale"),
    [
        ("seq-mean-token-sum", 2, [1.0, 1.0, 1.0]),
        ("token-mean", 6, [1.0, 1.0, 1.0]),
        ("seq-mean-token-mean", 2, [0.5, 1.0, 0.25]),
    ],
)
def test_counts_and_scales_by_hand(aggregation, count, scale):
    got_count, got_scale = normaliser(MASK, aggregation)
    assert got_count.item() == count
    assert got_scale.tolist() == scale


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_every_aggregation_of_the_settings_has_a_normaliser_of_megatrons_types(aggregation):
    count, scale = normaliser(MASK, aggregation)
    assert count.dtype == torch.int32 and count.shape == ()
    assert scale.dtype == torch.float32 and scale.shape == (3,)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_counts_of_parts_add_up_and_scales_do_not_depend_on_the_neighbours(aggregation):
    whole, scale = normaliser(MASK, aggregation)
    parts = [normaliser(MASK[row : row + 1], aggregation) for row in range(3)]
    assert whole.item() == sum(count.item() for count, _ in parts)
    assert torch.equal(scale, torch.cat([s for _, s in parts]))


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("seq-mean-token-sum", (1 + 1 + 2 + 2 + 2 + 2) / 2),
        ("token-mean", (1 + 1 + 2 + 2 + 2 + 2) / 6),
        ("seq-mean-token-mean", (1 + 2) / 2),
    ],
)
def test_the_name_says_which_mean_it_is(aggregation, expected):
    token_loss = torch.tensor([[1.0], [5.0], [2.0]], dtype=torch.float64).expand(3, 5)
    count, scale = normaliser(MASK, aggregation)
    assert ((token_loss * scale[:, None])[MASK].sum() / count).item() == expected


def test_an_unknown_aggregation_is_refused_by_name():
    with pytest.raises(ConfigError, match="'token_mean' has no normaliser: see AGGREGATIONS"):
        normaliser(MASK, "token_mean")
