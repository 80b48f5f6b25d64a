"""Settings are frozen, and a wrong one says what to do before any model is built."""

from dataclasses import FrozenInstanceError, fields
from typing import Any

import numpy as np
import pytest

from megatron_hybrid.config import HybridConfig, as_dict
from megatron_hybrid.errors import ConfigError, HybridError
from megatron_hybrid.online_config import OnlineConfig


def test_the_defaults_are_the_objective_of_the_paper() -> None:
    config = HybridConfig()
    assert (config.reward_weight, config.imitation_weight, config.discount) == (1.0, 1.0, 1.0)
    assert (config.future_cost, config.aggregation) == ("closed_form", "seq-mean-token-sum")
    assert (config.student_temperature, config.teacher_temperature) == (1.0, 1.0)


@pytest.mark.parametrize("kind", [HybridConfig, OnlineConfig])
def test_every_setting_explains_itself_to_the_command_line(kind: type) -> None:
    for setting in fields(kind):
        assert setting.metadata["help"], setting.name
        choices = setting.metadata["choices"]
        assert choices is None or setting.default in choices


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward_weight": -1.0}, "reward_weight must be a finite number >= 0, got -1.0"),
        ({"imitation_weight": float("nan")}, "imitation_weight must be a finite number >= 0, got nan"),
        ({"reward_weight": float("inf")}, "reward_weight must be a finite number"),
        ({"reward_weight": 0.0, "imitation_weight": 0.0}, "both 0, so there is nothing to learn"),
        ({"discount": 1.01}, r"discount \(gamma\) must lie in \[0, 1\], got 1.01"),
        ({"discount": -0.01}, r"discount \(gamma\) must lie in \[0, 1\]"),
        ({"future_cost": "sample"}, "Did you mean 'sampled'"),
        (
            {"baseline": "rlo"},
            "baseline must be one of none, rloo, grpo, .*; got 'rlo'. Did you mean 'rloo'",
        ),
        ({"aggregation": "token_mean"}, "Did you mean 'token-mean'"),
        ({"backend": "cuda-graphs"}, "backend must be one of torch, .*; got 'cuda-graphs'"),
        ({"group_size": 0, "baseline": "none"}, "group_size must be at least 1, got 0"),
        ({"group_size": 1}, "Use group_size >= 2, or baseline 'none'"),
        ({"group_size": 1, "baseline": "grpo"}, "baseline 'grpo' compares the responses to one prompt"),
        ({"student_temperature": 0.0}, "student_temperature must be a finite number > 0, got 0.0"),
        ({"imitation_filter_floor": 1.5}, r"imitation_filter_floor must lie in \[0, 1\], got 1.5"),
        ({"imitation_filter_decay": 1.0}, r"imitation_filter_decay must lie in \[0, 1\), got 1.0"),
        ({"imitation_filter": "task", "reward_weight": 0.0}, "imitation_filter 'task' compares .*reward_weight 0.0"),
        ({"imitation_filter": "task", "group_size": 1, "baseline": "none"}, "group_size 1. Set both weights above 0"),
        ({"baseline_decay": 1.0}, r"baseline_decay must lie in \[0, 1\), got 1.0"),
        ({"rollout_is_threshold": 0.5}, "rollout_is_threshold must be at least 1, got 0.5"),
        ({"clip_ratio_low": 0.0}, "clip_ratio_low must be above 0"),
        ({"clip_ratio_low": 1.5}, "clip_ratio_low at most 1"),
        ({"mini_batches": 0}, "mini_batches must be at least 1, got 0"),
        ({"ppo_epochs": 0}, "ppo_epochs must be at least 1, got 0"),
        ({"pretraining_microbatches": -1}, "pretraining_microbatches must be at least 0, got -1"),
        ({"pretraining_microbatches": 1, "pretraining_weight": 0.0}, "pretraining_weight must be a finite number > 0"),
        ({"pretraining_weight": 0.5}, "pretraining_weight is 0.5, but pretraining_microbatches is 0"),
        ({"teacher_topk": 0}, "teacher_topk must be at least 1, got 0"),
        ({"divergence": "jsd", "discount": 0.0, "divergence_mix": 1.0}, "divergence_mix must lie strictly between"),
        ({"divergence": "jsd"}, r"one-step loss.*discount \(1.0\)"),
        ({"divergence": "jsd", "discount": 0.0, "teacher_payload": "topk"}, "needs the teacher's whole distribution"),
        ({"teacher_logit_floor": float("nan")}, "teacher_logit_floor must be finite, got nan"),
        ({"teacher_temperature": float("inf")}, "teacher_temperature must be a finite number > 0, got inf"),
    ],
)
def test_an_impossible_setting_is_refused_with_its_value(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HybridConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"reward_weight": 0.0, "discount": 0.0},  # on-policy distillation
        {"imitation_weight": 0.0},  # policy gradient
        {"group_size": 1, "baseline": "none"},  # REINFORCE
    ],
)
def test_the_limits_of_the_method_are_allowed(settings: dict[str, Any]) -> None:
    config = HybridConfig(**settings)
    assert as_dict(config) == {**as_dict(HybridConfig()), **settings}


@pytest.mark.parametrize("name", ["max_response_length", "rollout_batch_size", "samples_interval"])
def test_a_run_refuses_counts_below_one(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
        OnlineConfig(**{name: 0})


def test_a_setting_cannot_be_changed_after_it_was_checked() -> None:
    config = HybridConfig()
    with pytest.raises(FrozenInstanceError):
        config.discount = 2.0  # type: ignore[misc]


def test_a_config_error_is_caught_as_ours_and_as_a_value_error() -> None:
    assert issubclass(ConfigError, HybridError) and issubclass(ConfigError, ValueError)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_ema_decay": 0.9}, "only a copy of the student changes"),
        ({"teacher_refresh_interval": 3, "teacher_load": "there/is/self"}, "only a copy of the student changes"),
        ({"teacher_load": "self", "teacher_ema_decay": 1.0}, r"teacher_ema_decay must lie in \[0, 1\), got 1.0"),
        ({"teacher_load": "self", "teacher_refresh_interval": 0}, "must be at least 1, got 0"),
        ({"teacher_load": "self", "teacher_refresh_interval": 1, "teacher_ema_decay": 0.5}, "are both set"),
    ],
)
def test_a_copy_of_the_student_follows_in_one_way_and_only_where_there_is_one(settings, message):
    with pytest.raises(ConfigError, match=message):
        OnlineConfig(**settings)


@pytest.mark.parametrize("load", ["self", "math=self,*=folder", "0.5*self,0.5*folder", "a=folder, b=self"])
def test_a_copy_may_be_one_of_several_teachers(load):
    assert OnlineConfig(teacher_load=load, teacher_ema_decay=0.9).teacher_ema_decay == 0.9


@pytest.mark.parametrize("settings", [{"lm_head_chunk_size": 0}, {"lm_head": "logits", "lm_head_chunk_size": 8}])
def test_a_chunk_size_that_means_nothing_is_refused(settings):
    with pytest.raises(ConfigError, match="lm_head_chunk_size is .* fused head makes at a time"):
        HybridConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": "exact"}, "got 'exact'. Did you mean 'exact_match'?"),
        ({"reward": "exact_match,math_answer"}, "Several rewards need a weight each"),
        ({"reward": "my_module:"}, "reward must be one of by_source, .*got 'my_module:'"),
        ({"reward": "1*by_source,1*2bad:f"}, "got '2bad:f'"),
        ({"reward": "ftp://host/x"}, "no address of a server: expected http"),
        ({"reward": "http:///x"}, "no address of a server"),
        ({"reward": "http://host:port"}, "no address of a server"),
        ({"reward": "exact_match", "file_reward": "math_answer"}, "part of the reward by_source"),
        ({"reward": "http://judge/score"}, "plain http to another machine: .*say --hybrid-allow-http"),
        ({"reward": "http://local\nhost/score"}, "no address of a server"),
        ({"reward": "http://localhost\\judge/score"}, "no address of a server"),
        ({"server_timeout": 0.0}, "server_timeout must be a finite number of seconds > 0, got 0.0"),
        ({"server_retries": -1}, "server_retries must lie in .0, 1000., got -1"),
    ],
)
def test_a_reward_that_nobody_knows_is_refused_with_the_nearest_one(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        OnlineConfig(**settings)


def test_rewards_are_read_with_their_weights() -> None:
    assert OnlineConfig().rewards == [(1.0, "by_source")]
    assert OnlineConfig(reward="2*math_answer,-1*pkg.mod:f").rewards == [(2.0, "math_answer"), (-1.0, "pkg.mod:f")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": "-1*a.jsonl,2*b.jsonl"}, "prompts gives 'a.jsonl' the share -1.0"),
        ({"eval_prompts": "a.jsonl,2*b.jsonl"}, "'a.jsonl' has no weight"),
        ({"max_prompt_length": 0}, "max_prompt_length must be at least 1, got 0"),
        ({"long_prompts": "cut"}, "long_prompts must be one of refuse, drop; got 'cut'"),
        ({"rollouts": "old.csv"}, "rollouts must be a .jsonl or .parquet file, got 'old.csv'"),
        ({"rollouts": "a.jsonl", "prompts": "b.jsonl"}, "rollouts is 'a.jsonl' and prompts 'b.jsonl'"),
        ({"rollouts": "a.jsonl", "rollout_server": "http://b"}, "rollouts is 'a.jsonl' and rollout_server 'http://b'"),
    ],
)
def test_prompts_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OnlineConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout_server": "host:8000"}, "rollout_server 'host:8000' is no address of a server: expected http"),
        ({"teacher_server": "http://"}, "teacher_server 'http://' is no address"),
        ({"teacher_server": "https://a", "teacher_load": "b"}, "teacher_server is 'https://a' and teacher_load 'b'"),
        (
            {"teacher_store": "a", "teacher_load": "b", "rollouts": "c.jsonl"},
            "teacher_load is 'b' and teacher_store 'a'",
        ),
        ({"teacher_store": "a", "prompts": "c.jsonl"}, "teacher_store is 'a', but there are no recorded rollouts"),
        ({"server_api": "vlm"}, "server_api must be one of vllm, sglang; got 'vlm'. Did you mean 'vllm'"),
        ({"server_requests": 0}, "server_requests must be at least 1, got 0"),
        ({"rollout_sync_interval": 2}, "there is no rollout_server to give weights to"),
        (
            {"rollout_server": "https://a", "rollout_sync_interval": 0},
            "rollout_sync_interval must be at least 1, got 0",
        ),
        (
            {"rollout_server": "https://a", "rollout_sync_dir": "x"},
            "no weights are written: give rollout_sync_interval",
        ),
    ],
)
def test_servers_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OnlineConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "variable"),
    [
        ({"reward": "1*exact_match,1*https://me:hush@judge/score"}, "HYBRID_REWARD_API_KEY"),
        ({"reward": "http://hush@judge"}, "HYBRID_REWARD_API_KEY"),
        ({"teacher_server": "http://me:hush@host:8000"}, "HYBRID_SERVER_API_KEY"),
        ({"rollout_server": "http://me:hush@:8000"}, "HYBRID_SERVER_API_KEY"),
        ({"rollout_server": "http://me:hush@[:8000"}, "HYBRID_SERVER_API_KEY"),
    ],
)
def test_a_password_in_an_address_is_refused_and_not_shown(settings: dict[str, Any], variable: str) -> None:
    with pytest.raises(ConfigError, match=f"before its '@'.*environment variable {variable}") as refused:
        OnlineConfig(**settings)
    assert "hush" not in str(refused.value)


def test_an_at_sign_behind_the_host_is_no_password() -> None:
    assert OnlineConfig(reward="https://judge/score@v2?to=a@b").rewards == [(1.0, "https://judge/score@v2?to=a@b")]


LOCAL = ("http://localhost:8000", "http://LOCALHOST", "http://127.0.0.1:1/v1", "http://127.1.2.3", "http://[::1]:8000")
ELSEWHERE = (
    "http://10.0.0.7:8000",
    "http://192.168.1.2",
    "http://node7:8000",
    "http://localhost.example.com",
    "http://0",
)


@pytest.mark.parametrize("name", ["teacher_server", "rollout_server"])
def test_plain_http_goes_to_other_machines_only_where_told(name: str) -> None:
    for url in (*LOCAL, "https://node7:8000"):
        OnlineConfig(**{name: url})
    for url in ELSEWHERE:
        with pytest.raises(ConfigError, match="plain http to another machine: .* say --hybrid-allow-http"):
            OnlineConfig(**{name: url})
        OnlineConfig(**{name: url}, allow_http=True)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (HybridConfig, {"reward_weight": "1"}, r"reward_weight must be float, got '1' \(str\)"),
        (HybridConfig, {"group_size": 4.0}, r"group_size must be int, got 4.0 \(float\)"),
        (HybridConfig, {"group_size": True}, "group_size must be int, got True"),
        (HybridConfig, {"prefix_correction": 1}, "prefix_correction must be bool, got 1"),
        (HybridConfig, {"teacher_logit_floor": "low"}, "must be float or None, got 'low'"),
        (HybridConfig, {"discount": 10**400}, "discount is a number of 1329 bits"),
        (OnlineConfig, {"prompts": ["a.jsonl"]}, "prompts must be str or None, got"),
        (OnlineConfig, {"run_dir": "a\0b"}, "run_dir 'a.x00b' holds a character that neither files"),
        (OnlineConfig, {"system_prompt": "\ud800"}, "system_prompt .* holds a character"),
        (OnlineConfig, {"server_retries": 10**9}, r"server_retries must lie in \[0, 1000\]"),
        (OnlineConfig, {"on_bad_record": "drop"}, "on_bad_record must be one of stop, skip; got 'drop'"),
    ],
)
def test_a_value_of_another_type_is_refused(config: type, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**settings)


def test_numbers_of_numpy_are_numbers() -> None:
    assert HybridConfig(discount=np.float32(0.5), group_size=np.int64(8), reward_weight=2).group_size == 8


def test_a_server_counts_as_a_teacher() -> None:
    assert OnlineConfig(teacher_server="https://a").names_teacher and OnlineConfig(teacher_load="a").names_teacher
    assert not OnlineConfig().names_teacher


@pytest.mark.parametrize(
    ("settings", "seconds"),
    [
        ({}, 0),
        ({"reward": "1*exact_match,1*https://judge"}, 6 * 600 + 1 + 2 + 4 + 8),  # no pause before the first
        ({"teacher_server": "https://a", "server_retries": 0, "server_timeout": 7.0}, 7),
        ({"rollout_server": "https://a", "server_retries": 1, "server_timeout": 7.0}, 14),
    ],
)
def test_the_longest_that_a_run_waits_for_a_server(settings: dict[str, Any], seconds: float) -> None:
    assert OnlineConfig(**settings).longest_request_s == seconds
