"""What fails is written down, within bounds; what then becomes of it is what the settings say."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hybrid.errors import RewardError, ServerError
from megatron_hybrid.online_config import OnlineConfig
from megatron_hybrid.parallel import GroupView, ParallelContext
from megatron_hybrid.records import RewardBatch
from megatron_hybrid.train import failed_samples
from megatron_hybrid.train.credit import Scored
from megatron_hybrid.train.failed_samples import KEPT_PER_COLLECTION, LONGEST_TEXT, FailedSamples
from tests.rewards.test_rubric import rollouts


def made(folder: Path, parallel: ParallelContext | None = None, **settings: Any) -> FailedSamples:
    online = OnlineConfig(run_dir=str(folder), rollout_server="https://a", **settings)
    return FailedSamples(online, parallel or ParallelContext())


def records(folder: Path, replica: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"failed_samples_{replica}.jsonl").read_text().splitlines()]


def test_a_failed_reward_ends_the_run_and_is_on_record(tmp_path):
    with pytest.raises(RewardError, match="the first"):
        made(tmp_path).rewards_failed(
            rollouts(["a", "b\ud800", "c"]), {2: RewardError("later"), 1: RewardError("the first")}
        )
    first, second = records(tmp_path)
    assert first == {
        "step": 0,
        "kind": "reward",
        "policy_version": 0,
        "prompt_id": 1,
        "task": "file",
        "prompt": "?",
        "answer": "ab",
        "response": "b\ud800",
        "error": "RewardError: the first",
    }
    assert second["error"] == "RewardError: later"


@pytest.mark.parametrize("policy", ["zero", "drop"])
def test_otherwise_the_run_goes_on_and_says_so(tmp_path, policy, caplog):
    made(tmp_path, on_failed_reward=policy).rewards_failed(rollouts(["a", "b"]), {0: RewardError("why")})
    (line,) = [record.message for record in caplog.records]
    assert "1 of 2 responses have no reward" in line and "why" in line and str(tmp_path) in line


def test_prompts_without_a_response_end_the_run_or_not(tmp_path):
    failed = [(prompt, ServerError("down")) for prompt in rollouts(["a", "b"]).prompts]
    with pytest.raises(ServerError, match="down"):
        made(tmp_path).rollouts_failed(failed)
    made(tmp_path, on_failed_rollout="drop").rollouts_failed(failed)
    assert [record["kind"] for record in records(tmp_path)] == ["rollout"] * 4


def test_the_record_is_bounded(tmp_path, monkeypatch, caplog):
    size = 3 * KEPT_PER_COLLECTION
    errors = {row: RewardError("e" * 10**6) for row in range(size)}
    ours = made(tmp_path, on_failed_reward="zero")
    ours.rewards_failed(rollouts(["r" * 10**6] * size), errors)
    assert len(records(tmp_path)) == KEPT_PER_COLLECTION
    written = (tmp_path / "failed_samples_0.jsonl").stat().st_size
    assert written < KEPT_PER_COLLECTION * (2 * LONGEST_TEXT + 1000)
    monkeypatch.setattr(failed_samples, "LARGEST_FILE_BYTES", written)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            ours.rewards_failed(rollouts(["a"]), {0: RewardError("one more")})
    assert len(records(tmp_path)) == KEPT_PER_COLLECTION
    assert len([record for record in caplog.records if "nothing more is written" in record.message]) == 1


def test_a_folder_that_cannot_be_written_costs_no_run(tmp_path, caplog):
    ours = made(tmp_path / "nowhere", on_failed_reward="zero")
    for _ in range(2):
        ours.rewards_failed(rollouts(["a"]), {0: RewardError("why")})
    assert len([record for record in caplog.records if "No such file" in record.message]) == 1


@pytest.mark.parametrize("axis", ["tp", "cp", "pp"])
def test_one_rank_of_a_replica_writes(tmp_path, axis):
    """The first of the last stage."""
    for rank in range(2):
        here = ParallelContext(dp=GroupView(None, 3, 4), **{axis: GroupView(None, rank, 2)})
        made(tmp_path, here, on_failed_rollout="drop").rollouts_failed([(rollouts(["a"]).prompts[0], ServerError("x"))])
    assert len(records(tmp_path, 3)) == 1


@pytest.mark.parametrize(
    ("drop_failed", "failed", "unanswered", "dropped"),
    [
        (True, (1,), (), [True, True, False, False]),
        (False, (1,), (), None),
        (True, (), (), None),
        (False, (0,), (3,), [False, False, True, True]),
        (True, (0,), (3,), [True, True, True, True]),
    ],
)
def test_whole_groups_are_dropped(drop_failed, failed, unanswered, dropped):
    batch = rollouts(["a"] * 4)
    object.__setattr__(batch, "group_id", torch.tensor([5, 5, 2, 2]))
    object.__setattr__(batch, "unanswered", tuple(row in unanswered for row in range(4)) if unanswered else ())
    scores = RewardBatch(torch.zeros(4), failed=torch.tensor([row in failed for row in range(4)]))
    found = Scored(batch).rewarded(scores, drop_failed=drop_failed)
    assert (None if found.dropped is None else found.dropped.tolist()) == dropped
    assert found.failed is not None and found.failed.tolist() == [row in failed for row in range(4)]
    if dropped is not None:
        part = found.take([3, 0])
        assert part.dropped is not None and part.dropped.tolist() == [dropped[3], dropped[0]]
        assert part.rollouts.unanswered == ((3 in unanswered, 0 in unanswered) if unanswered else ())
