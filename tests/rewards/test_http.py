"""A reward server is asked once for all responses; a hiccup is waited out, what does not pass is one clear error."""

import pytest

from megatron_hybrid.errors import RewardError, ServerError
from megatron_hybrid.records import Prompt
from megatron_hybrid.rewards.http import HttpReward
from tests.http_server import serve

PROMPTS = [Prompt(i, (1,), f"question {i}", "sums", "4", {"record": {"level": i, "seen": {1}}}) for i in range(3)]
RESPONSES = ["a", "bb", "ccc"]


def reward(url, *, retries=2, timeout_s=10):
    return HttpReward(url, timeout_s=timeout_s, retries=retries, pause_s=0.001)


def lengths(path, body):
    return 200, {"rewards": [len(item["response"]) for item in body["items"]]}


def test_one_request_brings_a_reward_for_every_response():
    asked = []

    def answer(path, body):
        asked.append((path, body))
        return lengths(path, body)

    with serve(answer) as url:
        assert reward(f"{url}/score").score_all(PROMPTS, RESPONSES) == [1, 2, 3]
        assert reward(f"{url}/score").score_all([], []) == []
    ((path, body),) = asked
    assert path == "/score"
    record = {"level": 1, "seen": "{1}"}
    assert body["items"][1] == {
        "prompt_id": 1,
        "task": "sums",
        "prompt": "question 1",
        "response": "bb",
        "answer": "4",
        "record": record,
    }


def test_any_text_gets_there_and_is_the_same():
    hostile = ["\ud800", "\u202e\U0001f600\x00", '"}]', ""]
    heard = []

    def answer(path, body):
        heard.extend(item["response"] for item in body["items"])
        return lengths(path, body)

    with serve(answer) as url:
        reward(url).score_all(PROMPTS[:1] * 4, hostile)
    assert heard == hostile


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(status):
    calls = []

    def answer(path, body):
        calls.append(path)
        return (status, "busy") if len(calls) < 3 else lengths(path, body)

    with serve(answer) as url:
        assert reward(url).score_all(PROMPTS, RESPONSES) == [1, 2, 3]
    assert len(calls) == 3


def test_a_server_that_stays_busy_ends_the_run_with_what_it_said():
    expected = pytest.raises(ServerError, match="refuses with status 503 after 2 more attempts. It answered: no room")
    with serve(lambda path, body: (503, "no room")) as url, expected:
        reward(url).score_all(PROMPTS, RESPONSES)


def test_a_request_that_is_wrong_is_not_repeated():
    calls = []

    def answer(path, body):
        calls.append(path)
        return 404, "not here"

    with serve(answer) as url, pytest.raises(ServerError, match="refuses with status 404. It answered: not here"):
        reward(url).score_all(PROMPTS, RESPONSES)
    assert len(calls) == 1


def test_a_server_that_is_not_there_is_named_with_what_to_do():
    with serve(lengths) as url:
        pass  # its port is free again
    ours = reward(url, retries=1)
    for attempts in (1, 0):
        said = rf"the reward server at {url} does not answer, after {attempts} more .*start it"
        with pytest.raises(ServerError, match=said):
            ours.score_all(PROMPTS, RESPONSES)


def test_a_server_that_stays_down_is_waited_for_once_until_it_answers_again(caplog):
    """Or a run that goes on without it would wait for all attempts at every step."""
    calls, up = [], []

    def answer(path, body):
        calls.append(path)
        return lengths(path, body) if up else (503, "starting")

    with serve(answer) as url:
        ours = reward(url)
        for attempts in (3, 1, 1):
            calls.clear()
            with pytest.raises(ServerError, match=f"after {attempts - 1} more attempts"):
                ours.score_all(PROMPTS, RESPONSES)
            assert len(calls) == attempts
        up.append(True)
        assert ours.score_all(PROMPTS, RESPONSES) == [1, 2, 3]
        up.clear()
        calls.clear()
        with pytest.raises(ServerError, match="after 2 more attempts"):
            ours.score_all(PROMPTS, RESPONSES)
        assert len(calls) == 3
    said = [message.partition(url)[2] for message in caplog.messages if url in message and "Retrying" not in message]
    down = " is down: until it answers again, a request is tried once"
    assert said == [down, " answers again", down]


def test_a_server_that_hangs_is_given_up_after_its_time():
    import threading

    done = threading.Event()

    def answer(path, body):
        done.wait(30)
        return lengths(path, body)

    with serve(answer) as url:
        with pytest.raises(ServerError, match="does not answer, after 0 more attempts of at most 0.05 s"):
            reward(url, retries=0, timeout_s=0.05).score_all(PROMPTS, RESPONSES)
        done.set()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("<html>", "answers something that is no JSON .*It answered: <html>"),
        ([1, 2, 3], "with 3 numbers, one per response. It answered: "),
        ({"rewards": [1, 2]}, "with 3 numbers, one per response. It answered: "),
        ('{"rewards": [1, 2', "answers something that is no JSON"),
    ],
)
def test_an_answer_that_cannot_be_used_is_asked_for_again_and_then_shown(said, message):
    calls = []

    def answer(path, body):
        calls.append(path)
        return 200, said

    with serve(answer) as url:
        with pytest.raises(ServerError, match=message):
            reward(url).score_all(PROMPTS, RESPONSES)
        assert len(calls) == 3
        calls.clear()
    with serve(lambda path, body: answer(path, body) if len(calls) < 2 else lengths(path, body)) as url:
        assert reward(url).score_all(PROMPTS, RESPONSES) == [1, 2, 3]


@pytest.mark.parametrize("said", ["2", None, [2], 10**400])
def test_what_is_no_number_is_the_error_of_its_response_alone(said):
    with serve(lambda path, body: (200, {"rewards": [1, said, 3]})) as url:
        first, second, third = reward(url).score_all(PROMPTS, RESPONSES)
    assert (first, third) == (1, 3)
    assert isinstance(second, RewardError) and f"gave {said!r} for prompt 1, not a number" in str(second)


def test_a_metric_is_named_after_host_port_and_path_without_the_query():
    assert reward("http://judge:8000/v1/score/?key=x").name == "judge:8000.v1.score"


def test_a_key_of_the_environment_goes_along(monkeypatch):
    monkeypatch.setenv("HYBRID_SERVER_API_KEY", "secret")  # the engines'
    monkeypatch.delenv("HYBRID_REWARD_API_KEY", raising=False)
    with serve(lengths, key="secret") as url:
        with pytest.raises(ServerError, match="refuses with status 401"):
            reward(url).score_all(PROMPTS, RESPONSES)
        monkeypatch.setenv("HYBRID_REWARD_API_KEY", "secret")
        assert len(reward(url).score_all(PROMPTS, RESPONSES)) == len(RESPONSES)
