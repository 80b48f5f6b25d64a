"""Training on files: rollouts of another run give that run's step, demonstrations Megatron's own cross-entropy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.gradient import assert_same, whole
from tests.online_jobs import run, steps, with_teacher
from tests.recorded_jobs import demonstrations, record

UNKNOWN = ("training/policy_age",)
DEMONSTRATIONS = {
    "hybrid_imitation_weight": 0,
    "hybrid_baseline": "none",
    "hybrid_rollout_correction": "none",
    "hybrid_aggregation": "token-mean",
    "hybrid_group_size": 1,
}
"""Cross-entropy."""
FORWARD_KL = DEMONSTRATIONS | {
    "hybrid_imitation_weight": 1,
    "hybrid_reward_weight": 0,
    "hybrid_divergence": "forward_kl",
    "hybrid_discount": 0,
}


@pytest.fixture(scope="module")
def old(rank_pool: Any, folder: Path) -> Path:
    """What an online run of two steps sampled, which is every prompt at least once."""
    path = folder / "old.jsonl"
    flags = with_teacher(folder, "sampling", train_iters=2, eval_iters=1, hybrid_eval_prompts=f"{folder}/val.jsonl")
    (folder / "val.jsonl").write_text('{"prompt": "w1 w1", "answer": "w2"}\n')
    rank_pool(1, init=False).run(record, str(folder), flags, str(path))
    return path


def offline(folder: Path, name: str, path: Path, **more: Any) -> dict[str, Any]:
    """Flags of a run on what `path` holds."""
    flags = {"hybrid_prompts": None, "hybrid_rollouts": str(path), "train_iters": 2}
    return with_teacher(folder, name, **flags) | more


def without(path: Path, *fields: str) -> Path:
    """The same file without these fields."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kept = path.with_name(f"{path.stem} without {' '.join(fields)}.jsonl")
    kept.write_text("".join(json.dumps({k: v for k, v in x.items() if k not in fields}) + "\n" for x in lines))
    return kept


def test_rollouts_read_from_a_file_give_the_step_that_sampled_them(rank_pool, folder, old):
    # Held-out prompts are still answered by the live student, at the same noise.
    flags = offline(folder, "read", old, eval_iters=1, hybrid_eval_prompts=f"{folder}/val.jsonl")
    rank_pool(1, init=False).run(run, str(folder), flags)
    (sampled, *_), (read, *_) = steps(folder, "sampling"), steps(folder, "read")
    assert sampled["actor/grad_norm"] > 0 and sampled["critic/advantages/max"] > 0
    assert {k: v for k, v in sampled.items() if k not in UNKNOWN} == read
    assert steps(folder, "read", kind="eval")[0] == steps(folder, "sampling", kind="eval")[0]


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        pytest.param(2, {"pipeline_model_parallel_size": 2}, id="PP 2"),
        pytest.param(2, {"tensor_model_parallel_size": 2}, id="TP 2"),
        pytest.param(2, {}, id="DP 2"),
    ],
)
def test_every_layout_reads_the_same_rollouts(rank_pool, folder, old, size, layout):
    start = {"load": f"{folder}/teacher", "finetune": True}  # Megatron's own initialisation depends on the layout
    if not (folder / "one").exists():
        flags = offline(folder, "one", old, **start, hybrid_teacher_load="self")
        rank_pool(1, init=False).run(run, str(folder), flags)
    flags = offline(folder, str(layout), old, **start, hybrid_teacher_load="self", **layout)
    rank_pool(size, init=False).run(run, str(folder), flags)
    for one, ours in zip(steps(folder, "one"), steps(folder, str(layout)), strict=True):
        assert one.keys() == ours.keys()
        # fp32 sums in another order, over two steps of Adam.
        for name in ("actor/grad_norm", "critic/score/mean", "response_length/mean", "rollout_corr/kl"):
            assert ours[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


def test_without_log_probs_nothing_is_said_of_the_sampler(rank_pool, folder, old):
    flags = offline(folder, "unknown", without(old, "logprobs"), hybrid_rollout_correction="none")
    rank_pool(1, init=False).run(run, str(folder), flags)
    rank_pool(1, init=False).run(
        run, str(folder), offline(folder, "uncorrected", old, hybrid_rollout_correction="none")
    )
    for unknown, known in zip(steps(folder, "unknown"), steps(folder, "uncorrected"), strict=True):
        missing = known.keys() - unknown.keys()
        assert {name.split("/")[0] for name in missing} == {"rollout_corr", "training"}
        assert {"training/rollout_probs_diff_mean", "rollout_corr/kl"} <= missing
        assert all(known[name] == value for name, value in unknown.items())  # where nothing is corrected, all the rest


def test_another_reward_scores_the_text(rank_pool, folder, old):
    flags = offline(folder, "scored", without(old, "reward"), hybrid_reward="exact_match", train_iters=1)
    rank_pool(1, init=False).run(run, str(folder), flags)
    assert steps(folder, "scored")[0]["critic/score/mean"] == steps(folder, "sampling")[0]["critic/score/mean"]


@pytest.fixture(scope="module")
def shown(folder: Path) -> Path:
    """Demonstrations of different lengths."""
    path = folder / "shown.jsonl"
    pairs = [("w1", "w2"), ("w3 w4", "w5 w6 w7"), ("w8", "w9 w10"), ("w11 w12 w13", "w1")]
    path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in pairs))
    return path


@pytest.mark.parametrize(("size", "layout"), [(1, {}), (2, {"pipeline_model_parallel_size": 2}), (2, {})])
def test_demonstrations_have_the_gradient_of_megatrons_own_cross_entropy(rank_pool, folder, shown, size, layout):
    flags = DEMONSTRATIONS | {"hybrid_rollouts": str(shown), "micro_batch_size": 2} | layout
    ours = whole(rank_pool(size, init=False).run(demonstrations, str(folder), "hybrid", flags), 64)
    flags |= dict.fromkeys(layout, 1)
    stock = whole(rank_pool(1, init=False).run(demonstrations, str(folder), "stock", flags), 64)
    assert_same(ours, stock)


def test_forward_kl_on_demonstrations_is_that_of_float64(rank_pool, folder, shown):
    flags = FORWARD_KL | {"hybrid_rollouts": str(shown), "micro_batch_size": 2}
    ours, expected = (
        whole(rank_pool(1, init=False).run(demonstrations, str(folder), way, flags), 64)
        for way in ("hybrid", "reference")
    )
    assert_same(ours, expected)


def test_a_run_on_demonstrations_learns_them(rank_pool, folder, shown):
    flags = offline(
        folder, "shown", shown, train_iters=8, lr=3e-2, min_lr=3e-2, global_batch_size=4, micro_batch_size=4
    )
    flags |= DEMONSTRATIONS | {"hybrid_teacher_load": None, "hybrid_max_response_length": 4}
    rank_pool(1, init=False).run(run, str(folder), flags)
    losses = [step["actor/loss"] for step in steps(folder, "shown")]
    # From the 2.8 nats of 16 words; four lines are learnt by heart within some steps.
    assert losses[0] > 2.5 and losses[-1] < 0.7 * losses[0]
