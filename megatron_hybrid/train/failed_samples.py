"""Responses that could not be scored, and prompts that a server did not answer: what becomes of them, and a record.

    RUN_DIR/failed_samples_<replica>.jsonl     step, prompt, response and reason, some per collection, bounded in all

Whether the run ends is decided here; otherwise their scores count as 0 or their groups are dropped (`credit.py`), and
every step counts them (`training/failed_*`). The record helps to mend a reward, so no fault in writing it ends a run.
One rank of each replica writes; what an earlier start has written of later steps is moved aside by `report.py`. No
collective.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_hybrid.online_config import OnlineConfig
from megatron_hybrid.parallel import ParallelContext
from megatron_hybrid.records import Prompt, RolloutBatch
from megatron_hybrid.train.journal import plain

logger = logging.getLogger(__name__)

KEPT_PER_COLLECTION = 16
"""The first ones: what is wrong with a reward shows in a few."""
LONGEST_TEXT = 4000
"""Characters of each text."""
LARGEST_FILE_BYTES = 1 << 26


class FailedSamples:
    """What a run does about them.

    Args:
        online: the settings `on_failed_reward`, `on_failed_rollout` and `run_dir`.
        parallel: this rank's place: the first of the last stage writes for its replica.
    """

    def __init__(self, online: OnlineConfig, parallel: ParallelContext) -> None:
        self._on_reward, self._on_rollout = online.on_failed_reward, online.on_failed_rollout
        self._speaks = parallel.is_last_stage and parallel.tp.rank == parallel.cp.rank == 0
        self._file = Path(online.run_dir, f"failed_samples_{parallel.dp.rank}.jsonl")
        self._writes = self._speaks
        self.step = 0
        """That responses are collected for, or that is evaluated; set by the loop."""

    @property
    def drops_rewards(self) -> bool:
        """Whether the group of a response without a reward is dropped; else it scores 0."""
        return self._on_reward == "drop"

    def rewards_failed(self, rollouts: RolloutBatch, errors: Mapping[int, Exception]) -> None:
        """Records the rows; raises the first error where that ends the run."""
        rows = sorted(errors)
        self._write(
            [
                {
                    "kind": "reward",
                    "policy_version": rollouts.policy_version,
                    **_of_prompt(rollouts.prompts[row]),
                    "response": _short(rollouts.responses[row]),
                    "error": _error(errors[row]),
                }
                for row in rows[:KEPT_PER_COLLECTION]
            ]
        )
        if self._on_reward == "stop":
            raise errors[rows[0]]
        done = "their groups are dropped" if self.drops_rewards else "they score 0"
        self._say(f"{len(rows)} of {len(rollouts.prompts)} responses have no reward, {done}", errors[rows[0]])

    def rollouts_failed(self, failed: Sequence[tuple[Prompt, Exception]]) -> None:
        """Records the prompts; raises the first error where that ends the run. For every rank of a replica to call."""
        kept = failed[:KEPT_PER_COLLECTION]
        self._write([{"kind": "rollout", **_of_prompt(prompt), "error": _error(error)} for prompt, error in kept])
        if self._on_rollout == "stop":
            raise failed[0][1]
        self._say(f"{len(failed)} prompts have no responses, their groups are dropped", failed[0][1])

    def _say(self, what: str, why: Exception) -> None:
        if self._speaks:
            logger.warning("%s (see %s). The first: %s", what, self._file, _error(why)[:LONGEST_TEXT])

    def _write(self, records: Sequence[dict[str, Any]]) -> None:
        if not self._writes:
            return
        # ASCII alone: a response may hold half a surrogate pair, which is no UTF-8.
        text = "".join(json.dumps(plain({"step": self.step, **record})) + "\n" for record in records)
        try:
            with open(self._file, "a", encoding="ascii") as file:
                if file.tell() + len(text) <= LARGEST_FILE_BYTES:
                    file.write(text)
                    return
            reason = f"it is full, at {LARGEST_FILE_BYTES} bytes"
        except OSError as error:
            reason = str(error)
        logger.warning("nothing more is written to %s: %s", self._file, reason)
        self._writes = False


def _of_prompt(prompt: Prompt) -> dict[str, Any]:
    about = {"prompt_id": prompt.prompt_id, "task": prompt.task, "prompt": _short(prompt.text)}
    return about | {"answer": None if prompt.answer is None else _short(prompt.answer)}


def _error(error: Exception) -> str:
    return _short(f"{type(error).__name__}: {error}")


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}... ({len(text)} characters)"
