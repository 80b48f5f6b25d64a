"""The credit of two short responses, every number by hand."""

import pytest
import torch

from megatron_hybrid.errors import ConfigError, ShapeError
from megatron_hybrid.records import TokenStats
from megatron_hybrid.returns.weights import make_weigh

# Two responses: tokens at positions 2, 3, 4 of row 0 and 1, 3 of row 1 (position 2 is not a response token).
ROWS, POSITIONS = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([2, 3, 4, 1, 3])
STATS = TokenStats(
    kl=torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]),
    log_prob=torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0]),
    teacher_log_prob=torch.tensor([-2.0, -4.0, 0.0, -1.0, -9.0]),
    entropy=torch.zeros(5),
)


def credit(**change):
    arguments = {
        "reward_advantage": torch.tensor([10.0, -10.0]),
        "row_of_token": ROWS,
        "position_of_token": POSITIONS,
        "num_positions": 6,
        "discount": 0.5,
        "future_cost": "closed_form",
        "reward_weight": 1.0,
        "imitation_weight": 1.0,
    }
    return make_weigh(**(arguments | change))


def test_closed_form_advantages_by_hand():
    imitation, advantage = credit()(STATS)
    # futures: 2/2 + 4/4, 4/2, 0 and 16/4 (two positions on), 0
    assert advantage.tolist() == [10 - 2, 10 - 2, 10, -10 - 4, -10]
    assert imitation.tolist() == [1.0] * 5


def test_sampled_advantages_by_hand():
    # costs log pi - log q: 1, 3, -1 and 0, 8
    _, advantage = credit(future_cost="sampled", discount=1.0)(STATS)
    assert advantage.tolist() == [10 - 2, 10 + 1, 10, -10 - 8, -10]


def test_the_immediate_cost_is_not_in_the_advantage():
    dearer = TokenStats(STATS.kl + torch.tensor([100.0, 0, 0, 100.0, 0]), *list(vars(STATS).values())[1:])
    assert torch.equal(credit().advantage(STATS), credit().advantage(dearer))


def test_weights_multiply_their_terms():
    imitation, advantage = credit(reward_weight=3.0, imitation_weight=2.0)(STATS)
    assert advantage.tolist() == [30 - 4, 30 - 4, 30, -30 - 8, -30]
    assert imitation.tolist() == [2.0] * 5


def test_a_response_has_its_own_share_of_the_imitation_weight():
    imitation, advantage = credit(imitation_weight=2.0, imitation_share=torch.tensor([1.0, 0.25]))(STATS)
    assert imitation.tolist() == [2.0] * 3 + [0.5] * 2
    assert advantage.tolist() == [10 - 4, 10 - 4, 10, -10 - 0.5 * 4, -10]
    assert torch.equal(credit(imitation_share=torch.zeros(2)).advantage(STATS), credit(imitation_weight=0.0)(STATS)[1])


def test_from_the_end_shares_are_the_same():
    whole = credit(imitation_share=torch.tensor([1.0, 0.25]))
    order = torch.tensor([3, 0, 1, 4, 2])  # positions ascend
    stats = TokenStats(*(value[order] for value in vars(STATS).values()))
    sorted_ = credit(
        imitation_share=torch.tensor([1.0, 0.25]), row_of_token=ROWS[order], position_of_token=POSITIONS[order]
    )
    ask = sorted_.from_the_end()
    assert ask is not None
    late = ask(TokenStats(*(value[3:] for value in vars(stats).values())), slice(3, 5))
    early = ask(TokenStats(*(value[:3] for value in vars(stats).values())), slice(0, 3))
    for found, expected in zip(zip(early, late, strict=True), whole(STATS), strict=True):
        assert torch.equal(torch.cat(found), expected[order])


def test_no_discounted_future_leaves_the_reward():
    assert credit(discount=0.0)(STATS)[1].tolist() == [10.0, 10.0, 10.0, -10.0, -10.0]


def test_no_imitation_ignores_an_infinite_cost():
    stats = TokenStats(STATS.kl + torch.inf, *list(vars(STATS).values())[1:])
    assert credit(imitation_weight=0.0)(stats)[1].tolist() == [10.0, 10.0, 10.0, -10.0, -10.0]


def test_weights_are_detached():
    stats = TokenStats(STATS.kl.clone().requires_grad_(), *list(vars(STATS).values())[1:])
    assert not any(weight.requires_grad for weight in credit()(stats))


def test_a_mistake_is_named():
    with pytest.raises(ConfigError, match="closed_form, sampled"):
        credit(future_cost="guess")
    with pytest.raises(ShapeError, match="position_of_token"):
        credit(position_of_token=POSITIONS[:3])
    with pytest.raises(ShapeError, match="imitation_share"):
        credit(imitation_share=torch.ones(5))
    with pytest.raises(ShapeError, match="5"):
        credit()(TokenStats(*(value[:3] for value in vars(STATS).values())))


def test_an_infinite_cost_ahead_leaves_the_reward_and_no_nan():
    kl = STATS.kl.clone()
    kl[2] = torch.inf  # the last token of the first response
    _, advantage = credit()(TokenStats(kl, *list(vars(STATS).values())[1:]))
    assert advantage[:3].tolist() == [10.0, 10.0, 10.0]
    _, grouped = credit(group_id=torch.zeros(2, dtype=torch.long))(TokenStats(kl, *list(vars(STATS).values())[1:]))
    assert grouped.isfinite().all()
