"""Each prompt is judged by the reward that belongs to where it came from."""

from collections.abc import Mapping

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.records import Prompt
from megatron_hybrid.rewards.base import Reward
from megatron_hybrid.rewards.exact_match import ExactMatchReward
from megatron_hybrid.rewards.math_answer import MathAnswerReward
from megatron_hybrid.rewards.reasoning_gym import ReasoningGymReward
from megatron_hybrid.rewards.rubric import Rubric

FILE_REWARDS: dict[str, type[Reward]] = {"exact_match": ExactMatchReward, "math_answer": MathAnswerReward}


class RewardBySource:
    """Passes a prompt to the reward registered for its `entry["source"]`."""

    name = "score"

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


def default_rubric(*, file_reward: str = "exact_match", truncated_reward: float | None = None) -> Rubric:
    """reasoning-gym questions by their own scorer, questions of a file by `file_reward`; weight 1."""
    if file_reward not in FILE_REWARDS:
        raise ConfigError(f"file_reward must be one of {', '.join(FILE_REWARDS)}; got {file_reward!r}.")
    by_source: dict[str, Reward] = {"reasoning_gym": ReasoningGymReward(), "jsonl": FILE_REWARDS[file_reward]()}
    return Rubric({"score": (RewardBySource(by_source), 1.0)}, truncated_reward=truncated_reward)
