"""Questions that cannot be used are left out, or drawn anew; the log says how many each source lost, and why."""

import logging

import pytest

from megatron_hybrid.errors import DataError
from megatron_hybrid.prompts.file_source import FileSource
from megatron_hybrid.prompts.mixture import MixtureSource
from megatron_hybrid.prompts.question import Question
from megatron_hybrid.prompts.reasoning_gym import ReasoningGymSource, TaskSetting
from megatron_hybrid.prompts.sources import open_sources
from megatron_hybrid.prompts.stream import PromptStream, too_long
from tests.prompts.test_stream import Letters

QUESTIONS = [Question("x" * n, "t", "yyy") for n in (5, 80, 7, 90, 78)]
SUMS = TaskSetting("chain_sum", {"min_terms": 2, "max_terms": 6})


def test_a_file_loses_its_long_questions_and_says_why(caplog):
    kept = FileSource(QUESTIONS, "q.jsonl").fitting(too_long(Letters(), 79))
    assert [len(kept.item(i).text) for i in range(kept.size)] == [5, 7, 78]
    assert "q.jsonl: 2 of 5 questions are left out: 2 longer than 79 tokens" in caplog.text


def test_a_question_that_only_the_teacher_cannot_read_is_left_out_too(caplog):
    kept = FileSource(QUESTIONS, "q.jsonl").fitting(too_long(Letters(" "), 79))
    assert kept.size == 2
    assert "2 longer than 79 tokens; 1 longer than 79 tokens with the teacher's hint" in caplog.text


def test_nothing_is_said_where_nothing_is_lost(caplog):
    caplog.set_level(logging.WARNING)
    assert FileSource(QUESTIONS, "q.jsonl").fitting(too_long(Letters(), 90)).size == 5
    assert not caplog.records


def test_a_file_without_a_question_that_fits_is_refused():
    with pytest.raises(DataError, match="no question of q.jsonl can be used: 5 longer than 4 tokens. Allow longer"):
        FileSource(QUESTIONS, "q.jsonl").fitting(too_long(Letters(), 4))


@pytest.mark.parametrize("held_out", [False, True])
def test_generated_questions_are_drawn_anew_until_they_fit(held_out, caplog):
    plain = ReasoningGymSource([SUMS], seed=1, held_out=held_out)
    lengths = [len(plain.item(i).text) for i in range(64)]
    limit = sorted(lengths)[40]
    source = plain.fitting(too_long(Letters(), limit))
    number = sum(length > limit for length in lengths)
    assert f"reasoning_gym:chain_sum: {number} of the first 64 questions are longer than {limit} tokens" in caplog.text
    assert max(len(source.item(i).text) for i in range(300)) <= limit
    again = plain.fitting(too_long(Letters(), limit))
    assert [again.item(i) for i in range(64)] == [source.item(i) for i in range(64)]
    unchanged = [i for i in range(64) if lengths[i] <= limit]
    assert [source.item(i) for i in unchanged] == [plain.item(i) for i in unchanged]


def test_a_task_whose_questions_are_all_long_is_refused():
    with pytest.raises(DataError, match="gave 100 questions that are all longer than 3 tokens"):
        ReasoningGymSource([SUMS]).fitting(too_long(Letters(), 3)).item(0)


def test_training_never_meets_a_held_out_question_that_was_drawn_anew():
    few = "reasoning_gym:chain_sum(min_terms=2,max_terms=2,min_digits=1,max_digits=1)"
    refuse = lambda question: "odd" if sum(map(ord, question.text)) % 2 else None  # noqa: E731
    training, held_out = open_sources(few, None, seed=3, num_eval=40, refuse=refuse)
    asked = {held_out.item(i).text for i in range(40)}
    assert not asked & {training.item(i).text for i in range(150)}
    assert not any(refuse(training.item(i)) for i in range(150))


def test_every_source_of_a_mixture_says_its_own_loss(caplog):
    parts = [(1, FileSource(QUESTIONS, "q.jsonl")), (1, FileSource(QUESTIONS[3:], "r.jsonl"))]
    source = MixtureSource(parts, seed=0).fitting(too_long(Letters(), 79))
    assert "q.jsonl: 2 of 5" in caplog.text and "r.jsonl: 1 of 2" in caplog.text
    PromptStream(source, Letters(), seed=0, max_prompt_length=79).draw(0, 100)
