"""From rollouts to one reward each: the weighted sum of named rewards, and what a truncated rollout earns.

    reward_i = sum_k weight_k * score_k(prompt_i, response_i)

The breakdown keeps every score as its reward function gave it, before weights and before the rule for truncation.
"""

import math
from collections.abc import Mapping

import torch

from megatron_hybrid.errors import ConfigError, RewardError
from megatron_hybrid.records import Prompt, RewardBatch, RolloutBatch
from megatron_hybrid.rewards.base import Reward


class Rubric:
    """
    rewards            name to (reward, weight); a negative weight makes a penalty
    truncated_reward   what a response earns that ran out of room; None: its score, like any other
    """

    def __init__(self, rewards: Mapping[str, tuple[Reward, float]], *, truncated_reward: float | None = None) -> None:
        if not rewards:
            raise ConfigError("a rubric needs at least one reward, got none: every response would earn 0.")
        numbers = {f"weight of {name!r}": weight for name, (_, weight) in rewards.items()}
        for what, value in (numbers | {"reward of a truncated response": truncated_reward}).items():
            if value is not None and not math.isfinite(value):
                raise ConfigError(f"the {what} must be a finite number, got {value}: it would reach every gradient.")
        self._rewards = dict(rewards)
        self._truncated_reward = truncated_reward
        self.main_thread_only = any(reward.main_thread_only for reward, _ in self._rewards.values())

    def score(self, rollouts: RolloutBatch) -> RewardBatch:
        """Rewards [b] fp32 on the device of the tokens. Reads prompts, responses and truncated; no collectives."""
        pairs = list(zip(rollouts.prompts, rollouts.responses, strict=True))
        scores = {
            name: [_checked(name, reward, *pair) for pair in pairs] for name, (reward, _) in self._rewards.items()
        }
        totals = [
            math.fsum(weight * scores[name][row] for name, (_, weight) in self._rewards.items())
            for row in range(len(pairs))
        ]
        if self._truncated_reward is not None:
            earned = zip(totals, rollouts.truncated, strict=True)
            totals = [self._truncated_reward if truncated else total for total, truncated in earned]

        device = rollouts.tokens.device
        return RewardBatch(
            rewards=torch.tensor(totals, dtype=torch.float32, device=device),
            breakdown={name: torch.tensor(s, dtype=torch.float32, device=device) for name, s in scores.items()},
        )


def _checked(name: str, reward: Reward, prompt: Prompt, response: str) -> float:
    score = float(reward.score(prompt, response))
    if not math.isfinite(score):
        raise RewardError(
            f"reward {name!r} gave {score} for prompt {prompt.prompt_id} (task {prompt.task!r}: {prompt.text!r}) and "
            f"response {response!r}: expected a finite number, one NaN would reach every weight of the model. "
            "Return a number for every response; 0 for one that cannot be judged."
        )
    return score
