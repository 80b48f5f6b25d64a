"""From rollouts to one reward each: the weighted sum of named rewards, and what a truncated rollout earns.

    reward_i = sum_k weight_k * score_k(prompt_i, response_i)

The breakdown keeps every score as its reward function gave it, before weights and before the rule for truncation.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from megatron_hybrid.errors import ConfigError, RewardError
from megatron_hybrid.records import Prompt, RewardBatch, RolloutBatch
from megatron_hybrid.rewards.base import BatchReward, Reward


class Rubric:
    """
    rewards            name to (reward, weight); a negative weight makes a penalty. Names are those of metrics
    truncated_reward   what a response earns that ran out of room; None: its score, like any other
    """

    def __init__(
        self, rewards: Mapping[str, tuple[Reward | BatchReward, float]], *, truncated_reward: float | None = None
    ) -> None:
        if not rewards:
            raise ConfigError("a rubric needs at least one reward, got none: every response would earn 0.")
        numbers = {f"weight of {name!r}": weight for name, (_, weight) in rewards.items()}
        for what, value in (numbers | {"reward of a truncated response": truncated_reward}).items():
            if value is not None and not math.isfinite(value):
                raise ConfigError(f"the {what} must be a finite number, got {value}: it would reach every gradient.")
        self._rewards = dict(rewards)
        self.names = tuple(self._rewards)
        self._truncated_reward = truncated_reward
        self.main_thread_only = any(reward.main_thread_only for reward, _ in self._rewards.values())

    def score(self, rollouts: RolloutBatch) -> RewardBatch:
        """Rewards [b] fp32, on the CPU. Reads prompts, responses and truncated; no collectives.

        May run beside the main thread, which is why nothing here touches an accelerator.
        """
        prompts, responses = rollouts.prompts, rollouts.responses
        scores = {name: _scores(name, reward, prompts, responses) for name, (reward, _) in self._rewards.items()}
        totals = [
            math.fsum(weight * scores[name][row] for name, (_, weight) in self._rewards.items())
            for row in range(len(prompts))
        ]
        if self._truncated_reward is not None:
            earned = zip(totals, rollouts.truncated, strict=True)
            totals = [self._truncated_reward if truncated else total for total, truncated in earned]
        return RewardBatch(
            rewards=torch.tensor(totals, dtype=torch.float32),
            breakdown={name: torch.tensor(s, dtype=torch.float32) for name, s in scores.items()},
        )


def _scores(
    name: str, reward: Reward | BatchReward, prompts: Sequence[Prompt], responses: Sequence[str]
) -> list[float]:
    pairs = list(zip(prompts, responses, strict=True))
    if isinstance(reward, BatchReward):
        scores = reward.score_all(prompts, responses)
    else:
        scores = [float(reward.score(prompt, response)) for prompt, response in pairs]
    for score, (prompt, response) in zip(scores, pairs, strict=True):
        if not math.isfinite(score):
            raise RewardError(
                f"reward {name!r} gave {score} for prompt {prompt.prompt_id} (task {prompt.task!r}: {prompt.text!r}) "
                f"and response {response!r}: expected a finite number, one NaN would reach every weight of the model. "
                "Return a number for every response; 0 for one that cannot be judged."
            )
    return scores
