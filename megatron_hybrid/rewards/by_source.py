"""Each prompt is judged by the reward that belongs to where it came from."""

from collections.abc import Mapping

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.records import Prompt
from megatron_hybrid.rewards.base import Reward


class RewardBySource:
    """Passes a prompt to the reward registered for its `entry["source"]`."""

    name = "by_source"

    def __init__(self, rewards: Mapping[str, Reward]) -> None:
        self._rewards = dict(rewards)
        self.main_thread_only = any(reward.main_thread_only for reward in self._rewards.values())

    def score(self, prompt: Prompt, response: str) -> float:
        source = prompt.entry.get("source")
        if source not in self._rewards:
            raise ConfigError(
                f"prompt {prompt.prompt_id} (task {prompt.task!r}) comes from source {source!r}, for which there is no "
                f"reward; there is one for {', '.join(map(repr, self._rewards))}."
            )
        return self._rewards[source].score(prompt, response)
