"""A teacher that was asked once trains as the teacher itself, whatever the layouts of both jobs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.online_jobs import ONLINE, run, steps, with_teacher
from tests.recorded_jobs import fill_store, record, refused
from tests.tiny import command_line

ROOT = Path(__file__).parents[2]
TOPK = {"hybrid_teacher_payload": "topk", "hybrid_teacher_topk": 5, "hybrid_teacher_temperature": 1.25}
PP, TP = {"pipeline_model_parallel_size": 2}, {"tensor_model_parallel_size": 2}


@pytest.fixture(scope="module")
def old(rank_pool: Any, folder: Path) -> Path:
    """What an online run of two steps sampled."""
    path = folder / "old.jsonl"
    rank_pool(1, init=False).run(record, str(folder), with_teacher(folder, "sampling", train_iters=2), str(path))
    return path


def flags_of(folder: Path, name: str, old: Path, **more: Any) -> dict[str, Any]:
    flags = {"hybrid_prompts": None, "hybrid_rollouts": str(old), "train_iters": 2}
    return with_teacher(folder, name, **flags) | TOPK | more


def stored(rank_pool: Any, folder: Path, old: Path, name: str, size: int, layout: dict[str, Any]) -> Path:
    """A store made on this layout, with micro-batches that do not divide the responses of a replica."""
    made = folder / f"store {name}"
    flags = flags_of(folder, f"making {name}", old, micro_batch_size=3, global_batch_size=24, **layout)
    # The cost's baseline asks for whole groups in a micro-batch, which a teacher alone has no use for.
    said = rank_pool(size, init=False).run(fill_store, str(folder), str(made), flags | {"hybrid_cost_baseline": "none"})
    last = [line for lines in said for line in lines][-1]
    assert f"{56 // (1 if layout else size)}/" in last and "left 0:00:00" in last
    return made


@pytest.mark.parametrize(
    ("made_on", "size", "layout"),
    [
        pytest.param((1, {}), 1, {}, id="one rank, one rank"),
        pytest.param((2, PP), 2, TP, id="made on PP 2, read on TP 2"),
        pytest.param((2, TP), 2, PP, id="made on TP 2, read on PP 2"),
        pytest.param((2, {}), 2, {"context_parallel_size": 2}, id="made on DP 2, read on CP 2"),
    ],
)
def test_a_run_from_the_store_is_the_run_with_the_teacher(rank_pool, folder, old, made_on, size, layout):
    name = f"{made_on} {layout}"
    start = {"load": f"{folder}/teacher", "finetune": True, "hybrid_teacher_load": f"{folder}/teacher"}
    first = {"lr": 3e-2, "min_lr": 3e-2}  # the student is the teacher at first, and moves away
    made = stored(rank_pool, folder, old, name, *made_on)
    live, store = (flags_of(folder, f"{kind} {name}", old, **start | first | layout) for kind in ("live", "stored"))
    store |= {"hybrid_teacher_load": None, "hybrid_teacher_store": str(made)}
    for flags in (live, store):
        rank_pool(size, init=False).run(run, str(folder), flags)
    expected, ours = steps(folder, f"live {name}"), steps(folder, f"stored {name}")
    assert expected[1]["actor/kl_loss"] > 1e-4
    for with_teacher_, from_store in zip(expected, ours, strict=True):
        assert with_teacher_.keys() == from_store.keys()
        assert with_teacher_.pop("kind") == from_store.pop("kind") == "step"
        for key, value in with_teacher_.items():
            # The teacher's own fp32 sums in another order where its layout or padding is another.
            assert from_store[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def refusal(rank_pool: Any, job: Any, *args: Any) -> str:
    return rank_pool(1, init=False).run(refused, job, *args)[0]


def test_what_cannot_be_stored_or_read_is_refused(rank_pool, folder, old):
    flags = flags_of(folder, "refused", old)
    store = f"{folder}/refused store"
    for change, message in (
        ({"hybrid_rollouts": None, "hybrid_prompts": f"{folder}/prompts.jsonl"}, "rollouts is None and teacher_load"),
        ({"hybrid_teacher_load": "self"}, "teacher_load 'self': a teacher of its own weights"),
        ({"hybrid_teacher_payload": "hidden"}, "a store holds likeliest tokens"),
    ):
        assert message in refusal(rank_pool, fill_store, str(folder), store, flags | change)
    made = stored(rank_pool, folder, old, "whole", 1, {})
    assert "already holds .safetensors files" in refusal(rank_pool, fill_store, str(folder), str(made), flags)
    read = flags | {"hybrid_teacher_load": None, "hybrid_teacher_store": str(made)}
    for change, message in (
        ({"hybrid_teacher_payload": "hidden"}, "a store holds a teacher's likeliest tokens alone"),
        ({"hybrid_teacher_topk": 6}, "holds the 5 likeliest tokens, and teacher_topk is 6"),
        ({"hybrid_system_prompt": "w1"}, "has no answer for 56 of 56 responses, the first is line"),
    ):
        assert message in refusal(rank_pool, run, str(folder), read | change)


@pytest.mark.procs
def test_the_tool_writes_a_store_from_its_command_line(folder, old):
    flags = ONLINE | {"tokenizer_model": f"{folder}/tokenizer"} | flags_of(folder, "tool", old)
    command = [sys.executable, str(ROOT / "tools" / "precompute_teacher.py"), "--store", f"{folder}/by tool"]
    done = subprocess.run(
        [*command, *command_line(**flags)[1:]], capture_output=True, text=True, timeout=280, env=os.environ.copy()
    )
    assert done.returncode == 0, done.stderr
    assert "teacher store: 56/56 responses" in done.stdout
    assert [path.name for path in Path(folder, "by tool").iterdir()] == ["replica_00000_00000.safetensors"]
