"""Named rewards become one number per rollout, and nothing that is not finite gets through."""

import math

import pytest
import torch

from megatron_hybrid.errors import ConfigError, RewardError, ServerError
from megatron_hybrid.records import Prompt, RolloutBatch
from megatron_hybrid.rewards.rubric import Rubric


class Length:
    name = "length"
    main_thread_only = False

    def score(self, prompt, response):
        return len(response)


class Constant:
    name = "constant"
    main_thread_only = False

    def __init__(self, value):
        self.value = value

    def score(self, prompt, response):
        return self.value


def rollouts(responses, *, tasks=None, truncated=None):
    n = len(responses)
    prompts = [Prompt(i, (1,), "?", task, "ab", {"source": "jsonl"}) for i, task in enumerate(tasks or ["file"] * n)]
    return RolloutBatch(
        prompts=tuple(prompts),
        tokens=torch.zeros(n, 3, dtype=torch.int64),
        response_mask=torch.zeros(n, 3, dtype=torch.bool),
        sampled_logprobs=torch.zeros(n, 3),
        group_id=torch.arange(n),
        truncated=tuple(truncated or [False] * n),
        responses=tuple(responses),
        temperature=1.0,
        policy_version=0,
        seed=0,
    )


def test_rewards_are_the_weighted_sum_and_the_breakdown_is_unweighted():
    batch = Rubric({"length": (Length(), -0.5), "bonus": (Constant(3), 2.0)}).score(rollouts(["a", "bcd"]))
    assert batch.rewards.tolist() == [5.5, 4.5]
    assert batch.breakdown["length"].tolist() == [1, 3]
    assert batch.breakdown["bonus"].tolist() == [3, 3]
    assert {t.dtype for t in (batch.rewards, *batch.breakdown.values())} == {torch.float32}


def test_a_truncated_rollout_is_scored_as_it_is_unless_told_otherwise():
    batch = rollouts(["a", "bc"], truncated=[True, False])
    assert Rubric({"length": (Length(), 1.0)}).score(batch).rewards.tolist() == [1, 2]
    told = Rubric({"length": (Length(), 1.0)}, truncated_reward=-1.0).score(batch)
    assert told.rewards.tolist() == [-1, 2]
    assert told.breakdown["length"].tolist() == [1, 2]


def test_no_rollouts_give_no_rewards():
    assert Rubric({"length": (Length(), 1.0)}).score(rollouts([])).rewards.shape == (0,)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_reported_with_its_reward_prompt_and_response(value):
    batch = Rubric({"fine": (Constant(1), 1.0), "bad": (Constant(value), 2.0)}).score(rollouts(["what"]))
    assert batch.failed.tolist() == [True] and batch.rewards.tolist() == [1.0], "it counts as 0"
    with pytest.raises(RewardError, match=r"'bad' gave (nan|inf|-inf) for prompt 0 \(task 'file': '\?'\).*'what'"):
        raise batch.errors[0]


class Picky:
    """Judges all at once; or nothing at all."""

    name = "picky"
    main_thread_only = False

    def __init__(self, down=False):
        self.down = down
        self.asked = []

    def score_all(self, prompts, responses):
        self.asked.extend(responses)
        if self.down:
            raise ServerError("it is down")
        return [RewardError("not this one") if response == "b" else 1.0 for response in responses]


def test_a_failed_row_keeps_the_scores_of_its_other_rewards_and_the_rows_beside_it_theirs():
    batch = Rubric({"length": (Length(), 1.0), "picky": (Picky(), 10.0)}).score(rollouts(["aaa", "b"]))
    assert batch.rewards.tolist() == [13, 1] and batch.failed.tolist() == [False, True]
    assert [str(error) for error in batch.errors.values()] == ["not this one"] and list(batch.errors) == [1]


def test_a_reward_that_judges_nothing_fails_for_every_response():
    batch = Rubric({"picky": (Picky(down=True), 1.0)}).score(rollouts(["a", "b"]))
    assert batch.failed.tolist() == [True, True] and batch.rewards.tolist() == [0, 0]


def test_a_response_that_was_never_given_is_not_judged_and_has_not_failed():
    reward, batch = Picky(), rollouts(["", "a"])
    object.__setattr__(batch, "unanswered", (True, False))
    scored = Rubric({"picky": (reward, 1.0)}).score(batch)
    assert reward.asked == ["a"] and scored.rewards.tolist() == [0, 1] and not scored.failed.any()


def test_an_exception_of_a_reward_is_not_swallowed():
    class Broken:
        name = "broken"
        main_thread_only = False

        def score(self, prompt, response):
            raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        Rubric({"broken": (Broken(), 1.0)}).score(rollouts(["a"]))


def test_a_batch_with_a_response_too_few_is_refused():
    batch = rollouts(["a", "b"])
    object.__setattr__(batch, "responses", ("a",))
    with pytest.raises(ValueError, match="zip"):
        Rubric({"length": (Length(), 1.0)}).score(batch)


def test_impossible_rubrics_are_refused():
    with pytest.raises(ConfigError, match="at least one reward"):
        Rubric({})
    with pytest.raises(ConfigError, match="weight of 'length' must be a finite number, got nan"):
        Rubric({"length": (Length(), math.nan)})
    with pytest.raises(ConfigError, match="truncated response must be a finite number, got inf"):
        Rubric({"length": (Length(), 1.0)}, truncated_reward=math.inf)
