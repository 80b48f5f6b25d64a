"""Each reward alone: right answers, wrong ones, hostile ones, and faults that must not pass for a score of 0."""

import time

import pytest

from megatron_hybrid.errors import ConfigError, DataError
from megatron_hybrid.records import Prompt
from megatron_hybrid.rewards.base import extract_answer
from megatron_hybrid.rewards.by_source import RewardBySource
from megatron_hybrid.rewards.exact_match import ExactMatchReward
from megatron_hybrid.rewards.math_answer import MathAnswerReward
from megatron_hybrid.rewards.reasoning_gym import ReasoningGymReward

reasoning_gym = pytest.importorskip("reasoning_gym")

HOSTILE = {
    "empty": "",
    "spaces": " \n\t\u2003",
    "huge": "9" * 100_000,
    "many tags": "<answer>" * 20_000,
    "unicode": "\u202e\U0001f600\ufeff\u0661\u0662\x00\ud800",
    "html": "<script>alert(1)</script><answer><b>1</b>",
    "code": "__import__('os').abort()",
    "format": "{0.__class__} %s %n \\frac{",
    "not a number": "NaN",
    "infinite": "-inf",
    "huge exponent": "1e999999999",
    "nested": "[" * 5_000,
}
TASKS = ["chain_sum", "gcd", "letter_counting", "spell_backward", "calendar_arithmetic", "prime_factorization"]
TASKS += ["number_sorting", "fraction_simplification", "word_sorting", "time_intervals", "coin_flip", "count_primes"]


def question(task, index=0, **parameters):
    record = reasoning_gym.create_dataset(task, seed=3, **parameters)[index]
    entry = {"source": "reasoning_gym", "task": task, "parameters": parameters, "record": record}
    return Prompt(index, (1,), record["question"], task, record["answer"], entry)


def from_file(answer):
    return Prompt(7, (1,), "a question", "file", answer, {"source": "jsonl", "record": {}})


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("  5\n", "5"),
        ("so <answer> 5 </answer> it is", "5"),
        ("<answer>4</answer> no, <answer>5</answer>", "5"),
        ("<answer>two\nlines</answer>", "two\nlines"),
        ("<answer>5", "<answer>5"),
        ("5</answer>", "5</answer>"),
        ("</answer>5<answer>", "</answer>5<answer>"),
        ("first line\nsecond line", "first line\nsecond line"),
        ("", ""),
    ],
)
def test_the_answer_stands_in_the_last_pair_of_tags_or_is_the_whole_response(response, answer):
    assert extract_answer(response) == answer


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("frame", ["{}", " {}\n", "I think: <answer>{}</answer>."])
def test_the_right_answer_earns_full_marks(task, frame):
    prompt = question(task)
    assert ReasoningGymReward().score(prompt, frame.format(prompt.answer)) == 1.0


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("response", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_responses_earn_little_quickly(task, response):
    start = time.perf_counter()
    # fraction_simplification pays 0.05 for any text; 0.5 leaves room for an accidental digit.
    assert 0 <= ReasoningGymReward().score(question(task), response) < 0.5
    assert time.perf_counter() - start < 5  # the slowest takes milliseconds; a quadratic scan would take minutes


def test_partial_credit_is_the_scorers_own():
    # "sus" against "nus": two of three letters in place.
    prompt = question("spell_backward", max_word_len=3)
    wrong_start = ("x" if prompt.answer[0] != "x" else "y") + prompt.answer[1:]
    assert ReasoningGymReward().score(prompt, wrong_start) == pytest.approx(2 / 3)


def test_the_configuration_of_the_question_reaches_its_scorer():
    # Partial credit for a number of days is 1 - difference / the largest difference of the configuration.
    prompt = question("time_intervals", task_types=["date"], max_date_difference_days=40)
    days = int(prompt.answer.split()[0])
    assert ReasoningGymReward().score(prompt, f"{days + 10} days") == pytest.approx(1 - 10 / 40)


def test_a_scorer_that_fails_on_a_response_scores_it_zero():
    prompt = question("prime_factorization")
    dataset = reasoning_gym.create_dataset("prime_factorization", seed=0)
    with pytest.raises(ValueError):
        dataset.score_answer("two and three", prompt.entry["record"])
    assert ReasoningGymReward().score(prompt, "two and three") == 0.0


def test_a_broken_record_is_our_fault_and_not_a_score_of_zero():
    prompt = question("prime_factorization")
    broken = Prompt(
        0, (1,), prompt.text, prompt.task, None, prompt.entry | {"record": {"question": "?", "answer": "x"}}
    )
    with pytest.raises(ValueError):
        ReasoningGymReward().score(broken, "2")


def test_the_reasoning_gym_reward_refuses_prompts_of_a_file():
    with pytest.raises(DataError, match="not from reasoning-gym"):
        ReasoningGymReward().score(from_file("5"), "5")


@pytest.mark.parametrize(
    ("answer", "response", "score"),
    [
        ("New York", " new\n york ", 1),
        ("5", "\uff15", 1),  # a full-width digit
        ("5", "<answer>5</answer>", 1),
        ("stra\u00dfe", "STRASSE", 1),
        ("5", "5.", 0),
        ("5", "55", 0),
        ("5", "", 0),
    ],
)
def test_exact_match_forgives_case_and_white_space_only(answer, response, score):
    assert ExactMatchReward().score(from_file(answer), response) == score


def test_exact_match_needs_an_answer():
    with pytest.raises(DataError, match="has no answer"):
        ExactMatchReward().score(from_file(None), "5")


@pytest.mark.parametrize(
    ("answer", "response", "score"),
    [
        ("1/2", "0.5", 1),
        ("1/2", "so the answer is $\\frac{1}{2}$", 1),
        ("\\frac{1}{2}", "\\boxed{0.5}", 1),
        ("2*x + 1", "<answer>$1 + 2x$</answer>", 1),
        ("7", "8", 0),
        ("7", "no idea", 0),
    ],
)
def test_math_answers_are_compared_as_mathematics(answer, response, score):
    pytest.importorskip("math_verify")
    assert MathAnswerReward().score(from_file(answer), response) == score


@pytest.mark.parametrize("reward", [ExactMatchReward, MathAnswerReward])
@pytest.mark.parametrize("response", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_responses_to_a_file_earn_nothing(reward, response):
    assert reward().score(from_file("7"), response) == 0


@pytest.mark.parametrize("answer", [None, "", " "])
def test_an_answer_that_is_no_mathematics_is_reported(answer):
    pytest.importorskip("math_verify")
    with pytest.raises(DataError, match="finds no mathematics"):
        MathAnswerReward().score(from_file(answer), "5")


def test_each_source_has_its_own_reward():
    reward = RewardBySource({"reasoning_gym": ReasoningGymReward(), "jsonl": ExactMatchReward()})
    generated = question("chain_sum")
    assert reward.score(generated, generated.answer + ".0") == 1  # the task's scorer compares numbers
    assert reward.score(from_file("5"), "5.0") == 0
    with pytest.raises(ConfigError, match="source 'elsewhere', for which there is no reward"):
        reward.score(Prompt(0, (1,), "?", "t", "5", {"source": "elsewhere"}), "5")
