import subprocess
import sys
from types import SimpleNamespace

import pytest

from megatron_hybrid.checkpoint.fingerprint import tokenizer_fingerprint
from megatron_hybrid.errors import DataError
from tests.checkpoint.tiny_llama import make_tokenizer


def test_a_saved_tokenizer_keeps_its_fingerprint(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_fingerprint(tokenizer)


def test_other_words_or_another_end_of_sequence_change_it():
    same, fewer, other_end = make_tokenizer(), make_tokenizer(words=60), make_tokenizer()
    other_end.eos_token = "w5"
    prints = [tokenizer_fingerprint(t) for t in (make_tokenizer(), same, fewer, other_end)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_the_padding_token_does_not_matter():
    tokenizer = make_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.pad_token = "</s>"
    assert tokenizer_fingerprint(tokenizer) == before


def test_two_words_that_swap_their_ids_change_it():
    words = {"a": 0, "b": 1}
    one = SimpleNamespace(get_vocab=lambda: words)
    other = SimpleNamespace(get_vocab=lambda: {"a": 1, "b": 0})
    reordered = SimpleNamespace(get_vocab=lambda: {"b": 1, "a": 0})
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(other)
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(reordered)


def test_megatrons_wrapper_is_looked_into():
    tokenizer = make_tokenizer()
    wrapped = SimpleNamespace(_tokenizer=SimpleNamespace(tokenizer=tokenizer))
    assert tokenizer_fingerprint(wrapped) == tokenizer_fingerprint(tokenizer)


def test_what_has_no_vocabulary_is_refused():
    with pytest.raises(DataError, match="get_vocab"):
        tokenizer_fingerprint(SimpleNamespace())


def test_it_needs_no_torch():
    code = "import sys, megatron_hybrid.checkpoint.fingerprint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
