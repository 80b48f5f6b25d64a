"""The rubric that the settings `reward` and `file_reward` ask for."""

from __future__ import annotations

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.online_config import OnlineConfig
from megatron_hybrid.rewards.base import BatchReward, Reward
from megatron_hybrid.rewards.by_source import RewardBySource
from megatron_hybrid.rewards.exact_match import ExactMatchReward
from megatron_hybrid.rewards.http import HttpReward
from megatron_hybrid.rewards.math_answer import MathAnswerReward
from megatron_hybrid.rewards.python_function import PythonFunctionReward
from megatron_hybrid.rewards.reasoning_gym import ReasoningGymReward
from megatron_hybrid.rewards.recorded import RecordedReward
from megatron_hybrid.rewards.rubric import Rubric

_NAMED: dict[str, type[Reward]] = {
    "exact_match": ExactMatchReward,
    "math_answer": MathAnswerReward,
    "reasoning_gym": ReasoningGymReward,
}


def build_rubric(online: OnlineConfig) -> Rubric:
    """Imports functions and libraries, asks no server yet.

    Raises:
        ConfigError: a function or library is not there, or two rewards would have one name.
    """
    rewards: dict[str, tuple[Reward | BatchReward, float]] = {}
    for weight, name in online.rewards:
        reward = _reward(name, online)
        if reward.name in rewards:
            raise ConfigError(
                f"reward {online.reward!r} has two rewards that metrics would call {reward.name!r}: only host, port "
                "and path of an address count. Give them different ones."
            )
        rewards[reward.name] = (reward, weight)
    return Rubric(rewards, truncated_reward=online.truncated_reward)


def _reward(name: str, online: OnlineConfig) -> Reward | BatchReward:
    if name == "by_source":
        of_file = _NAMED[online.file_reward]()
        return RewardBySource(
            {"reasoning_gym": ReasoningGymReward(), "jsonl": of_file, "parquet": of_file, "recorded": RecordedReward()}
        )
    if name in _NAMED:
        return _NAMED[name]()
    if "://" in name:
        return HttpReward(name, timeout_s=online.server_timeout, retries=online.server_retries)
    return PythonFunctionReward(name)
