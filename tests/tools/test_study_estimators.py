"""Others' formulas by hand, and that the parts of the product's own credit add up."""

import sys
from pathlib import Path

import pytest
import torch
from torch import tensor

from megatron_hybrid.records import HybridMicrobatch, ModelInput, Prompt, RolloutBatch, TokenStats
from megatron_hybrid.schedule.microbatch import imitation_alone as no_credit
from megatron_hybrid.train.credit import Scored

sys.path.append(str(Path(__file__).parents[2] / "tools"))

from study_estimators import (
    ESTIMATORS,
    OURS,
    Others,
    credit_of,
    imitation_alone,
    product,
    reward_alone,
    weighted_advantages,
)  # noqa: E402

# Two responses to one prompt token: three tokens and two. Positions ascend, as in the flattened [s, b].
SEQUENCE, POSITION = tensor([0, 1, 0, 1, 0]), tensor([1, 1, 2, 2, 3])
COST = tensor([0.5, -1.0, 1.0, 2.0, -0.25])
KL = tensor([0.4, 0.3, 0.2, 0.6, 0.1])
REWARDS = tensor([1.0, 0.0])


def scored():
    mask = tensor([[False, True, True, True], [False, True, True, False]])
    return Scored(
        RolloutBatch(
            prompts=(Prompt(0, (1,), "", ""),) * 2,
            tokens=torch.ones(2, 4, dtype=torch.long),
            response_mask=mask,
            sampled_logprobs=None,
            group_id=tensor([0, 0]),
            truncated=(False, False),
            responses=("", ""),
            temperature=1.0,
            policy_version=0,
            seed=0,
        ),
        rewards=REWARDS,
    )


def weights(source):
    nothing = ModelInput(torch.ones(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), POSITION)
    batch = HybridMicrobatch(
        student=nothing,
        teacher_input=nothing,
        sequence_of_token=SEQUENCE,
        position_of_token=POSITION,
        prompts=scored().rollouts.prompts,
        targets=POSITION,
        weigh=no_credit,
        token_scale=torch.ones(5),
        count=tensor(2),
        sampled_logprobs=None,
    )
    stats = TokenStats(kl=KL, log_prob=COST - 3, teacher_log_prob=torch.full((5,), -3.0), entropy=KL)
    return credit_of(source, scored())(slice(0, 2), batch)(stats)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        # Costs of the responses: 1.25 and 1. One action: total 2 * 1 - 1.25 and -1.
        (Others("kl_in_reward", reward_weight=2), [0.75, -1, 0.75, -1, 0.75]),
        (Others("kl_in_reward", reward_weight=2, baseline="rloo"), [1.75, -1.75, 1.75, -1.75, 1.75]),
        # What is still to come, its own cost included: 0.5 + (1 - 0.25 / 2) / 2 = 0.9375, and so on.
        (Others("kl_to_go", discount=0.5), [-0.9375, 0.0, -0.875, -2.0, 0.25]),
        (Others("kl_to_go", discount=0.0), [-0.5, 1.0, -1.0, -2.0, 0.25]),
        # To go 1.25, 0.75, -0.25 and 1, 2; each minus the other's at its position, 0 where that one has ended.
        (Others("kl_to_go", cost_baseline="group"), [-0.25, 0.25, 1.25, -1.25, 0.25]),
    ],
)
def test_an_advantage_by_hand(source, expected):
    imitation, advantage = weights(source)
    assert imitation.tolist() == [0] * 5, "no dense term"
    assert advantage.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_weighted_baseline_leaves_its_own_reward_out():
    groups, rewards = tensor([0, 0, 0, 1, 1]), tensor([1.0, 2.0, 4.0, 0.0, 3.0])
    found = weighted_advantages(rewards, groups, tensor([1.0, 3.0, 1.0, 0.0, 0.0]))
    expected = [1 - (3 * 2 + 4) / 4, 2 - (1 + 4) / 2, 4 - (1 + 3 * 2) / 4, 0 - 3, 3 - 0]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    advantage = weights(Others("weighted", reward_weight=2))[1]
    assert advantage.tolist() == pytest.approx([2.0, -2.0, 2.0, -2.0, 2.0], abs=1e-5)  # of two, the other one


def test_the_k3_penalty_has_the_gradient_of_its_formula():
    log_prob = (COST - 3).requires_grad_()
    log_ratio = -3.0 - log_prob
    (gradient,) = torch.autograd.grad((log_ratio.exp() - log_ratio - 1).sum(), log_prob)
    _, advantage = weights(Others("k3_loss"))
    torch.testing.assert_close(-advantage, gradient)


def test_the_products_parts_add_up_to_its_whole_credit():
    whole = weights(product(reward_weight=0.7, imitation_weight=0.3, discount=0.9, baseline="rloo"))
    reward, imitation = weights(reward_alone("rloo")), weights(imitation_alone(0.9, cost_baseline="group"))
    for of_whole, of_reward, of_imitation in zip(whole, reward, imitation, strict=True):
        torch.testing.assert_close(of_whole, 0.7 * of_reward + 0.3 * of_imitation)
    assert ESTIMATORS[OURS].of(0.7, 0.9) == {"reward, rloo": 0.7, "closed, group 0.9": 1}


def test_to_go_is_the_immediate_cost_and_the_sampled_future():
    coefficients = ESTIMATORS["KL to go in the reward, RLOO"].of(0.5, 1.0)
    sources = {
        "reward, rloo": reward_alone("rloo"),
        "kl now": Others("kl_to_go", discount=0.0),
        "sampled 1": imitation_alone(1.0, "sampled"),
        "dense": imitation_alone(0.0),
    }
    imitation, advantage = (
        sum(value * weights(sources[name])[k] for name, value in coefficients.items()) for k in range(2)
    )
    _, expected = weights(Others("kl_to_go", reward_weight=0.5, baseline="rloo"))
    assert imitation.tolist() == [0] * 5
    # The reward's own baseline is RLOO, the KL has none: the formula with both, less what is no baseline's.
    torch.testing.assert_close(advantage, expected)
