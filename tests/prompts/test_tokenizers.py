"""A sentencepiece model in an online run: Megatron's ids, plain prompts, clear errors."""

import logging
import sys

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from megatron_hybrid.checkpoint.fingerprint import tokenizer_fingerprint
from megatron_hybrid.errors import ConfigError, DataError
from megatron_hybrid.prompts.question import Question
from megatron_hybrid.prompts.template import PromptTemplate
from megatron_hybrid.prompts.tokenizers import SENTENCEPIECE, SentencePieceTokenizer, read_tokenizer

LINES = [f"What is {a} plus {b} ?" for a in range(10) for b in range(10)]


def train(path, **settings):
    """A small model; settings are the library's."""
    default = {"vocab_size": 60, "model_type": "bpe", "hard_vocab_limit": False, "minloglevel": 2}
    with open(path, "wb") as file:
        SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=file, **{**default, **settings})
    return str(path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """As the library trains unless told otherwise: a line break becomes a space, and spaces at the end go."""
    return train(tmp_path_factory.mktemp("plain") / "tokenizer.model")


@pytest.fixture(scope="module")
def with_lines(tmp_path_factory):
    """As tools/train_tokenizer.py trains: a line break is a token."""
    settings = {"user_defined_symbols": ["\n"], "normalization_rule_name": "identity"}
    path = tmp_path_factory.mktemp("lines") / "tokenizer.model"
    return train(path, remove_extra_whitespaces=False, split_digits=True, **settings)


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_its_ids_and_its_end_of_sequence_are_megatrons(plain, kind):
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.config import TokenizerConfig

    megatron = build_tokenizer(TokenizerConfig(tokenizer_type=kind, tokenizer_model=plain, pad_vocab_size=False))
    ours = read_tokenizer(kind, plain)
    for text in (LINES[37], "something else: \u00e9\u00e8"):
        assert ours(text)["input_ids"] == megatron.tokenize(text)
    assert (len(ours), ours.eos_token_id) == (megatron.vocab_size, megatron.eod)
    assert ours.decode([*ours(LINES[37])["input_ids"], ours.eos_token_id], skip_special_tokens=True) == LINES[37]


def test_a_prompt_is_the_text_of_a_document_up_to_its_answer(with_lines, caplog):
    tokenizer = read_tokenizer("SentencePieceTokenizer", with_lines)
    with caplog.at_level(logging.WARNING):
        template = PromptTemplate(tokenizer)
    assert "no chat template" in caplog.text
    prompt = template.encode(Question("What is 3 plus 4 ?", "sums", "7"))
    document = tokenizer("What is 3 plus 4 ?\n7")["input_ids"]
    assert list(prompt) == document[: len(prompt)]
    assert tokenizer.decode(document[len(prompt) :], skip_special_tokens=True) == "7"


def test_a_model_that_drops_line_breaks_leaves_the_question(plain):
    tokenizer = read_tokenizer("SentencePieceTokenizer", plain)
    prompt = PromptTemplate(tokenizer).encode(Question("What is 3 plus 4 ?", "sums", "7"))
    assert list(prompt) == tokenizer("What is 3 plus 4 ?")["input_ids"]


def test_models_with_other_ids_have_other_fingerprints(plain, with_lines):
    prints = [tokenizer_fingerprint(read_tokenizer(SENTENCEPIECE[0], path)) for path in (plain, plain, with_lines)]
    assert prints[0] == prints[1] != prints[2]


def test_a_model_without_end_of_sequence_says_so(tmp_path):
    path = train(tmp_path / "endless.model", eos_id=-1)
    tokenizer = SentencePieceTokenizer(SentencePieceProcessor(model_file=path))
    assert tokenizer.eos_token_id is None
    assert tokenizer.eos_token is None


def test_what_is_no_model_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match="no file"):
        read_tokenizer("SentencePieceTokenizer", str(tmp_path))
    (tmp_path / "tokenizer.model").write_text("not a model")
    with pytest.raises(DataError, match="no sentencepiece model"):
        read_tokenizer("SentencePieceTokenizer", str(tmp_path / "tokenizer.model"))


def test_a_missing_package_says_how_to_install_it(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ConfigError, match=r"megatron-hybrid\[sentencepiece\]"):
        read_tokenizer("SentencePieceTokenizer", plain)
