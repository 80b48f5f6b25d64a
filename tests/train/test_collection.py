"""A kept collection comes back whole on all ranks or on none, to the run that made it, and as plain data."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.parallel import GroupView, ParallelContext
from megatron_hybrid.records import Prompt, RolloutBatch
from megatron_hybrid.train.collection import fingerprint, load_collection, save_collection
from megatron_hybrid.train.credit import Scored
from tests.planted import Planted


def scored() -> Scored:
    """Two rows of this rank's own."""
    tokens = torch.arange(6).view(2, 3) + 10 * dist.get_rank()
    rollouts = RolloutBatch(
        prompts=(Prompt(3, (1, 2), "1 + 1?", "sums", "2", {"made by": object}, (1, 7)),) * 2,
        tokens=tokens,
        response_mask=tokens > 1,
        sampled_logprobs=-tokens.float(),
        group_id=torch.zeros(2, dtype=torch.long),
        truncated=(False, True),
        responses=("2", "3"),
        temperature=1.0,
        policy_version=4,
        seed=5,
    )
    rewards = torch.tensor([1.0, 0.0])
    return Scored(rollouts, rewards, rewards - 0.5, {"exact_match": rewards})


def made_by(global_batch_size: int = 4, **settings: Any) -> dict[str, Any]:
    replicas = ParallelContext(dp=GroupView.of(dist.group.WORLD))
    return fingerprint(HybridConfig(**{"mini_batches": 2} | settings), replicas, global_batch_size)


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(value, theirs[key]) for key, value in ours.items())
    if isinstance(ours, RolloutBatch | Scored):
        return type(ours) is type(theirs) and same(vars(ours), vars(theirs))
    return bool(ours == theirs)


def keep_and_load(folder: str) -> dict[str, bool]:
    """What comes back on this rank in each case."""
    from megatron_hybrid.runtime import cpu

    place, rank, found = Path(folder, "kept"), dist.get_rank(), {}
    with cpu.enabled():
        if rank == 0:
            place.mkdir()
            (place / "rank_7.pt").write_bytes(b"of a wider run")
        dist.barrier()
        save_collection(place, scored(), made_by())
        kept = load_collection(place, made_by())
        bare = tuple(dataclasses.replace(prompt, entry={}) for prompt in scored().rollouts.prompts)
        expected = dataclasses.replace(scored(), rollouts=dataclasses.replace(scored().rollouts, prompts=bare))
        found["all of it"] = same(expected, kept)
        found["old parts"] = (place / "rank_7.pt").exists()
        others = ({"mini_batches": 4}, {"ppo_epochs": 2}, {"group_size": 2}, {"global_batch_size": 8})
        found["to others"] = any(load_collection(place, made_by(**other)) for other in others)
        dist.barrier()
        whole = (place / f"rank_{rank}.pt").read_bytes()
        if rank == 1:
            (place / "rank_1.pt").write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
        found["altered"] = load_collection(place, made_by()) is not None
        if rank == 1:
            data = io.BytesIO()
            torch.save({"made_by": made_by(), "scored": Planted(f"{folder}/ran")}, data)
            (place / "rank_1.pt").write_bytes(hashlib.sha256(data.getbuffer()).digest() + data.getbuffer())
        found["planted"] = load_collection(place, made_by()) is not None
        if rank == 1:
            (place / "rank_1.pt").unlink()
        found["a part"] = load_collection(place, made_by()) is not None
    return found


def test_all_parts_come_back_to_the_run_that_kept_them_or_none(rank_pool, tmp_path):
    expected = {
        "all of it": True,
        "old parts": False,
        "to others": False,
        "altered": False,
        "planted": False,
        "a part": False,
    }
    assert rank_pool(2).run(keep_and_load, str(tmp_path)) == [expected, expected]
    assert not (tmp_path / "ran").exists(), "a checkpoint's folder must not run code"


@pytest.mark.parametrize("axis", ["tp", "pp", "dp", "cp"])
def test_each_axis_is_part_of_what_a_collection_fits(axis):
    one, two = (fingerprint(HybridConfig(), ParallelContext(**{axis: GroupView(None, 0, n)}), 4) for n in (1, 2))
    assert one != two
