"""Every setting is a flag with the setting's own default, beside Megatron's flags and inert without --hybrid."""

from __future__ import annotations

import argparse
import re
from dataclasses import Field, fields
from typing import Any

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_hybrid.cli.arguments import add_hybrid_args, hybrid_config_from_args
from megatron_hybrid.config import HybridConfig
from megatron_hybrid.errors import ConfigError
from megatron_hybrid.online_config import OnlineConfig

SETTINGS = [(config, f) for config in (HybridConfig, OnlineConfig) for f in fields(config)]
every_setting = pytest.mark.parametrize(("config", "field"), SETTINGS, ids=[f.name for _, f in SETTINGS])

# Valid together with all other defaults, and no setting's own default.
OTHER: dict[str, Any] = {
    "reward_weight": 0.25,
    "imitation_weight": 0.0,
    "discount": 0.5,
    "future_cost": "sampled",
    "baseline": "none",
    "cost_baseline": "none",
    "group_size": 7,
    "aggregation": "token-mean",
    "student_temperature": 0.7,
    "teacher_temperature": 1.3,
    "teacher_logit_floor": -50.5,
    "pretraining_microbatches": 2,
    "pretraining_weight": 0.25,
    "prompts": "reasoning_gym:chain_sum",
    "rollouts": "written down.parquet",
    "teacher_store": "/answers",
    "max_prompt_length": 9,
    "long_prompts": "drop",
    "on_bad_record": "skip",
    "allow_http": True,
    "eval_prompts": "held out.jsonl",
    "system_prompt": "",
    "max_response_length": 5,
    "rollout_batch_size": 6,
    "teacher_load": "/a/teacher",
    "run_dir": "runs/other",
    "samples_interval": 3,
    "reward": "0.5*by_source,1*exact_match",
    "teacher_server": "https://teacher:8000",
    "rollout_server": "https://rollouts",
    "rollout_sync_interval": 4,
    "rollout_sync_dir": "/shared",
    "server_api": "sglang",
    "server_requests": 5,
    "server_timeout": 7.5,
    "server_retries": 1,
    "file_reward": "math_answer",
    "on_failed_reward": "drop",
    "on_failed_rollout": "drop",
    "reward_workers": 3,
    "reward_timeout": 2.5,
    "reward_memory": float("inf"),
    "allow_code_execution": True,
    "truncated_reward": -0.5,
    "gradient_norms_interval": 4,
    "nonfinite_steps": 0,
    "allow_other_inputs": True,
    "backend": "compile",
    "lm_head": "logits",
    "lm_head_chunk_size": 100,
    "divergence": "jsd",
    "divergence_mix": 0.25,
    "baseline_decay": 0.5,
    "imitation_filter": "task",
    "imitation_filter_floor": 0.0,
    "imitation_filter_decay": 0.5,
    "rollout_correction": "ppo_clip",
    "rollout_is_threshold": float("inf"),
    "prefix_correction": True,
    "clip_ratio_low": 0.1,
    "clip_ratio_high": 0.3,
    "mini_batches": 2,
    "ppo_epochs": 3,
    "reward_weight_schedule": "linear:0:10",
    "imitation_weight_schedule": "cosine:2:10",
    "discount_schedule": "steps:0.5@10,0.9@20",
    "teacher_payload": "topk",
    "teacher_topk": 8,
    "pack_sequences": True,
    "teacher_ema_decay": 0.99,
    "teacher_refresh_interval": 5,
    "teacher_hint": "The answer is {answer}.",
}


NEEDS: dict[str, dict[str, Any]] = {
    "pretraining_weight": {"pretraining_microbatches": 1},
    "teacher_store": {"rollouts": "a.jsonl"},
    "divergence": {"discount": 0.0},
    "teacher_ema_decay": {"teacher_load": "self"},
    "teacher_refresh_interval": {"teacher_load": "self"},
    "allow_code_execution": {"reward": "python_tests"},
    "on_failed_rollout": {"rollout_server": "https://a"},
    "rollout_sync_interval": {"rollout_server": "https://a"},
    "rollout_sync_dir": {"rollout_server": "https://a", "rollout_sync_interval": 2},
}
"""Settings that only go with others."""


def flag(field: Field[Any]) -> str:
    return "--hybrid-" + field.name.replace("_", "-")


def words(name: str, value: Any) -> list[str]:
    """A setting as the command line has it; a switch has no value."""
    return ["--hybrid-" + name.replace("_", "-"), *([] if value is True else [str(value)])]


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--calculate-per-token-loss", action="store_true")  # Megatron's
    return add_hybrid_args(parser).parse_args(argv)


@every_setting
def test_a_flag_has_the_default_of_its_field(config, field):
    args = parse()
    assert getattr(args, f"hybrid_{field.name}") == field.default
    assert getattr(config.from_args(args), field.name) == field.default


@every_setting
def test_a_flag_round_trips_and_touches_no_other_setting(config, field):
    if field.metadata["choices"] is not None and len(field.metadata["choices"]) == 1:
        pytest.skip("one choice only")
    value = OTHER[field.name]
    assert value != field.default
    needs = NEEDS.get(field.name, {})
    argv = [word for name, given in (needs | {field.name: value}).items() for word in words(name, given)]
    given = config.from_args(parse("--hybrid", *argv))
    assert given == config(**needs, **{field.name: value})
    # An equal float of another type would slip through the line above.
    assert type(getattr(given, field.name)) is type(value)


def test_settings_of_both_kinds_have_different_names():
    names = [f.name for _, f in SETTINGS]
    assert len(set(names)) == len(names)


def test_a_choice_that_does_not_exist_is_refused_by_the_parser(capsys):
    with pytest.raises(SystemExit):
        parse("--hybrid-baseline", "rlo")
    told = capsys.readouterr().err
    assert all(name in told for name in ("none", "rloo", "grpo"))


def test_hybrid_brings_the_global_normaliser():
    assert parse("--hybrid").calculate_per_token_loss is True
    assert parse("--hybrid").hybrid is True


def test_without_hybrid_megatrons_own_setting_stays():
    assert parse("--hybrid-discount", "0.5").calculate_per_token_loss is False
    assert parse("--calculate-per-token-loss").calculate_per_token_loss is True
    assert parse().hybrid is False


def test_without_hybrid_there_is_no_method_and_nothing_is_validated():
    assert hybrid_config_from_args(parse("--hybrid-discount", "7")) is None
    assert hybrid_config_from_args(argparse.Namespace()) is None


def test_with_hybrid_the_method_is_read_and_validated():
    config = hybrid_config_from_args(parse("--hybrid", "--hybrid-discount", "0.5"))
    assert config == HybridConfig(discount=0.5)
    with pytest.raises(ConfigError, match=r"discount \(gamma\) must lie in \[0, 1\], got 7"):
        hybrid_config_from_args(parse("--hybrid", "--hybrid-discount", "7"))


@pytest.fixture(scope="module")
def whole_parser():
    # argparse itself raises where two flags have one name.
    return add_hybrid_args(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def test_no_flag_collides_with_megatrons(whole_parser):
    flags = [option for action in whole_parser._actions for option in action.option_strings]
    ours = {"--hybrid"} | {flag(f) for _, f in SETTINGS}
    assert ours <= set(flags)
    assert len(set(flags)) == len(flags)


def test_no_destination_is_shared_with_megatrons(whole_parser):
    ours = {"hybrid"} | {f"hybrid_{f.name}" for _, f in SETTINGS}
    assert sorted(a.dest for a in whole_parser._actions if a.dest in ours) == sorted(ours)


def test_hybrid_sets_the_name_that_megatron_reads(whole_parser):
    (action,) = [a for a in whole_parser._actions if "--calculate-per-token-loss" in a.option_strings]
    assert action.dest == "calculate_per_token_loss"


def test_help_names_every_flag_with_its_default():
    parser = argparse.ArgumentParser(formatter_class=lambda prog: argparse.HelpFormatter(prog, width=10_000))
    text = add_hybrid_args(parser).format_help()
    for _, f in SETTINGS:
        assert re.search(rf"{flag(f)}\s", text)
        assert f"(default: {'unset' if f.default is None else f.default})" in text


def test_help_puts_settings_of_one_kind_under_one_heading():
    # Parts end in an empty line; headings end in a colon and start at the margin.
    parts = add_hybrid_args(argparse.ArgumentParser()).format_help().split("\n\n")
    headings = {flag: part.partition(":\n")[0] for part in parts for flag in re.findall(r"^  (--\S+)", part, re.M)}
    together = [
        ("--hybrid", "--hybrid-reward-weight", "--hybrid-baseline", "--hybrid-cost-baseline", "--hybrid-divergence"),
        ("--hybrid-teacher-load", "--hybrid-teacher-payload", "--hybrid-teacher-topk"),
        ("--hybrid-rollout-correction", "--hybrid-clip-ratio-low", "--hybrid-mini-batches"),
        ("--hybrid-max-response-length", "--hybrid-group-size", "--hybrid-rollout-batch-size"),
        ("--hybrid-lm-head", "--hybrid-lm-head-chunk-size", "--hybrid-backend"),
        ("--hybrid-prompts", "--hybrid-long-prompts", "--hybrid-reward", "--hybrid-file-reward"),
        ("--hybrid-rollout-server", "--hybrid-rollout-sync-interval", "--hybrid-server-api"),
        ("--hybrid-run-dir", "--hybrid-samples-interval"),
    ]
    found = [{headings[flag] for flag in flags} for flags in together]
    assert all(len(kind) == 1 for kind in found)
    assert len(set.union(*found)) == len(together)


def test_under_the_objective_stands_the_objective_alone():
    groups = {group.title: group for group in add_hybrid_args(argparse.ArgumentParser())._action_groups}
    assert {action.dest for action in groups["hybrid objective"]._group_actions} == {"hybrid"} | {
        f"hybrid_{name}"
        for name in (
            *("reward_weight", "imitation_weight", "discount"),
            *("reward_weight_schedule", "imitation_weight_schedule", "discount_schedule"),
            *("future_cost", "divergence", "divergence_mix", "aggregation"),
            *("baseline", "baseline_decay", "cost_baseline"),
            *("imitation_filter", "imitation_filter_floor", "imitation_filter_decay"),
        )
    }
