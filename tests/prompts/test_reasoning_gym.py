"""Generated questions: named by index alone, held-out ones never trained on, mistakes in the task list explained."""

import sys

import pytest

from megatron_hybrid.errors import ConfigError, DataError
from megatron_hybrid.prompts.reasoning_gym import RUNS_THE_ANSWER, VETTED, ReasoningGymSource, TaskSetting, parse_tasks

SUMS = TaskSetting("chain_sum", {"min_terms": 2, "max_terms": 2, "max_digits": 1})
WORDS = TaskSetting("spell_backward", {"max_word_len": 4}, worked_examples=2)


def test_names_and_calls_become_settings():
    assert parse_tasks("caesar_cipher, gcd(max_value=9,min_numbers=2),dice(worked_examples=2)") == (
        TaskSetting("caesar_cipher"),
        TaskSetting("gcd", {"max_value": 9, "min_numbers": 2}, VETTED.get("gcd", TaskSetting("gcd")).worked_examples),
        TaskSetting("dice", {}, 2),
    )


def test_parameters_are_laid_over_the_vetted_setting():
    name, vetted = next(iter(VETTED.items()))
    parameter = next(iter(vetted.parameters))
    (setting,) = parse_tasks(f"{name}({parameter}=77)")
    assert setting.parameters == vetted.parameters | {parameter: 77}
    assert parse_tasks(name) == (vetted,)


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("", "expected tasks like"),
        ("chain_sum,,gcd", "expected tasks like"),
        ("chain_sum(2)", "expected a task name, or"),
        ("chain_sum(**{})", "expected a task name, or"),
        ("'chain_sum'", "expected a task name, or"),
        ("chain_sum(max_terms=open('x'))", "must be plain values"),
        ("chain_sum(worked_examples=-1)", "whole number >= 0"),
        ("gcd,lcm,gcd", "gcd given more than once"),
    ],
)
def test_a_task_list_that_cannot_be_read_is_explained(spec, complaint):
    with pytest.raises(ConfigError, match="^[^\n]*" + complaint.replace("(", r"\(")):
        parse_tasks(spec)


def test_an_unknown_task_is_answered_with_near_names():
    with pytest.raises(ConfigError, match="no task 'chain_sums'. Did you mean 'chain_sum'"):
        ReasoningGymSource([TaskSetting("chain_sums")])


@pytest.mark.parametrize("parameters", [{"max_term": 2}, {"min_terms": 9, "max_terms": 2}])
def test_refused_parameters_are_answered_with_the_known_ones(parameters):
    with pytest.raises(ConfigError, match="refuses chain_sum.*Its parameters are min_terms, max_terms"):
        ReasoningGymSource([TaskSetting("chain_sum", parameters)])


def test_the_seed_of_a_task_is_not_the_users_to_set():
    with pytest.raises(ConfigError, match="seed cannot be set"):
        ReasoningGymSource([TaskSetting("chain_sum", {"seed": 3})])


@pytest.mark.parametrize("task", RUNS_THE_ANSWER)
def test_tasks_whose_scorer_runs_the_response_are_refused(task):
    with pytest.raises(ConfigError, match="evaluating the response as Python"):
        ReasoningGymSource([TaskSetting(task)])


def test_a_missing_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"pip install 'megatron-hybrid\[rewards\]'"):
        ReasoningGymSource([SUMS])


def test_a_question_depends_on_its_index_and_not_on_what_was_asked_before():
    first, second = (ReasoningGymSource([SUMS, WORDS], seed=5) for _ in range(2))
    forwards = [first.item(i) for i in range(12)]
    backwards = [second.item(i) for i in reversed(range(12))]
    assert forwards == backwards[::-1]


def test_tasks_take_turns():
    source = ReasoningGymSource([SUMS, WORDS])
    assert [source.item(i).task for i in range(4)] == ["chain_sum", "spell_backward"] * 2


def test_neighbouring_seeds_share_no_run_of_questions():
    big = TaskSetting("chain_sum", {"min_digits": 4})  # so many sums that two draws never agree by chance
    texts = [{ReasoningGymSource([big], seed=seed).item(i).text for i in range(50)} for seed in (0, 1)]
    assert not texts[0] & texts[1]


def test_held_out_questions_are_the_same_for_every_seed_and_never_trained_on():
    held_out = [ReasoningGymSource([SUMS], seed=seed, held_out=True) for seed in (0, 1)]
    texts = {held_out[0].item(i).text for i in range(100)}
    assert texts == {held_out[1].item(i).text for i in range(100)}

    training = ReasoningGymSource([SUMS], seed=0)
    plain = {training.item(i).text for i in range(100)}
    assert plain & texts, "the task is so small that its questions meet by chance, or this test shows nothing"
    apart = training.without(texts)
    assert not {apart.item(i).text for i in range(100)} & texts
    unmet = [i for i in range(100) if training.item(i).text not in texts]
    assert [apart.item(i) for i in unmet] == [training.item(i) for i in unmet], (
        "questions that do not meet stay as they were"
    )


def test_holding_out_every_question_of_a_task_is_an_error():
    tiny = TaskSetting("count_bits", {"max_n": 2})
    texts = {ReasoningGymSource([tiny], held_out=True).item(i).text for i in range(50)}
    with pytest.raises(DataError, match="too few different ones"):
        ReasoningGymSource([tiny]).without(texts).item(0)


def test_worked_examples_are_solved_distinct_and_neither_the_question_nor_held_out():
    held_out = ReasoningGymSource([WORDS], held_out=True)
    texts = {held_out.item(i).text for i in range(300)}
    source = ReasoningGymSource([WORDS]).without(texts)
    for question in map(source.item, range(40)):
        asked = [text for text, _ in question.examples]
        assert len({question.text, *asked}) == 3
        assert not texts & set(asked)
        assert all(text.endswith(answer[::-1]) for text, answer in question.examples)


def test_a_question_of_a_tiny_task_is_never_its_own_example():
    source = ReasoningGymSource([TaskSetting("count_bits", {"max_n": 3}, worked_examples=2)])  # three questions in all
    for question in map(source.item, range(20)):
        assert len({question.text, *(text for text, _ in question.examples)}) == 3


def test_every_vetted_setting_is_accepted():
    source = ReasoningGymSource(list(VETTED.values()))
    assert all(len(source.item(i).examples) == 1 for i in range(len(VETTED)))


def test_a_task_that_prepares_its_questions_still_gives_any_index():
    source = ReasoningGymSource([TaskSetting("word_ladder")])
    assert source.item(10**6).text == source.item(10**6).text != source.item(10**6 + 1).text
