"""Online training with a sentencepiece tokenizer: plain prompts from a file, a teacher that Megatron saved."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer

from tests.online_jobs import WORDS, make_prompts, make_teacher, run, steps, with_teacher
from tests.recorded_jobs import refused


def make_model(path: Path, vocab_size: int) -> str:
    """A model of the words, a line break among its tokens."""
    lines = [f"{a} {b}" for a in WORDS for b in WORDS]
    with path.open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=file,
            vocab_size=vocab_size,
            model_type="bpe",
            user_defined_symbols=["\n"],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory, rank_pool):
    folder = tmp_path_factory.mktemp("sentencepiece")
    model = make_model(folder / "tokenizer.model", 21)
    make_prompts(folder / "prompts.jsonl")
    flags = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": model}
    rank_pool(1, init=False).run(make_teacher, str(folder), flags)
    return folder, flags


def test_an_online_run_reads_plain_prompts_and_shows_its_text(place, rank_pool):
    folder, flags = place
    overrides = flags | with_teacher(folder, "online", train_iters=2, hybrid_samples_interval=1)
    printed = rank_pool(1, init=False).run(run, str(folder), overrides)[0]
    assert "step 2/2" in printed
    assert all(step["actor/kl_loss"] > 0 for step in steps(folder, "online"))
    samples = [json.loads(line) for line in (folder / "online" / "samples.jsonl").read_text().splitlines()]
    # The prompt is the question's own text and a line break, with nothing before it.
    assert {sample["prompt"].strip(" ") for sample in samples} <= {f"{word}\n" for word in WORDS} | set(WORDS)


def test_a_teacher_with_other_pieces_is_refused(place, rank_pool):
    folder, flags = place
    other = make_model(folder / "other.model", 20)
    overrides = flags | {"tokenizer_model": other} | with_teacher(folder, "refused", train_iters=1)
    said = rank_pool(1, init=False).run(refused, run, str(folder), overrides)[0]
    assert said.startswith("DataError") and "was made with another tokenizer" in said


def test_tokens_beside_the_model_are_refused(place, rank_pool):
    folder, flags = place
    overrides = flags | {"tokenizer_sentencepiece_legacy": True} | with_teacher(folder, "refused", train_iters=1)
    said = rank_pool(1, init=False).run(refused, run, str(folder), overrides)[0]
    assert re.match("ConfigError.*--tokenizer-sentencepiece-legacy .*Leave both out", said)
