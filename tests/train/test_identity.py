"""What a run learnt from is kept in its checkpoints, and a run that goes on with something else says so or stops."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.train.identity import BLOCK_BYTES, NUM_BLOCKS, compare, sampled_digest
from tests.online_jobs import make_prompts, make_teacher, run, steps, with_teacher

SETTINGS = {"mini_batches": 2, "ppo_epochs": 1, "group_size": 4, "global_batch_size": 32, "lr": 1e-3}
ONE = {"TP": 2, "PP": 1, "VPP": 1, "CP": 1, "DP": 1}


def identity(**changes: Any) -> dict[str, dict[str, Any]]:
    inputs = {"teacher": ["aaaaaaaaaa", "t/one"], "seed": ["1", "1"]}
    return {"inputs": inputs, "settings": dict(SETTINGS), "layout": dict(ONE)} | copy.deepcopy(changes)


def test_the_same_run_goes_on_in_silence(caplog):
    compare(identity(), identity(), step=4, allowed=False)
    assert not caplog.records


def test_another_teacher_is_refused_by_both_names_or_allowed_and_said(caplog):
    other = identity(inputs={"teacher": ["bbbbbbbbbb", "t/two"], "seed": ["1", "1"]})
    with pytest.raises(ConfigError, match=r"step 4 .*teacher t/one \[aaaaaaaa\] -> t/two \[bbbbbbbb\] .*allow-other"):
        compare(identity(), other, step=4, allowed=False)
    compare(identity(), other, step=4, allowed=True)
    assert "from step 4 on the run learns from something else: teacher t/one [aaaaaaaa] -> t/two" in caplog.text


def test_a_teacher_that_was_only_moved_is_the_same(caplog):
    moved = identity(inputs={"teacher": ["aaaaaaaaaa", "elsewhere"], "seed": ["1", "1"]})
    compare(identity(), moved, step=4, allowed=False)
    assert not caplog.records


def test_settings_are_said_and_where_prompts_go_on(caplog):
    compare(identity(), identity(settings=SETTINGS | {"lr": 2e-3, "global_batch_size": 64}), step=4, allowed=False)
    assert "from step 4 on with other settings: global_batch_size 32 -> 64, lr 0.001 -> 0.002" in caplog.text
    # Two collections of two steps: 16 prompts each of the old size, 32 of the new.
    assert "prompts go on at position 64, where step 4 of such batches is; the run had come to 32" in caplog.text


def test_another_layout_says_what_is_not_exact_any_more(caplog):
    compare(identity(), identity(layout=ONE | {"TP": 1, "PP": 2}), step=3, allowed=False)
    assert "TP 2 x PP 1 x VPP 1 x CP 1 x DP 1 -> TP 1 x PP 2 x VPP 1 x CP 1 x DP 1" in caplog.text
    assert "sums are made in another order" in caplog.text
    assert "The collection of rollouts that step falls into is sampled anew" in caplog.text


def test_a_digest_sees_names_sizes_and_blocks_spread_over_a_file(tmp_path):
    file = tmp_path / "a.distcp"
    file.write_bytes(bytes(4 * BLOCK_BYTES * NUM_BLOCKS))
    found = [sampled_digest(tmp_path, "*.distcp")]

    def change(at: int, to: bytes) -> None:
        with open(file, "r+b") as changed:
            changed.seek(at)
            changed.write(to)
        found.append(sampled_digest(tmp_path, "*.distcp"))

    change(0, b"1")
    change(file.stat().st_size - 1, b"1")
    change(file.stat().st_size // 2, b"1" * 4 * BLOCK_BYTES)
    change(file.stat().st_size, b"0")
    file.rename(tmp_path / "b.distcp")
    found.append(sampled_digest(tmp_path, "*.distcp"))
    assert len(set(found)) == len(found)
    (tmp_path / "b.distcp").write_bytes(b"small")
    small = sampled_digest(tmp_path, "*.distcp")
    (tmp_path / "b.distcp").write_bytes(b"smell")
    assert sampled_digest(tmp_path, "*.distcp") != small


def test_a_resumed_run_refuses_other_prompts_and_another_teacher_until_told(rank_pool, folder: Path):
    def flags(**more: Any) -> dict[str, Any]:
        own = {"save": f"{folder}/known-checkpoints", "load": f"{folder}/known-checkpoints", "save_interval": 1}
        return with_teacher(folder, "known", train_iters=2, lr_decay_iters=2) | own | more

    def start(**more: Any) -> str:
        return str(rank_pool(1, init=False).run(run, str(folder), flags(**more))[0])

    start(exit_interval=1)
    (folder / "other").mkdir()
    (folder / "other" / "tokenizer").symlink_to(folder / "tokenizer")
    rank_pool(1, init=False).run(make_teacher, f"{folder}/other", {"seed": 78})
    make_prompts(folder / "others.jsonl", ["w1", "w5"])
    others = {"hybrid_teacher_load": f"{folder}/other/teacher", "hybrid_prompts": f"{folder}/others.jsonl"}
    with pytest.raises(ConfigError, match=r"teacher .*/teacher .*/other/teacher .*; prompts .*/others\.jsonl .*; seed"):
        start(**others, seed=5)
    start(**others, seed=5, hybrid_allow_other_inputs=True)
    assert [record["step"] for record in steps(folder, "known")] == [1, 2]
