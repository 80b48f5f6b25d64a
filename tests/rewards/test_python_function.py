"""A user's own function is found by name and given what it needs; whatever goes wrong in it is said with its name."""

import pytest

from megatron_hybrid.errors import ConfigError, RewardError
from megatron_hybrid.records import Prompt
from megatron_hybrid.rewards.python_function import PythonFunctionReward

MODULE = "tests.rewards.user_rewards"
PROMPT = Prompt(7, (1,), "question", "sums", "42", {"source": "jsonl", "record": {"level": 10}})


def test_the_function_sees_question_response_answer_and_record():
    assert PythonFunctionReward(f"{MODULE}:length").score(PROMPT, "response!") == 9 - 8 + 2 + 10


def test_a_function_says_itself_that_it_needs_the_main_thread():
    assert PythonFunctionReward(f"{MODULE}:in_main_thread").main_thread_only
    assert not PythonFunctionReward(f"{MODULE}:length").main_thread_only


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "broken",
            r"user_rewards:broken, on prompt 7 \(task 'sums': 'question'\).*KeyError: 'nothing' \(.*rewards.py:\d+\)",
        ),
        ("wordy", r"user_rewards:wordy, on prompt 7 .*returned a str, 'good': expected a number"),
    ],
)
def test_an_error_names_the_function_the_prompt_and_the_line(function, message):
    with pytest.raises(RewardError, match=message):
        PythonFunctionReward(f"{MODULE}:{function}").score(PROMPT, "r")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.at_all:f", "cannot be imported: No module named 'nowhere'.*PYTHONPATH"),
        (f"{MODULE}:missing", "has no function 'missing'"),
        (f"{MODULE}:NOT_CALLABLE", "has no function 'NOT_CALLABLE'"),
        (f"{MODULE}:of_two", r"function\(question, response, answer, record\): too many positional"),
    ],
)
def test_a_function_that_cannot_work_is_refused_before_anything_is_built(name, message):
    with pytest.raises(ConfigError, match=message):
        PythonFunctionReward(name)
