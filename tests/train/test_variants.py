"""Every variant of the method through a whole online run: what it changes, and that it goes on exactly after a stop."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tests.online_jobs import make_prompts, make_teacher, run, steps, with_teacher

SHORT = {"train_iters": 2}


def records(rank_pool: Any, folder: Any, name: str, size: int = 1, **flags: Any) -> list[dict[str, Any]]:
    """The steps of a run with these flags."""
    rank_pool(size, init=False).run(run, str(folder), with_teacher(folder, name, **SHORT) | flags)
    return steps(folder, name)


@pytest.fixture(scope="module")
def plain(rank_pool, folder) -> list[dict[str, Any]]:
    """What the defaults do."""
    return records(rank_pool, folder, "plain")


@pytest.fixture(scope="module")
def start(rank_pool, folder) -> dict[str, Any]:
    """One student for every layout: Megatron's own initialisation depends on it."""
    (folder / "start").mkdir()
    (folder / "start" / "tokenizer").symlink_to(folder / "tokenizer")
    rank_pool(1, init=False).run(make_teacher, f"{folder}/start", {"seed": 76})
    return {"load": f"{folder}/start/teacher", "finetune": True}


def same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], name: str) -> bool:
    """Equal up to fp32 sums in another order, over two or three steps: some tens of roundings of 6e-8."""
    return all(a[name] == pytest.approx(b[name], rel=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_whole_logits_and_the_fused_head_train_alike(rank_pool, folder, plain):
    chunks = records(rank_pool, folder, "chunks", hybrid_lm_head_chunk_size=5)
    logits = records(rank_pool, folder, "logits", hybrid_lm_head="logits")
    for name in ("actor/grad_norm", "actor/grad_norm_dense", "actor/grad_norm_sparse", "actor/kl_loss"):
        assert same(chunks[:1], plain[:1], name) and same(logits[:1], plain[:1], name)
    assert same(chunks, plain, "actor/grad_norm") and same(logits, plain, "actor/grad_norm")


@pytest.mark.parametrize("baseline", ["none", "grpo", "reinforce_plus_plus", "running_mean"])
def test_a_baseline_changes_the_advantages_and_not_the_rollouts(rank_pool, folder, plain, baseline):
    found = records(rank_pool, folder, baseline, hybrid_baseline=baseline, train_iters=1)
    assert found[0]["critic/score/mean"] == plain[0]["critic/score/mean"]
    assert found[0]["actor/grad_norm"] != plain[0]["actor/grad_norm"]


@pytest.mark.parametrize("correction", ["none", "token_mask", "sequence_truncate", "sequence_mask", "ppo_clip"])
def test_on_policy_no_correction_changes_anything(rank_pool, folder, plain, correction):
    found = records(rank_pool, folder, correction, hybrid_rollout_correction=correction, hybrid_prefix_correction=True)
    # The sampler decodes token by token, the trainer all at once: ratios are 1 up to fp32 roundings.
    assert same(found, plain, "actor/grad_norm")
    for record in found:
        assert record["rollout_corr/rollout_is_mean"] == pytest.approx(1, abs=1e-4)
        assert record["rollout_corr/rollout_is_eff_sample_size"] == pytest.approx(1, abs=1e-4)
        assert abs(record["rollout_corr/kl"]) < 1e-4


IMITATION = {"hybrid_discount": 0, "hybrid_reward_weight": 0, "hybrid_imitation_weight": 1.0}
IMITATION |= {"train_iters": 12, "lr": 1e-2, "min_lr": 1e-2}


@pytest.fixture(scope="module")
def other(rank_pool, folder) -> list[dict[str, Any]]:
    """The first step of imitation under reverse KL."""
    return records(rank_pool, folder, "reverse_kl", **IMITATION | {"train_iters": 1})


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "skewed_kl", "skewed_reverse_kl"])
def test_another_divergence_is_trained_on_and_both_are_reported(rank_pool, folder, other, divergence):
    found = records(rank_pool, folder, divergence, hybrid_divergence=divergence, **IMITATION)
    # Same student, same responses: only the divergence differs. Numbers may come close (the norm under forward_kl to
    # 6e-4 here: the student is nearly uniform), equal ones would agree to 1e-6.
    assert found[0]["actor/kl_loss"] == other[0]["actor/kl_loss"]
    assert found[0]["actor/distillation/loss"] != pytest.approx(other[0]["actor/kl_loss"], rel=1e-4)
    assert found[0]["actor/grad_norm"] != pytest.approx(other[0]["actor/grad_norm"], rel=1e-4)
    # Twelve steps of Adam at 1e-2 move the student visibly; by how much is not what is tested.
    assert found[-1]["actor/distillation/loss"] < found[0]["actor/distillation/loss"]


def test_topk_of_the_whole_vocabulary_is_the_whole_teacher(rank_pool, folder, plain):
    whole = records(rank_pool, folder, "top16", hybrid_teacher_payload="topk", hybrid_teacher_topk=16)
    assert same(whole, plain, "actor/kl_loss") and same(whole, plain, "actor/grad_norm")


@pytest.mark.parametrize(
    ("size", "layout"), [(1, {}), (2, {"tensor_model_parallel_size": 2}), (2, {"pipeline_model_parallel_size": 2})]
)
def test_fewer_tokens_of_the_teacher_bound_the_kl_from_below_on_every_layout(rank_pool, folder, start, size, layout):
    few = {"hybrid_teacher_payload": "topk", "hybrid_teacher_topk": 3}
    found = records(rank_pool, folder, f"top3 {layout}", size, **start, **few, **layout)
    if size > 1:
        assert same(found, steps(folder, "top3 {}"), "actor/grad_norm")
    else:
        whole = records(rank_pool, folder, "top3 whole", **start)
        assert 0 < found[0]["actor/kl_loss"] < whole[0]["actor/kl_loss"]


def test_one_collection_serves_mini_batches_and_epochs(rank_pool, folder):
    flags = {
        "train_iters": 8,
        "hybrid_mini_batches": 2,
        "hybrid_ppo_epochs": 2,
        "hybrid_rollout_correction": "ppo_clip",
    }
    found = records(rank_pool, folder, "ppo", lr=3e-2, min_lr=3e-2, **flags)
    assert [record["training/policy_age"] for record in found] == [0, 1, 2, 3] * 2
    # Two mini-batches are one collection: their mean is the same in both epochs.
    scores = [record["critic/score/mean"] for record in found]
    assert scores[0] + scores[1] == pytest.approx(scores[2] + scores[3])
    assert [record["rollout_corr/rollout_is_max"] > 1.001 for record in found] == [False, True, True, True] * 2
    assert all(record["actor/pg_clipfrac"] == 0 for record in found[::4])
    assert max(record["actor/pg_clipfrac"] for record in found) > 0


def test_a_run_stopped_between_collections_or_inside_one_goes_on_exactly(rank_pool, folder):
    fixed = {"train_iters": 6, "lr_decay_iters": 6, "hybrid_mini_batches": 2, "hybrid_ppo_epochs": 2}

    def flags(name: str, **more: Any) -> dict[str, Any]:
        return fixed | {"save": f"{folder}/{name}-checkpoints", "save_interval": 2} | more

    whole = records(rank_pool, folder, "batches", **flags("batches"))
    for stop in (4, 3):  # Megatron also saves where it is stopped, and that may be anywhere
        name = f"batches-{stop}"
        records(rank_pool, folder, name, **flags(name, exit_interval=stop))
        parts = records(rank_pool, folder, name, **flags(name, load=f"{folder}/{name}-checkpoints"))
        assert parts == whole
        assert [record["training/policy_age"] for record in parts] == [0, 1, 2, 3, 0, 1]


def test_a_collection_of_another_layout_is_sampled_anew(rank_pool, folder):
    fixed = {"train_iters": 4, "lr_decay_iters": 4, "hybrid_mini_batches": 2, "save_interval": 1}
    fixed |= {"save": f"{folder}/moved-checkpoints"}
    records(rank_pool, folder, "moved", 2, **fixed, exit_interval=1)
    moved = records(rank_pool, folder, "moved", **fixed, load=f"{folder}/moved-checkpoints")
    assert [record["training/policy_age"] for record in moved] == [0, 0, 0, 1]


def test_a_collection_of_other_batches_is_sampled_anew(rank_pool, folder):
    fixed = {"train_iters": 4, "lr_decay_iters": 4, "save_interval": 1, "save": f"{folder}/recut-checkpoints"}
    records(rank_pool, folder, "recut", **fixed, hybrid_mini_batches=2, exit_interval=1)
    load = {"load": f"{folder}/recut-checkpoints", "hybrid_mini_batches": 4}
    recut = records(rank_pool, folder, "recut", **fixed | load)
    assert [record["training/policy_age"] for record in recut] == [0, 0, 1, 2]


def test_schedules_are_followed_and_reported(rank_pool, folder):
    found = records(
        rank_pool,
        folder,
        "schedules",
        train_iters=3,
        hybrid_reward_weight=2.0,
        hybrid_reward_weight_schedule="linear:0:2",
        hybrid_discount_schedule="steps:0.25@1",
    )
    assert [record["actor/reward_weight"] for record in found] == [0, 1, 2]
    assert [record["actor/discount"] for record in found] == [0.5, 0.25, 0.25]
    assert [record["actor/imitation_weight"] for record in found] == [0.1] * 3


def test_a_fixed_copy_of_the_student_starts_at_no_distance(rank_pool, folder):
    found = records(rank_pool, folder, "self", hybrid_teacher_load="self", train_iters=4)
    distances = [record["actor/kl_loss"] for record in found]
    assert abs(distances[0]) < 1e-9  # equal weights, equal bits: the KL is that of p and p
    assert distances[3] > 1e-6  # three steps of 3e-3 move it by far more than fp32 resolves


@pytest.mark.parametrize(
    "following", [{"hybrid_teacher_ema_decay": 0.5}, {"hybrid_teacher_refresh_interval": 2}], ids=["ema", "refresh"]
)
def test_a_copy_that_follows_stays_nearer_and_survives_a_stop(rank_pool, folder, following):
    name = next(iter(following))
    fixed = {"train_iters": 4, "lr_decay_iters": 4, "hybrid_teacher_load": "self"}

    def flags(name: str, **more: Any) -> dict[str, Any]:
        return {"save": f"{folder}/{name}-checkpoints", "save_interval": 3} | fixed | following | more

    whole = records(rank_pool, folder, f"{name}-whole", **flags(f"{name}-whole"))
    fixed_copy = steps(folder, "self")
    if "hybrid_teacher_ema_decay" in following:  # half way after the student: a quarter of the distance
        assert 1e-9 < whole[1]["actor/kl_loss"] < 0.5 * fixed_copy[1]["actor/kl_loss"]
    else:
        assert whole[1]["actor/kl_loss"] == fixed_copy[1]["actor/kl_loss"]
        assert abs(whole[2]["actor/kl_loss"]) < 1e-9
    records(rank_pool, folder, f"{name}-parts", **flags(f"{name}-parts", exit_interval=3))
    parts = records(
        rank_pool, folder, f"{name}-parts", **flags(f"{name}-parts", load=f"{folder}/{name}-parts-checkpoints")
    )
    assert parts == whole


def test_the_mean_of_earlier_rewards_survives_a_stop(rank_pool, folder):
    fixed = {"train_iters": 4, "lr_decay_iters": 4, "hybrid_baseline": "running_mean", "save_interval": 2}
    fixed |= {"hybrid_prompts": f"{folder}/two.jsonl", "hybrid_max_response_length": 1}  # a word is right by chance
    make_prompts(folder / "two.jsonl", ["w1", "w5"])
    for size, layout in ((1, {}), (2, {"pipeline_model_parallel_size": 2})):
        name = f"mean{size}"
        own = fixed | layout | {"save": f"{folder}/{name}"}
        whole = records(rank_pool, folder, f"{name}-whole", size, **own | {"save": f"{folder}/{name}-other"})
        records(rank_pool, folder, f"{name}-parts", size, **own, exit_interval=2)
        parts = records(rank_pool, folder, f"{name}-parts", size, **own, load=f"{folder}/{name}")
        assert parts == whole
        assert whole[0]["critic/score/mean"] > 0, "else there is nothing to remember"


def filter_flags(folder: Any, start: dict[str, Any], name: str, layout: dict[str, Any]) -> dict[str, Any]:
    """A run of two tasks that filters its imitation."""
    prompts = [{"prompt": w, "answer": a, "task": t} for w, a, t in (("w1", "w2", "one"), ("w5", "w6", "other"))]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    flags = start | {"train_iters": 4, "lr_decay_iters": 4, "save_interval": 2, "save": f"{folder}/{name}"}
    flags |= {"hybrid_prompts": f"{folder}/tasks.jsonl", "hybrid_max_response_length": 1}
    flags |= {"hybrid_imitation_filter": "task", "hybrid_imitation_filter_floor": 0}
    flags["seed"] = 8  # of eight the one whose first step has an answer that the teacher likes less than its peers
    return flags | layout


def imitation_shares(found: list[dict[str, Any]]) -> list[float]:
    return [record[f"training/imitation_share/{task}"] for record in found for task in ("one", "other")]


@pytest.fixture(scope="module")
def filtered(rank_pool, folder, start) -> list[dict[str, Any]]:
    """A run with the filter of imitation on one rank."""
    return records(rank_pool, folder, "filtered", **filter_flags(folder, start, "filtered", {}))


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2},
        {"context_parallel_size": 2},
        {},
    ],
    ids=["TP 2", "PP 2", "CP 2", "DP 2"],
)
def test_the_filter_of_imitation_acts_alike_on_every_layout(rank_pool, folder, start, filtered, layout):
    name = f"filtered{''.join(layout)}-2"
    found = records(rank_pool, folder, name, 2, **filter_flags(folder, start, name, layout))
    assert same(found, filtered, "actor/grad_norm")
    shares = imitation_shares(found)
    assert shares == imitation_shares(filtered)
    assert set(shares) == {0, 1}, "else nothing was filtered, or all"
    assert shares[:2] == [1, 1], "nothing is known before the first step"


@pytest.mark.parametrize("layout", [{}, {"pipeline_model_parallel_size": 2}], ids=["one rank", "PP 2"])
def test_what_the_filter_of_imitation_has_seen_survives_a_stop(rank_pool, folder, start, layout):
    size = 1 + len(layout)
    whole = records(rank_pool, folder, f"whole{size}", size, **filter_flags(folder, start, f"whole{size}", layout))
    parts = filter_flags(folder, start, f"parts{size}", layout)
    records(rank_pool, folder, f"parts{size}", size, **parts, exit_interval=2)
    goes_on = {"load": parts["save"], "finetune": False}
    assert records(rank_pool, folder, f"parts{size}", size, **parts | goes_on) == whole
    assert imitation_shares(whole)[4:6] != [1, 1], f"else there is nothing to remember: {imitation_shares(whole)}"


def test_a_hint_moves_the_teacher_and_not_the_rollouts(rank_pool, folder, plain):
    found = records(rank_pool, folder, "hint", hybrid_teacher_hint="{answer}")
    assert found[0]["critic/score/mean"] == plain[0]["critic/score/mean"]
    assert found[0]["actor/kl_loss"] != pytest.approx(plain[0]["actor/kl_loss"], rel=1e-3)


@pytest.mark.parametrize("size", [1, 2])
def test_a_mixture_of_teachers_lies_between_them(rank_pool, folder, plain, size):
    layout = {"pipeline_model_parallel_size": size}
    if not (folder / "second").exists():
        (folder / "second").mkdir()
        (folder / "second" / "tokenizer").symlink_to(folder / "tokenizer")
        other = {"seed": 78, "num_layers": 2, "hidden_size": 64, "untie_embeddings_and_output_weights": True}
        rank_pool(1, init=False).run(make_teacher, f"{folder}/second", other)
    second = f"{folder}/second/teacher"
    alone = records(rank_pool, folder, f"second{size}", size, hybrid_teacher_load=second, **layout)
    mixed = records(
        rank_pool, folder, f"mixed{size}", size, hybrid_teacher_load=f"3*{folder}/teacher,1*{second}", **layout
    )
    kl = [run_[0]["actor/kl_loss"] for run_ in (plain, alone, mixed)]
    # Convexity: a mixture is never farther than the mixed distances, and each share c costs at most -log c more.
    assert kl[2] <= 0.75 * kl[0] + 0.25 * kl[1] + 1e-6
    assert kl[2] <= min(kl[0] - math.log(0.75), kl[1] - math.log(0.25))
    one_per_task = records(rank_pool, folder, f"tasks{size}", size, hybrid_teacher_load=f"*={second}", **layout)
    assert same(one_per_task, alone, "actor/kl_loss")
