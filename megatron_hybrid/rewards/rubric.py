"""From rollouts to one reward each: the weighted sum of named rewards, and what a truncated rollout earns.

    reward_i = sum_k weight_k * score_k(prompt_i, response_i)

The breakdown keeps every score as its reward function gave it, before weights and before the rule for truncation. A
score that could not be made, or is no finite number, counts as 0, and its row is among the failed ones: what becomes of
those is not decided here (`train/failed_samples.py`). Responses that were never given are not judged.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from megatron_hybrid.errors import ConfigError, DataError, RewardError, ServerError
from megatron_hybrid.records import Prompt, RewardBatch, RolloutBatch
from megatron_hybrid.rewards.base import BatchReward, Reward, Score


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
        """Rewards [b] fp32, on the CPU. Reads prompts, responses, truncated and unanswered; no collectives.

        May run beside the main thread, which is why nothing here touches an accelerator.
        """
        pairs = list(zip(rollouts.prompts, rollouts.responses, strict=True))
        answered = [row for row in range(len(pairs)) if not (rollouts.unanswered and rollouts.unanswered[row])]
        judged = [pairs[row] for row in answered]
        scores: dict[str, list[float]] = {}
        errors: dict[int, Exception] = {}
        for name, (reward, _) in self._rewards.items():
            scores[name] = [0.0] * len(pairs)
            for row, score in zip(answered, _scores(name, reward, judged), strict=True):
                if isinstance(score, Exception):
                    errors.setdefault(row, score)
                else:
                    scores[name][row] = score
        totals = [
            math.fsum(weight * scores[name][row] for name, (_, weight) in self._rewards.items())
            for row in range(len(pairs))
        ]
        if self._truncated_reward is not None:
            earned = zip(totals, rollouts.truncated, strict=True)
            totals = [self._truncated_reward if truncated else total for total, truncated in earned]
        return RewardBatch(
            rewards=torch.tensor(totals, dtype=torch.float32),
            breakdown={name: torch.tensor(s, dtype=torch.float32) for name, s in scores.items()},
            failed=torch.tensor([row in errors for row in range(len(pairs))], dtype=torch.bool),
            errors=errors,
        )


def _scores(name: str, reward: Reward | BatchReward, pairs: Sequence[tuple[Prompt, str]]) -> list[Score]:
    """A finite number for each, or why there is none."""
    if isinstance(reward, BatchReward):
        try:
            scores = reward.score_all([prompt for prompt, _ in pairs], [response for _, response in pairs])
        except (RewardError, ServerError) as error:
            scores = [error] * len(pairs)
    else:
        scores = [_score(reward, prompt, response) for prompt, response in pairs]
    return [_finite(name, score, *pair) for score, pair in zip(scores, pairs, strict=True)]


def _score(reward: Reward, prompt: Prompt, response: str) -> Score:
    """What else a reward raises is our own mistake, or the user's, and ends the run."""
    try:
        return float(reward.score(prompt, response))
    except (RewardError, DataError) as error:
        return error


def _finite(name: str, score: Score, prompt: Prompt, response: str) -> Score:
    if isinstance(score, Exception) or math.isfinite(score):
        return score
    return RewardError(
        f"reward {name!r} gave {score} for prompt {prompt.prompt_id} (task {prompt.task!r}: {prompt.text!r}) "
        f"and response {response!r}: expected a finite number, one NaN would reach every weight of the model. "
        "Return a number for every response; 0 for one that cannot be judged."
    )
