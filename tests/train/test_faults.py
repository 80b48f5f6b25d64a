"""Whole runs whose rewards fail now and then, or that have nothing to learn from: what the settings say happens."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.errors import RewardError
from tests.online_jobs import make_prompts, make_tokenizer, run, steps

REWARDS = "tests.rewards.faulty_rewards"
SHORT = {"train_iters": 2, "hybrid_imitation_weight": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("faults")
    make_tokenizer(path / "tokenizer")
    make_prompts(path / "prompts.jsonl")
    pairs = [{"prompt": f"w{a} w{b}", "answer": ""} for a in range(6) for b in range(6)]
    (path / "held_out.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def records(rank_pool: Any, folder: Path, name: str, size: int = 1, **flags: Any) -> list[dict[str, Any]]:
    run_dir = {"hybrid_run_dir": f"{folder}/{name}"}
    rank_pool(size, init=False).run(run, str(folder), SHORT | run_dir | flags)
    return steps(folder, name)


def failed(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = [
        line for file in Path(folder, name).glob("failed_samples_?.jsonl") for line in file.read_text().split("\n")
    ]
    return [json.loads(line) for line in lines if line]


FAULTY = {"hybrid_reward": f"{REWARDS}:fails_sometimes", "train_iters": 3}
"""Two of fourteen questions have no reward; eight are asked at a step, each in four responses."""


@pytest.mark.parametrize("policy", ["zero", "drop"])
@pytest.mark.parametrize(
    ("size", "layout"),
    [(1, {}), (2, {}), (2, {"tensor_model_parallel_size": 2}), (2, {"pipeline_model_parallel_size": 2})],
    ids=["one rank", "replicas", "tensor", "pipeline"],
)
def test_a_reward_that_fails_now_and_then_costs_its_groups_or_their_scores(rank_pool, folder, size, layout, policy):
    name = f"{policy} {size} {list(layout)}"
    found = records(rank_pool, folder, name, size, **FAULTY, **layout, hybrid_on_failed_reward=policy)
    lost = [record["training/failed_rewards"] for record in found]
    assert len(found) == 3 and set(lost) <= {0, 4, 8} and any(lost), "whole groups: the question decides"
    assert [record["training/dropped_responses"] for record in found] == (lost if policy == "drop" else [0, 0, 0])
    assert all(math.isfinite(record["actor/grad_norm"]) and record["actor/grad_norm"] > 0 for record in found)
    least = [record["critic/score/min"] for record in found]
    assert [score >= 1 for score in least] == [policy == "drop" or not count for count in lost]
    samples = failed(folder, name)
    assert {sample["prompt"] for sample in samples} <= {"w1", "w2"} and len(samples) == sum(lost)
    assert all(
        ("no judgement" if sample["prompt"] == "w1" else "a str, 'good'") in sample["error"] for sample in samples
    )


def test_by_default_a_reward_that_fails_ends_the_run_with_a_sample_on_record(rank_pool, folder):
    with pytest.raises(RewardError, match=f"{REWARDS}:fails_sometimes, on prompt"):
        records(rank_pool, folder, "stop", **FAULTY)
    assert failed(folder, "stop")


def test_what_is_on_record_is_of_this_run_alone_and_once(rank_pool, folder):
    """Of a step that is made again, and of a run that begins anew in the folder, as metrics.jsonl has it."""
    kept_in = {"save": f"{folder}/again-checkpoints", "load": f"{folder}/again-checkpoints", "save_interval": 1}
    flags = FAULTY | kept_in | {"hybrid_on_failed_reward": "zero"}
    records(rank_pool, folder, "again", 2, **flags)
    first, output = failed(folder, "again"), folder / "again" / "reward_output_0.log"
    assert {1, 3} <= {sample["step"] for sample in first}, "or nothing would be made again"
    printed = output.stat().st_size
    records(rank_pool, folder, "again", 2, **flags, ckpt_step=2)
    assert failed(folder, "again") == first
    assert output.stat().st_size > printed
    records(rank_pool, folder, "again", 2, **flags | {"load": None})
    assert failed(folder, "again") == first
    assert output.stat().st_size == printed


NOTHING = {"hybrid_reward": f"{REWARDS}:always_fails", "hybrid_on_failed_reward": "drop"}


@pytest.mark.parametrize("size", [1, 2])
def test_a_step_without_a_token_has_a_gradient_of_zero(rank_pool, folder, size):
    flags = NOTHING | {"eval_iters": 1, "eval_interval": 2, "hybrid_eval_prompts": f"{folder}/held_out.jsonl"}
    found = records(rank_pool, folder, f"nothing {size}", size, **flags)
    for record in found:
        assert record["training/dropped_responses"] == record["training/failed_rewards"] == 32
        assert record["actor/grad_norm"] == 0 and record["training/skipped_steps"] == 0
        assert math.isnan(float(record["critic/score/mean"]))
    assert len(steps(folder, f"nothing {size}", kind="eval")) == 3


@pytest.mark.parametrize("baseline", ["rloo", "grpo", "reinforce_plus_plus"])
def test_equal_rewards_teach_nothing(rank_pool, folder, baseline):
    flags = {"hybrid_reward": f"{REWARDS}:always_the_same", "hybrid_baseline": baseline, "train_iters": 1}
    (found,) = records(rank_pool, folder, f"equal {baseline}", **flags)
    assert found["critic/score/max"] == found["critic/score/min"] > 0
    # 0.1 is no binary number: its mean over a batch may be a rounding off, which a deviation of 1e-6 enlarges.
    assert abs(found["critic/advantages/max"]) < 1e-6 and found["actor/grad_norm"] < 1e-4


DEGENERATE = {
    "one sequence": {
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "hybrid_group_size": 1,
        "hybrid_baseline": "none",
    },
    "all truncated": {"hybrid_max_response_length": 1, "hybrid_truncated_reward": 0.0},
}


@pytest.mark.parametrize("kind", DEGENERATE)
def test_a_degenerate_batch_trains_without_a_nan(rank_pool, folder, kind):
    found = records(rank_pool, folder, kind, **DEGENERATE[kind])
    for record in found:
        numbers = {name: float(value) for name, value in record.items() if name != "kind"}
        # A task that nobody drew has no mean.
        assert all(math.isfinite(value) for name, value in numbers.items() if not name.startswith("critic/score/"))
