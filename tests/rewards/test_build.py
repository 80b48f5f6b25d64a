"""The setting `reward` becomes the rubric that it describes."""

import pytest

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.online_config import OnlineConfig
from megatron_hybrid.rewards.build import build_rubric
from tests.http_server import serve
from tests.rewards.test_rubric import rollouts


def scored(responses, *, truncated=None, **settings):
    return build_rubric(OnlineConfig(**settings)).score(rollouts(responses, truncated=truncated))


def test_by_default_a_file_is_scored_by_exact_match():
    batch = scored(["AB", "abc", "ab"], truncated=[False, False, True], truncated_reward=0.0)
    assert batch.rewards.tolist() == [1, 0, 0]
    assert batch.breakdown["by_source"].tolist() == [1, 0, 1]


def test_a_weighted_sum_of_three_kinds_of_reward():
    def answer(path, body):
        return 200, {"rewards": [10 * len(item["response"]) for item in body["items"]]}

    with serve(answer) as url:
        own = "tests.rewards.user_rewards:in_main_thread"
        batch = scored(["ab", "abc"], reward=f"2*exact_match, -0.5*{own},0.1*{url}/len")
    names = list(batch.breakdown)
    assert names[:2] == ["exact_match", own] and names[2].startswith("127.0.0.1:") and names[2].endswith(".len")
    assert [scores.tolist() for scores in batch.breakdown.values()] == [[1, 0], [1, 1], [20, 30]]
    assert batch.rewards.tolist() == pytest.approx([2 - 0.5 + 2, 0 - 0.5 + 3])


def test_one_reward_of_the_main_thread_binds_the_rubric_to_it_unless_it_has_a_process_of_its_own():
    own = "1*exact_match,1*tests.rewards.user_rewards:in_main_thread"
    assert build_rubric(OnlineConfig(reward=own, reward_workers=0)).main_thread_only
    assert not build_rubric(OnlineConfig(reward=own)).main_thread_only
    assert not build_rubric(OnlineConfig(reward="exact_match")).main_thread_only


def test_two_rewards_that_metrics_could_not_tell_apart_are_refused():
    with pytest.raises(ConfigError, match="two rewards that metrics would call 'judge.a'"):
        build_rubric(OnlineConfig(reward="1*http://judge/a,1*https://judge/a?x=1", allow_http=True))
