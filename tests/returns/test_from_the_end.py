"""Credit asked chunk by chunk from the last tokens is that of all tokens at once, for every kind that allows it."""

from typing import Any

import pytest
import torch

from megatron_hybrid.metrics import Metrics
from megatron_hybrid.records import TokenStats
from megatron_hybrid.returns.corrections import Correction
from megatron_hybrid.returns.weights import CreditAssignment, make_weigh

B, S = 6, 17


def problem(seed: int = 0, **change: Any) -> tuple[CreditAssignment, TokenStats]:
    """Ragged responses of two groups, tokens by position and then by row, as Megatron's flattened [s, b] has them."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(4, S + 1, (B,), generator=generator)
    mask = (torch.arange(S) >= 3) & (torch.arange(S) < ends[:, None])
    position, row = mask.T.nonzero(as_tuple=True)
    kl, log_p, log_q, log_mu = torch.rand(4, len(row), generator=generator).unbind(0)
    arguments: dict[str, Any] = {
        "reward_advantage": torch.randn(B, generator=generator),
        "row_of_token": row,
        "position_of_token": position,
        "num_positions": S,
        "discount": 0.9,
        "future_cost": "closed_form",
        "reward_weight": 1.5,
        "imitation_weight": 0.5,
        "group_id": torch.tensor([0, 0, 0, 1, 1, 1]),
        "sampled_logprobs": -log_mu,
    }
    return make_weigh(**arguments | change), TokenStats(kl, -log_p, -log_q, torch.zeros(len(row)))


def in_chunks(credit: CreditAssignment, stats: TokenStats, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    reverse, n = credit.from_the_end(), len(stats.kl)
    assert reverse is not None
    parts = []
    for start in reversed(range(0, n, size)):
        rows = slice(start, start + size)
        parts.append(reverse(TokenStats(*(value[rows] for value in vars(stats).values())), rows))
    imitation, advantage = (torch.cat(values) for values in zip(*reversed(parts), strict=True))
    return imitation, advantage


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"group_id": None},
        {"discount": 1.0},
        {"discount": 0.0},
        {"imitation_weight": 0.0},
        {"future_cost": "sampled"},
        {"sampled_logprobs": None},
        {"correction": Correction("token_truncate", 1.1)},
        {"correction": Correction("token_mask", 1.1)},
        {"correction": Correction("ppo_clip")},
    ],
    ids=str,
)
def test_chunks_from_the_end_give_the_weights_of_all_tokens_to_the_bit(change: dict[str, Any], size: int):
    credit, stats = problem(**change)
    # To the bit: costs that are still unknown are zeros in sums that nobody reads.
    for got, want in zip(in_chunks(credit, stats, size), credit(stats), strict=True):
        assert torch.equal(got, want)


def test_an_infinite_cost_stays_where_it_was():
    credit, stats = problem(group_id=None)
    stats.kl[len(stats.kl) // 2] = torch.inf
    assert torch.equal(in_chunks(credit, stats, 3)[1], credit(stats)[1])


def test_every_token_is_measured_once():
    metrics = {size: Metrics() for size in (3, 1000)}
    for size, collected in metrics.items():
        credit, stats = problem(metrics=collected)
        in_chunks(credit, stats, size)
    values = [collected.reduce() for collected in metrics.values()]
    assert values[0] == pytest.approx(values[1], rel=1e-12)  # sums of fp64 in another order


@pytest.mark.parametrize(
    "change",
    [{"correction": Correction("sequence_truncate")}, {"correction": Correction("none", prefix=True)}],
    ids=["the ratio of the response", "the ratio of the prefix"],
)
def test_weights_that_span_a_response_cannot_be_asked_from_the_end(change: dict[str, Any]):
    assert problem(**change)[0].from_the_end() is None
    assert problem(**change, sampled_logprobs=None)[0].from_the_end() is not None  # nothing is corrected


def can_reverse() -> bool:
    return problem(cp_group=torch.distributed.group.WORLD)[0].from_the_end() is not None


def test_nor_can_those_whose_later_tokens_are_on_another_rank(rank_pool):
    assert rank_pool(2).run(can_reverse) == [False, False]
    assert rank_pool(1).run(can_reverse) == [True]


def test_tokens_out_of_order_are_refused():
    credit, stats = problem()
    position = credit.tokens.position.flip(0)
    with pytest.raises(RuntimeError, match="positions do not ascend"):
        make_weigh(
            reward_advantage=torch.zeros(B),
            row_of_token=credit.tokens.row.flip(0),
            position_of_token=position,
            num_positions=S,
            discount=1.0,
            future_cost="closed_form",
            reward_weight=1.0,
            imitation_weight=1.0,
        ).from_the_end()
