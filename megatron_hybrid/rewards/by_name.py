"""One reward from its name, for the run itself and for the processes that score for it; no torch."""

from __future__ import annotations

from megatron_hybrid.rewards.base import Reward
from megatron_hybrid.rewards.by_source import RewardBySource
from megatron_hybrid.rewards.exact_match import ExactMatchReward
from megatron_hybrid.rewards.math_answer import MathAnswerReward
from megatron_hybrid.rewards.python_function import PythonFunctionReward
from megatron_hybrid.rewards.python_tests import PythonTestsReward
from megatron_hybrid.rewards.reasoning_gym import ReasoningGymReward
from megatron_hybrid.rewards.recorded import RecordedReward
from megatron_hybrid.rewards.sandbox import Limits

_NAMED: dict[str, type[Reward]] = {
    "exact_match": ExactMatchReward,
    "math_answer": MathAnswerReward,
    "reasoning_gym": ReasoningGymReward,
}


def reward_by_name(name: str, *, file_reward: str, limits: Limits) -> Reward:
    """A reward that judges one response at a time.

    file_reward  of by_source: what judges questions from a file
    limits       of python_tests: what a response's code may use

    Raises:
        ConfigError: a function, a library or a sandbox is not to be had.
    """
    if name == "by_source":
        of_file = _NAMED[file_reward]()
        return RewardBySource(
            {"reasoning_gym": ReasoningGymReward(), "jsonl": of_file, "parquet": of_file, "recorded": RecordedReward()}
        )
    if name == "python_tests":
        return PythonTestsReward(limits)
    return _NAMED[name]() if name in _NAMED else PythonFunctionReward(name)
