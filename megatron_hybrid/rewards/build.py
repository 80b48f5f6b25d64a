"""The rubric that the settings `reward` and `file_reward` ask for, and where its rewards are made."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.online_config import OnlineConfig
from megatron_hybrid.rewards.base import BatchReward, Reward
from megatron_hybrid.rewards.by_name import reward_by_name
from megatron_hybrid.rewards.http import HttpReward
from megatron_hybrid.rewards.rubric import Rubric
from megatron_hybrid.rewards.sandbox import Limits
from megatron_hybrid.rewards.worker_output import WorkerOutput
from megatron_hybrid.rewards.worker_pool import WorkerPool


def build_rubric(online: OnlineConfig) -> Rubric:
    """Imports functions and libraries, asks no server and starts no process yet.

    Raises:
        ConfigError: a function, library or sandbox is not there, or two rewards would have one name.
    """
    # One file for each process of the job, as for each pool: nobody else writes to it.
    output = WorkerOutput(Path(online.run_dir, f"reward_output_{os.environ.get('RANK', '0')}.log"))
    rewards: dict[str, tuple[Reward | BatchReward, float]] = {}
    for weight, name in online.rewards:
        reward = _reward(name, online, output)
        if reward.name in rewards:
            raise ConfigError(
                f"reward {online.reward!r} has two rewards that metrics would call {reward.name!r}: only host, port "
                "and path of an address count. Give them different ones."
            )
        rewards[reward.name] = (reward, weight)
    return Rubric(rewards, truncated_reward=online.truncated_reward)


def _reward(name: str, online: OnlineConfig, output: WorkerOutput) -> Reward | BatchReward:
    if "://" in name:
        return HttpReward(name, timeout_s=online.server_timeout, retries=online.server_retries)
    limits = Limits(online.reward_timeout, online.reward_memory)
    reward = reward_by_name(name, file_reward=online.file_reward, limits=limits)  # what is wrong with it shows now
    workers = online.workers_of(name)
    if not workers:
        return reward
    return WorkerPool(name, reward.name, size=workers, file_reward=online.file_reward, limits=limits, output=output)
