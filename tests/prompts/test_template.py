"""The prompt ends where the response begins, with and without a chat template."""

import logging

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_hybrid.errors import ConfigError, DataError
from megatron_hybrid.prompts.question import Question
from megatron_hybrid.prompts.template import PromptTemplate

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<s> default </s> {% endif %}"
    "<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}{% if add_generation_prompt %}<s> assistant {% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}hi"


def words(*, chat_template=None, closes_texts=False):
    """A tokenizer of whole words."""
    vocabulary = ["<unk>", "<s>", "</s>", "default", "system", "user", "assistant", "one", "two", "three", "four"]
    vocabulary += ["hi", "be", "brief"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if closes_texts:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", chat_template=chat_template
    )


def encoded(tokenizer, question, **options):
    return tokenizer.decode(PromptTemplate(tokenizer, **options).encode(question))


def test_the_prompt_ends_with_the_generation_prompt():
    question = Question("one two", "task", "three")
    assert encoded(words(chat_template=CHATML), question) == "<s> default </s> <s> user one two </s> <s> assistant"


def test_a_system_prompt_replaces_the_templates_default_and_an_empty_one_silences_it():
    tokenizer, question = words(chat_template=CHATML), Question("one", "task", "two")
    assert encoded(tokenizer, question, system_prompt="be brief").startswith("<s> system be brief </s> <s> user one")
    assert encoded(tokenizer, question, system_prompt="").startswith("<s> system </s> <s> user one")


def test_worked_examples_are_earlier_turns():
    question = Question("three", "task", "four", examples=(("one", "two"),))
    assert encoded(words(chat_template=CHATML), question, system_prompt="") == (
        "<s> system </s> <s> user one </s> <s> assistant two </s> <s> user three </s> <s> assistant"
    )


def test_the_answer_is_never_in_the_prompt():
    for tokenizer in (words(), words(chat_template=CHATML)):
        assert "four" not in encoded(tokenizer, Question("three", "task", "four", {"record": "four"}))


def test_without_a_chat_template_prompts_are_plain_text_and_the_log_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        plain = encoded(words(), Question("three", "task", "", examples=(("one", "two"),)), system_prompt="be brief")
    assert plain == "be brief one two three"
    assert "no chat template" in caplog.text


def test_a_tokenizer_that_closes_texts_does_not_end_the_response_before_it_starts():
    assert encoded(words(closes_texts=True), Question("one two", "task", "")) == "one two"


def test_a_template_that_refuses_system_messages_is_reported_before_any_question():
    with pytest.raises(DataError, match="no system role.*leave system_prompt unset"):
        PromptTemplate(words(chat_template=NO_SYSTEM), system_prompt="be brief")
    PromptTemplate(words(chat_template=NO_SYSTEM))


def hinted(tokenizer, question, hint):
    ids = PromptTemplate(tokenizer, system_prompt="", teacher_hint=hint).encode_for_teacher(question)
    return tokenizer.decode(ids)


def test_the_teacher_reads_the_hint_behind_the_question_with_the_answer_filled_in():
    question = Question("one two", "task", "four", examples=(("one", "two"),))
    assert hinted(words(chat_template=CHATML), question, "hi {answer}") == (
        "<s> system </s> <s> user one </s> <s> assistant two </s> <s> user one two hi four </s> <s> assistant"
    )
    assert hinted(words(), question, "hi {answer}") == "one two one two hi four"


def test_an_empty_line_parts_question_and_hint():
    tokenizer = words()
    seen = []
    tokenizer._encode_plus = lambda text, **options: seen.append(text) or {"input_ids": [1]}
    PromptTemplate(tokenizer, teacher_hint="hi").encode_for_teacher(Question("one", "task", ""))
    assert seen[-1] == "one\n\nhi\n"


def test_the_student_never_reads_the_hint():
    tokenizer, question = words(), Question("one two", "task", "four")
    assert encoded(tokenizer, question, teacher_hint="hi {answer}") == encoded(tokenizer, question)


def test_without_a_hint_the_teacher_reads_what_the_student_reads():
    assert PromptTemplate(words()).encode_for_teacher(Question("one", "task", "two")) is None


def test_a_hint_without_a_placeholder_needs_no_answer():
    assert hinted(words(), Question("one", "task", ""), "be brief") == "one be brief"


def test_braces_written_twice_are_braces():
    template = PromptTemplate(words(), teacher_hint="hi {{answer}}")
    assert template.encode_for_teacher(Question("one", "task", "")) is not None


def test_a_prompt_without_an_answer_is_named_where_the_hint_needs_one():
    template = PromptTemplate(words(), teacher_hint="hi {answer}")
    with pytest.raises(DataError, match=r"holds \{answer\}, but the prompt 'one two' \(task 'task'\) has no answer"):
        template.encode_for_teacher(Question("one two", "task", ""))


@pytest.mark.parametrize(
    ("hint", "message"),
    [
        ("hi {solution} {x}", r"has the placeholder \{solution\}, \{x\}: only \{answer\}"),
        ("hi {}", r"has the placeholder \{\}: only"),
        ("hi {answer.text}", r"has the placeholder \{answer\.text\}"),
        ("hi {answer", "cannot be filled in .*written twice"),
        ("hi }", "cannot be filled in"),
        ("hi {answer:d}", "cannot be filled in"),
        ("  ", "teacher_hint is empty.*unset"),
    ],
)
def test_a_hint_that_cannot_be_filled_in_is_refused_before_any_prompt(hint, message):
    with pytest.raises(ConfigError, match=message):
        PromptTemplate(words(), teacher_hint=hint)
