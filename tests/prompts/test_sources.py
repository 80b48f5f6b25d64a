"""A setting names a source; training and held-out questions never meet."""

import json

import pytest

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.prompts.jsonl import JsonlSource
from megatron_hybrid.prompts.reasoning_gym import ReasoningGymSource
from megatron_hybrid.prompts.sources import open_source, open_sources

SUMS = "reasoning_gym:chain_sum(min_terms=2,max_terms=2,max_digits=1)"


@pytest.fixture
def file(tmp_path):
    def file(name, prompts):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps({"prompt": p, "answer": "1"}) for p in prompts))
        return str(path)

    return file


def test_the_form_of_the_setting_chooses_the_source(file):
    assert isinstance(open_source(SUMS), ReasoningGymSource)
    assert isinstance(open_source(file("a.jsonl", "ab")), JsonlSource)
    with pytest.raises(ConfigError, match=r"reasoning_gym:task,task' or a file that ends in \.jsonl, got 'a\.csv'"):
        open_source("a.csv")


def test_generated_training_drops_what_is_held_out_from_the_same_tasks():
    training, held_out = open_sources(SUMS, None, seed=3, num_eval=80)
    asked = {held_out.item(i).text for i in range(80)}
    assert asked & {open_source(SUMS, seed=3).item(i).text for i in range(80)}, "they would meet if nothing were done"
    assert not asked & {training.item(i).text for i in range(200)}


def test_a_training_file_drops_the_questions_of_the_held_out_file(file):
    training, held_out = open_sources(file("t.jsonl", "abcd"), file("e.jsonl", "bx"), seed=0, num_eval=1)
    assert [training.item(i).text for i in range(training.size)] == ["a", "c", "d"]
    assert held_out.size == 2


def test_a_training_file_alone_holds_nothing_out(file):
    training, held_out = open_sources(file("t.jsonl", "ab"), None, seed=0, num_eval=1)
    assert (training.size, held_out) == (2, None)
