"""The prompt ends where the response begins, with and without a chat template."""

import logging

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_hybrid.errors import DataError
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
