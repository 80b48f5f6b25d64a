"""Importance weights by hand, at their extremes, and what is said about them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_hybrid.config import ROLLOUT_CORRECTIONS, HybridConfig
from megatron_hybrid.errors import ConfigError, ShapeError
from megatron_hybrid.metrics import MEANINGS, Metrics
from megatron_hybrid.records import TokenStats
from megatron_hybrid.returns.corrections import Correction, finish_metrics, log_ratios, sparse_weights
from megatron_hybrid.returns.weights import make_weigh

# Two responses, three tokens and two: ratios 4, 1/2, 1 (product 2) and 1/8, 1/2 (product 1/16).
RATIOS = torch.tensor([4.0, 0.5, 1.0, 0.125, 0.5])
LOG_PROB = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.5])
REWARD = torch.tensor([1.0, -1.0])


def weights(correction: Correction, *, ratios: Tensor = RATIOS, **change: Any) -> tuple[list[float], list[float]]:
    """(dense, sparse) weights of a credit whose unweighted ones are 1 and +1 +1 +1 -1 -1."""
    stats = TokenStats(torch.ones(5), LOG_PROB, LOG_PROB, torch.zeros(5))
    arguments = {
        "reward_advantage": REWARD,
        "row_of_token": torch.tensor([0, 0, 0, 1, 1]),
        "position_of_token": torch.tensor([2, 3, 5, 1, 3]),
        "num_positions": 6,
        "discount": 0.0,
        "future_cost": "closed_form",
        "reward_weight": 1.0,
        "imitation_weight": 1.0,
        "sampled_logprobs": LOG_PROB - ratios.log(),
        "correction": correction,
    }
    imitation, advantage = make_weigh(**(arguments | change))(stats)
    assert not imitation.requires_grad and not advantage.requires_grad
    return imitation.tolist(), advantage.tolist()


def close(expected: list[float]) -> Any:
    return pytest.approx(expected, rel=1e-6)  # log and exp in fp32


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", [1.0, 1.0, 1.0, -1.0, -1.0]),
        ("token_truncate", [3.0, 0.5, 1.0, -0.125, -0.5]),
        ("token_mask", [0.0, 0.5, 1.0, 0.0, -0.5]),
        ("sequence_truncate", [2.0, 2.0, 2.0, -0.0625, -0.0625]),
        ("sequence_mask", [2.0, 2.0, 2.0, 0.0, 0.0]),
        ("ppo_clip", [0.0, 0.5, 1.0, 0.0, 0.0]),  # both responses pushed further where they already went too far
    ],
)
def test_sparse_weights_by_hand(kind: str, expected: list[float]):
    dense, sparse = weights(Correction(kind, threshold=3.0))
    assert sparse == close(expected)
    assert dense == [1.0] * 5


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", [1.0, 3.0, 2.0, 1.0, 0.125]),  # 1, 4, 2 and 1, 1/8: the token itself is not in it
        ("token_truncate", [1.0, 3.0, 2.0, 1.0, 0.125]),
        ("sequence_mask", [1.0, 0.0, 2.0, 1.0, 0.0]),
    ],
)
def test_prefix_weights_by_hand(kind: str, expected: list[float]):
    assert weights(Correction(kind, threshold=3.0, prefix=True))[0] == close(expected)


def test_a_threshold_of_infinity_leaves_every_ratio():
    for kind in ("token_truncate", "token_mask"):
        assert weights(Correction(kind, math.inf))[1] == close([4.0, 0.5, 1.0, -0.125, -0.5])


@pytest.mark.parametrize("advantage", [2.0, -2.0, 0.0])
@pytest.mark.parametrize("log_ratio", [-1.0, -0.4, -0.1, 0.0, 0.1, 0.4, 1.0])
def test_ppo_clip_is_the_gradient_of_the_clipped_surrogate(advantage: float, log_ratio: float):
    log_prob = torch.tensor([log_ratio], requires_grad=True)
    ratio = log_prob.exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - 0.3, 1 + 0.25) * advantage)
    (expected,) = torch.autograd.grad(surrogate.sum(), log_prob)
    given = torch.tensor([advantage])
    weight = sparse_weights(Correction("ppo_clip", clip_low=0.3, clip_high=0.25), log_prob.detach(), given)
    torch.testing.assert_close(weight * given, expected)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("kind", ROLLOUT_CORRECTIONS)
def test_on_policy_no_correction_changes_a_bit(kind: str, prefix: bool):
    generator = torch.Generator().manual_seed(0)
    stats = TokenStats(*(-torch.rand(4, 7, generator=generator) * 30).unbind(0))
    arguments = {
        "reward_advantage": torch.randn(2, generator=generator),
        "row_of_token": torch.tensor([0, 0, 0, 0, 1, 1, 1]),
        "position_of_token": torch.tensor([1, 2, 3, 4, 1, 2, 4]),
        "num_positions": 5,
        "discount": 0.9,
        "future_cost": "sampled",
        "reward_weight": 0.3,
        "imitation_weight": 0.7,
        "group_id": torch.zeros(2, dtype=torch.long),
    }
    plain = make_weigh(**arguments)(stats)
    on_policy = make_weigh(
        **arguments, sampled_logprobs=stats.log_prob.clone(), correction=Correction(kind, prefix=prefix)
    )(stats)
    assert all(torch.equal(one, other) for one, other in zip(plain, on_policy, strict=True))


@pytest.mark.parametrize("kind", ROLLOUT_CORRECTIONS)
@pytest.mark.parametrize("threshold", [1.0, 2.0, math.inf])
def test_extreme_log_probs_give_finite_weights(kind: str, threshold: float):
    extremes = torch.tensor([torch.inf, torch.nan, -3e38, -3e38, -200.0])
    dense, sparse = weights(Correction(kind, threshold, prefix=True), sampled_logprobs=extremes)
    assert all(map(math.isfinite, dense + sparse))


def test_a_forbidden_token_among_improbable_ones_is_no_nan():
    extremes = torch.tensor([-3e38, -3e38, -1.0, -3e38, -3e38])
    forbidden = torch.tensor([-1.0, -1.0, -torch.inf, -1.0, -1.0])
    ratio, _ = log_ratios(forbidden, extremes)
    assert ratio.sum() == -torch.inf


def test_a_token_without_a_samplers_log_prob_counts_as_on_policy():
    nowhere = torch.tensor([torch.nan, torch.inf, -torch.inf, LOG_PROB[3], LOG_PROB[4] - math.log(2)])
    _, sparse = weights(Correction("token_truncate"), sampled_logprobs=nowhere)
    assert sparse == close([1.0, 1.0, 1.0, -1.0, -2.0])
    assert log_ratios(LOG_PROB, nowhere)[1].tolist() == [False, False, False, True, True]


@pytest.mark.parametrize("kind", [kind for kind in ROLLOUT_CORRECTIONS if kind not in ("none", "ppo_clip")])
def test_what_the_student_forbids_has_weight_zero(kind: str):
    forbidden = torch.tensor([-torch.inf])
    assert sparse_weights(Correction(kind), forbidden, torch.ones(1)).tolist() == [0.0]


def measured(correction: Correction, **change: Any) -> dict[str, float]:
    metrics = Metrics()
    weights(correction, metrics=metrics, **change)
    values = metrics.reduce()
    finish_metrics(values)
    return {name.removeprefix("rollout_corr/"): value for name, value in values.items()}


def test_the_mismatch_by_hand():
    values = measured(Correction("token_truncate", threshold=3.0))
    applied = [3.0, 0.5, 1.0, 0.125, 0.5]
    mean, square = sum(applied) / 5, sum(w * w for w in applied) / 5
    logs = RATIOS.log().tolist()
    expected = {
        "rollout_is_mean": mean,
        "rollout_is_max": 3.0,
        "rollout_is_min": 0.125,
        "rollout_is_eff_sample_size": mean**2 / square,
        "rollout_is_ratio_fraction_high": 1 / 5,
        "rollout_is_ratio_fraction_low": 1 / 5,
        "kl": -sum(logs) / 5,
        "k3_kl": (6.125 - 5 - sum(logs)) / 5,
        "unknown_fraction": 0.0,
    }
    assert values == pytest.approx(expected, rel=1e-6)  # log and exp in fp32


def test_without_a_correction_the_ratios_themselves_are_measured():
    values = measured(Correction("none", threshold=3.0))
    assert values["rollout_is_max"] == pytest.approx(4.0, rel=1e-6)
    assert values["rollout_is_mean"] == pytest.approx(6.125 / 5, rel=1e-6)


def test_what_is_dropped_is_counted():
    assert measured(Correction("token_mask", 3.0))["rollout_rs_masked_fraction"] == pytest.approx(2 / 5)
    assert measured(Correction("sequence_mask", 3.0))["rollout_rs_masked_fraction"] == pytest.approx(2 / 5)
    assert measured(Correction("sequence_truncate", 1.5))["rollout_is_ratio_fraction_high"] == pytest.approx(3 / 5)
    assert measured(Correction("ppo_clip"))["actor/pg_clipfrac"] == pytest.approx(3 / 5)
    lost = torch.tensor([torch.nan, *(LOG_PROB - RATIOS.log())[1:]])
    values = measured(Correction("none"), sampled_logprobs=lost)
    assert values["unknown_fraction"] == pytest.approx(1 / 5)
    assert values["kl"] == pytest.approx(-RATIOS[1:].log().mean().item(), rel=1e-6)  # of those that are known


@pytest.mark.parametrize("kind", ROLLOUT_CORRECTIONS)
def test_no_tokens_leave_the_same_names_and_every_name_has_a_meaning(kind: str):
    none = {name: torch.zeros(0, dtype=torch.long) for name in ("row_of_token", "position_of_token")}
    metrics = Metrics()
    credit = make_weigh(
        reward_advantage=REWARD,
        **none,
        num_positions=6,
        discount=1.0,
        future_cost="closed_form",
        reward_weight=1.0,
        imitation_weight=1.0,
        sampled_logprobs=torch.zeros(0),
        correction=Correction(kind, prefix=True),
        metrics=metrics,
    )
    assert [len(weight) for weight in credit(TokenStats(*torch.zeros(4, 0).unbind(0)))] == [0, 0]
    values = metrics.reduce()
    finish_metrics(values)
    some = measured(Correction(kind))
    assert {name.removeprefix("rollout_corr/") for name in values} == some.keys()
    for name in values:
        assert name in MEANINGS or name.rpartition("_")[0] in MEANINGS


def test_without_the_samplers_log_probs_nothing_is_corrected_or_measured():
    assert weights(Correction("sequence_truncate", prefix=True), sampled_logprobs=None) == (
        [1.0] * 5,
        [1.0, 1.0, 1.0, -1.0, -1.0],
    )
    assert measured(Correction("token_mask"), sampled_logprobs=None) == {}


def test_settings_come_from_the_config():
    config = HybridConfig(
        rollout_correction="ppo_clip",
        rollout_is_threshold=5.0,
        prefix_correction=True,
        clip_ratio_low=0.1,
        clip_ratio_high=0.3,
    )
    assert Correction.from_config(config) == Correction("ppo_clip", 5.0, True, 0.1, 0.3)


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="token_truncate"):
        Correction("clip")
    with pytest.raises(ShapeError, match="sampled_logprobs"):
        weights(Correction(), sampled_logprobs=torch.zeros(3))


@pytest.mark.parametrize("kind", ROLLOUT_CORRECTIONS)
def test_corrections_stay_on_the_device_and_read_nothing_back(kind: str):
    with FakeTensorMode():
        device = torch.device("cuda:0")
        credit = make_weigh(
            reward_advantage=torch.zeros(2, device=device),
            row_of_token=torch.zeros(5, dtype=torch.long, device=device),
            position_of_token=torch.zeros(5, dtype=torch.long, device=device),
            num_positions=6,
            discount=1.0,
            future_cost="closed_form",
            reward_weight=1.0,
            imitation_weight=1.0,
            sampled_logprobs=torch.zeros(5, device=device),
            correction=Correction(kind, prefix=True),
            metrics=Metrics(),
        )
        out = credit(TokenStats(*torch.zeros(4, 5, device=device).unbind(0)))
        assert all(weight.device == device and weight.dtype == torch.float32 for weight in out)
