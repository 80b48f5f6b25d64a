"""Settings that change over training: by hand at the ends and in between."""

import pytest

from megatron_hybrid.annealing import annealed
from megatron_hybrid.config import HybridConfig
from megatron_hybrid.errors import ConfigError


def values(text: str, steps: list[int], value: float = 2.0) -> list[float]:
    setting = annealed("reward_weight", text, value)
    return [setting.at(step) for step in steps]


def test_a_constant_is_the_setting_itself():
    assert values("constant", [0, 7, 10**9]) == [2.0, 2.0, 2.0]


def test_a_line_goes_from_its_start_to_the_setting_and_stays_there():
    assert values("linear:0:4", [0, 1, 2, 4, 5, 10**9]) == [0.0, 0.5, 1.0, 2.0, 2.0, 2.0]
    assert values("linear:3:2", [0, 1, 2]) == [3.0, 2.5, 2.0]


def test_a_cosine_is_slow_fast_slow():
    assert values("cosine:0:4", [0, 1, 2, 3, 4]) == pytest.approx([0.0, 0.2928932, 1.0, 1.7071068, 2.0], abs=1e-7)


def test_stairs_are_the_setting_first_and_then_each_value_from_its_step_on():
    assert values("steps:0.5@10,3@20", [0, 9, 10, 19, 20, 10**9]) == [2.0, 2.0, 0.5, 0.5, 3.0, 3.0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("linear", "linear:FROM:STEPS"),
        ("linear:1", "cannot be read"),
        ("linear:a:3", "cannot be read"),
        ("cosine:1:0", "0 steps are too few"),
        ("steps:1@5,2@5", "steps must rise"),
        ("steps:1@-5", "steps must rise from 0 on"),
        ("ramp:1:5", "has no shape"),
        ("", "has no shape"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_setting(text: str, words: str):
    with pytest.raises(ConfigError, match=rf"^discount_schedule .*{words}"):
        annealed("discount", text, 1.0)


def test_a_config_knows_its_weights_at_each_step():
    config = HybridConfig(
        reward_weight=2.0, reward_weight_schedule="linear:0:10", discount=0.9, discount_schedule="steps:0.5@5"
    )
    assert (config.at(0).reward_weight, config.at(0).discount, config.at(0).imitation_weight) == (0.0, 0.9, 1.0)
    assert (config.at(5).reward_weight, config.at(5).discount) == (1.0, 0.5)
    assert config.at(99).reward_weight == 2.0
    assert config.at(5).at(77) == config.at(5), "settings of a step have no schedule left"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reward_weight_schedule": "linear:-1:10"}, "reward_weight must be a finite number >= 0, got -1.0"),
        ({"discount_schedule": "steps:1.5@10"}, r"discount \(gamma\) must lie in \[0, 1\], got 1.5"),
        (
            {"imitation_weight_schedule": "steps:0@10", "reward_weight_schedule": "steps:0@20"},
            "both 0 from step 20 on, so there is nothing to learn",
        ),
        (
            {"divergence": "jsd", "discount": 0.0, "discount_schedule": "steps:1@5"},
            r"one-step loss.*discount \(1.0 from step 5 on\)",
        ),
        ({"reward_weight_schedule": "steps:-1@ 100,1@200"}, "reward_weight must be a finite number >= 0, got -1.0"),
        ({"reward_weight_schedule": "steps:-1@1_00,1@200"}, "reward_weight must be a finite number >= 0, got -1.0"),
    ],
)
def test_a_schedule_is_validated_over_all_of_training(settings, words):
    with pytest.raises(ConfigError, match=words):
        HybridConfig(**settings)


def test_a_schedule_may_start_where_the_setting_alone_could_not():
    assert HybridConfig(reward_weight=0.0, imitation_weight=0.0, reward_weight_schedule="steps:1@0").at(0).reward_weight
