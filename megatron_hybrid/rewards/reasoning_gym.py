"""Scores with the task's own scorer from reasoning-gym, configured as the question was.

Most scorers give partial credit, often the share of the response that the answer makes up: short and right beats long
and right. The tasks whose scorer would run the response as Python are refused by the prompt source.
"""

import importlib
import json
import logging
import re
from functools import lru_cache
from typing import Any

from megatron_hybrid.errors import DataError
from megatron_hybrid.records import Prompt
from megatron_hybrid.rewards.base import extract_answer

_MONSTROUS = re.compile(r"\d\.?e[+-]?\d{5}", re.IGNORECASE)
"""A number like 1e999999999. Fraction, which a scorer calls, writes it out: only the end of memory stops that."""

_log = logging.getLogger(__name__)


class ReasoningGymReward:
    """Score of the extracted answer under `entry["record"]`, in [0, 1] for all tasks known to us."""

    name = "reasoning_gym"
    main_thread_only = False

    def score(self, prompt: Prompt, response: str) -> float:
        if prompt.entry.get("source") != "reasoning_gym":
            raise DataError(
                f"prompt {prompt.prompt_id} (task {prompt.task!r}) is not from reasoning-gym, so its scorer cannot "
                "judge it: use exact_match or math_answer for prompt files."
            )
        record = prompt.entry["record"]
        dataset = _dataset(prompt.entry["task"], json.dumps(prompt.entry["parameters"], sort_keys=True))
        answer = extract_answer(response)
        if _MONSTROUS.search(answer) and answer != record["answer"]:
            return 0.0
        try:
            return float(dataset.score_answer(answer, record))
        except Exception as error:  # scorers parse free text, and some raise whatever int() or sympy does
            # The scorer may fail on a wild response, not on its own answer: if it does, the fault is ours.
            dataset.score_answer(str(record["answer"]), record)
            _log.debug("%s scores 0, its scorer failed on %.80r: %s", prompt.task, answer, error)
            return 0.0


@lru_cache(maxsize=128)
def _dataset(task: str, parameters: str) -> Any:
    """Scorers read the configuration, never the seed."""
    return importlib.import_module("reasoning_gym").create_dataset(task, seed=0, **json.loads(parameters))
