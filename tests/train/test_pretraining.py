"""A share of the script's own batches: both gradients add up, each with its own normaliser, and runs go on exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.errors import ShapeError
from megatron_hybrid.parallel import ParallelContext
from megatron_hybrid.train.pretraining import PretrainingData
from tests.distributed.gradient import assert_same, whole
from tests.mixed_jobs import mixed_gradient, sentences
from tests.online_jobs import run, steps, with_teacher
from tests.recorded_jobs import refused

WEIGHT = 0.3
MIXED = {"hybrid_pretraining_microbatches": 2, "hybrid_pretraining_weight": WEIGHT}
PP = {"pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def old(folder: Path) -> Path:
    """Eight responses to four prompts, with rewards."""
    path = folder / "old.jsonl"
    replies = (
        ("w2", 1.0),
        ("w5 w6 w7", 0.0),
        ("w9 w10", 0.5),
        ("w1", 0.0),
        ("w3 w4", 1),
        ("w5", 2),
        ("w6 w6", 0),
        ("", 1),
    )
    lines = [{"prompt": f"w{i // 2} w7", "response": text, "reward": r} for i, (text, r) in enumerate(replies)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        pytest.param(1, {}, id="one rank"),
        pytest.param(2, PP, id="PP 2"),
        pytest.param(2, {}, id="DP 2"),
        pytest.param(2, {"tensor_model_parallel_size": 2}, id="TP 2"),
    ],
)
def test_the_gradient_is_the_sum_of_both_each_by_its_own_count(rank_pool, folder, old, size, layout):
    flags = {"hybrid_rollouts": str(old), "hybrid_group_size": 2, "hybrid_imitation_weight": 0, "seq_length": 16}
    flags |= {"hybrid_rollout_correction": "none", "micro_batch_size": 2} | MIXED | layout

    def found(way: str) -> tuple[dict[str, torch.Tensor], list[Any]]:
        ranks = rank_pool(size, init=False).run(mixed_gradient, str(folder), way, flags)
        return whole(ranks, 64), [report for rank in ranks for report in rank["reports"] or []]

    (both, reports), (rollouts, _), (data, alone) = (found(way) for way in ("both", "rollouts", "data"))
    assert_same(both, {name: rollouts[name] + WEIGHT * data[name] for name in both})
    # What is reported is the cross-entropy itself: every micro-batch says both losses, and neither counts in the other.
    mine, theirs = sum(r["pretraining/loss"] for r in reports), sum(r["lm loss"] for r in alone)
    torch.testing.assert_close(mine, theirs.to(mine), rtol=1e-6, atol=0)
    assert sum(int(r["actor/loss"][1]) for r in reports) % 8 == 0  # responses, on each tensor-parallel rank


def flags_of(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    fixed = {"train_iters": 4, "lr_decay_iters": 4, "num_workers": 0, "load": f"{folder}/teacher", "finetune": True}
    return with_teacher(folder, name) | fixed | MIXED | more


def test_a_run_with_a_share_of_pretraining_resumes_exactly(rank_pool, folder):
    pool = rank_pool(1, init=False)
    saved = {"save": f"{folder}/mixed-checkpoints", "save_interval": 2}
    pool.run(run, str(folder), flags_of(folder, "mixed", save=f"{folder}/other", save_interval=2), sentences)
    pool.run(run, str(folder), flags_of(folder, "mixed parts", **saved, exit_interval=2), sentences)
    resumed = {"load": f"{folder}/mixed-checkpoints", "finetune": None}
    pool.run(run, str(folder), flags_of(folder, "mixed parts", **saved | resumed), sentences)
    found = steps(folder, "mixed")
    assert steps(folder, "mixed parts") == found
    losses = [step["pretraining/loss"] for step in found]
    assert len(set(losses)) == 4 and all(2 < loss < 5 for loss in losses)  # other sequences each; log 16 is 2.8
    assert {step["pretraining/weight"] for step in found} == {WEIGHT}


@pytest.mark.parametrize(("size", "layout"), [(2, PP), (2, {"tensor_model_parallel_size": 2})], ids=["PP 2", "TP 2"])
def test_layouts_train_alike_on_both(rank_pool, folder, size, layout):
    if not (folder / "one").exists():
        rank_pool(1, init=False).run(run, str(folder), flags_of(folder, "one"), sentences)
    rank_pool(size, init=False).run(run, str(folder), flags_of(folder, str(layout), **layout), sentences)
    for one, ours in zip(steps(folder, "one"), steps(folder, str(layout)), strict=True):
        assert one.keys() == ours.keys()
        for name in ("pretraining/loss", "actor/grad_norm", "critic/score/mean"):
            assert ours[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name  # fp32 sums, through Adam


def test_an_evaluation_has_no_pretraining_in_it(rank_pool, folder):
    (folder / "val.jsonl").write_text('{"prompt": "w1 w1", "answer": "w2"}\n')
    flags = {"eval_iters": 1, "hybrid_eval_prompts": f"{folder}/val.jsonl", "train_iters": 1, "lr_decay_iters": 1}
    printed = rank_pool(1, init=False).run(run, str(folder), flags_of(folder, "evaluated", **flags), sentences)[0]
    assert "pretraining/loss value" not in printed
    assert len(steps(folder, "evaluated", kind="eval")) == 2


def test_a_batch_that_a_pipeline_cannot_hand_over_is_refused():
    short = torch.zeros(2, 7), torch.zeros(2, 7), torch.ones(2, 7), None, None
    config = HybridConfig(pretraining_microbatches=1)
    with pytest.raises(ShapeError, match=r"returned \[2, 7\], but pipeline stages .* 16 positions"):
        PretrainingData(iter([short]), next, config, ParallelContext(), 16).draw([])


def no_data(args: Any) -> tuple[Any, Any]:
    return None, next


def nothing_to_train_on(args: Any) -> tuple[Any, Any]:
    return (lambda num_samples: (None, None, None)), next


@pytest.mark.parametrize(
    ("change", "data", "message"),
    [
        ({"hybrid_prompts": None, "hybrid_teacher_load": None}, sentences, "there are no rollouts to go beside"),
        ({}, no_data, "pretraining_microbatches is 2, but the script has no data"),
        ({}, nothing_to_train_on, "the script's dataset provider gives no training data"),
    ],
)
def test_a_share_of_pretraining_that_cannot_be_is_refused(rank_pool, folder, change, data, message):
    flags = flags_of(folder, "refused") | change
    assert message in rank_pool(1, init=False).run(refused, run, str(folder), flags, data)[0]
