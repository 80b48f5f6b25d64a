"""Online training end to end on a tiny random model: it learns, layouts train alike, a resumed run goes on exactly."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.online_jobs import make_prompts, run, steps, with_teacher

LAYOUTS = [
    pytest.param(2, {"tensor_model_parallel_size": 2}, id="TP 2"),
    pytest.param(2, {"pipeline_model_parallel_size": 2}, id="PP 2"),
    pytest.param(
        2, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}, id="PP 2 interleaved"
    ),
    pytest.param(2, {}, id="DP 2"),
    pytest.param(1, {"hybrid_pack_sequences": True}, id="packed"),
    pytest.param(2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, id="TP 2, sequence parallel"),
    pytest.param(2, {"context_parallel_size": 2}, id="CP 2"),
    pytest.param(2, {"context_parallel_size": 2, "hybrid_pack_sequences": True}, id="CP 2, packed"),
    pytest.param(2, {"pipeline_model_parallel_size": 2, "hybrid_pack_sequences": True}, id="PP 2, packed"),
]
REPORTED = ("critic/score/mean", "actor/kl_loss", "actor/entropy", "actor/grad_norm", "response_length/mean")
HELD_OUT = ("val/score", "val/kl", "val/entropy", "val/response_length")


def test_the_reward_of_a_random_model_rises(rank_pool, folder):
    learning = {
        "train_iters": 40,
        "global_batch_size": 64,
        "micro_batch_size": 64,
        "hybrid_prompts": f"{folder}/four.jsonl",
        "hybrid_imitation_weight": 0,
        "hybrid_group_size": 16,
        "hybrid_max_response_length": 1,
        "hybrid_run_dir": f"{folder}/reward",
    }
    make_prompts(folder / "four.jsonl", ["w1", "w5", "w9", "w13"])
    printed = rank_pool(1, init=False).run(run, str(folder), learning)[0]
    rewards = [step["critic/score/mean"] for step in steps(folder, "reward")]
    assert len(rewards) == 40
    # One in 16 words is right by chance; 64 responses a step make that 0.06 +- 0.03.
    assert sum(rewards[:5]) / 5 < 0.2
    assert sum(rewards[-5:]) / 5 > 0.5
    assert "step 40/40  reward" in printed


def test_imitation_brings_the_held_out_kl_down_and_leaves_a_readable_run(rank_pool, folder):
    pairs = [f'{{"prompt": "w{i} w{j}", "answer": "w3"}}\n' for i in range(14) for j in range(14)]
    (folder / "seen.jsonl").write_text("".join(pairs[k] for k in range(196) if k % 6))
    (folder / "held_out.jsonl").write_text("".join(pairs[::6]))
    imitation = with_teacher(
        folder,
        "imitation",
        train_iters=40,
        lr=1e-2,
        min_lr=1e-3,
        hybrid_prompts=f"{folder}/seen.jsonl",
        hybrid_eval_prompts=f"{folder}/held_out.jsonl",
        hybrid_reward_weight=0,
        hybrid_imitation_weight=1,
        eval_iters=1,
        tensorboard_dir=f"{folder}/imitation/tensorboard",
        tensorboard_log_interval=1,
    )
    printed = rank_pool(1, init=False).run(run, str(folder), imitation, plots=True)[0]
    run_dir = folder / "imitation"
    summary = json.loads((run_dir / "summary.json").read_text())
    before, after = (summary["val/kl"][when] for when in ("before", "after"))
    assert after < 0.5 * before
    assert "held-out reverse KL" in printed
    assert (run_dir / "plots" / "overview.png").stat().st_size > 10_000
    assert list((run_dir / "tensorboard").iterdir())
    assert json.loads((run_dir / "config.json").read_text())["config"]["hybrid"]["imitation_weight"] == 1
    sample = json.loads((run_dir / "samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"].split()[0] in {f"w{i}" for i in range(14)}


@pytest.mark.parametrize(("size", "overrides"), LAYOUTS)
def test_every_layout_trains_and_evaluates_alike(rank_pool, folder, size, overrides):
    # Two iterations of 32 held-out questions, before and after; a file of 2 would be asked again and again.
    (folder / "questions.jsonl").write_text(
        "".join(f'{{"prompt": "w{i % 14} w{i // 14}", "answer": "w1"}}\n' for i in range(64))
    )
    common = {"load": f"{folder}/teacher", "finetune": True, "eval_iters": 2}
    common["hybrid_eval_prompts"] = f"{folder}/questions.jsonl"
    name = "-".join(f"{key}={value}" for key, value in overrides.items()) or "dp"
    if not (folder / "reference" / "metrics.jsonl").exists():
        rank_pool(1, init=False).run(run, str(folder), with_teacher(folder, "reference", **common))
    rank_pool(size, init=False).run(run, str(folder), with_teacher(folder, name, **common) | overrides)
    for kind, names, number in (("step", REPORTED, 6), ("eval", HELD_OUT, 2)):
        reference, ours = (steps(folder, which, kind=kind) for which in ("reference", name))
        assert [record["step"] for record in ours] == [record["step"] for record in reference]
        assert len(ours) == number
        for expected, got in zip(reference, ours, strict=True):
            assert expected.keys() == got.keys()
            for key in names:
                # The same responses and the same gradients, up to fp32 roundings that Adam amplifies over six steps.
                assert got[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-6), (expected["step"], key)


def test_a_run_that_was_stopped_and_resumed_continues_exactly(rank_pool, folder):
    def flags(name: str, **more: Any) -> dict[str, Any]:
        # The schedule of the whole run, also in the part that stops early.
        fixed = {"lr_decay_iters": 6, "save": f"{folder}/{name}-checkpoints", "save_interval": 3}
        return with_teacher(folder, name) | fixed | more

    pool = rank_pool(1, init=False)
    pool.run(run, str(folder), flags("whole"))
    pool.run(run, str(folder), flags("parts", exit_interval=3), plots=True)
    assert (folder / "parts" / "plots" / "overview.png").exists()  # a run that stops early leaves its plots too
    pool.run(run, str(folder), flags("parts", load=f"{folder}/parts-checkpoints"))
    assert steps(folder, "parts") == steps(folder, "whole")
