"""A setting names a source; training and held-out questions never meet."""

import json

import pytest

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.prompts.file_source import FileSource
from megatron_hybrid.prompts.mixture import MixtureSource
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
    assert isinstance(open_source(file("a.jsonl", "ab")), FileSource)
    with pytest.raises(ConfigError, match=r"task' or a file that ends in \.jsonl or \.parquet, got 'a\.csv'"):
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


def test_a_mixture_is_named_with_shares(file):
    both = f"3*{SUMS},1*{file('a.jsonl', 'ab')}"
    source = open_source(both)
    assert isinstance(source, MixtureSource)
    assert [share for share, _ in source.parts] == [3, 1]
    assert source.tasks == {"chain_sum", "a"}


def test_of_a_mixture_the_generated_part_is_held_out_by_itself(file):
    both = f"3*{SUMS},1*{file('a.jsonl', 'ab')}"
    training, held_out = open_sources(both, None, seed=3, num_eval=40)
    assert {held_out.item(i).task for i in range(40)} == {"chain_sum"}
    asked = {held_out.item(i).text for i in range(40)}
    assert not asked & {training.item(i).text for i in range(200)}


def test_a_held_out_mixture_keeps_all_of_its_files_out_of_training(file):
    held = f"1*{SUMS},1*{file('e.jsonl', 'abx')}"
    training, _ = open_sources(file("t.jsonl", "abcd"), held, seed=0, num_eval=1)
    assert [training.item(i).text for i in range(training.size)] == ["c", "d"]
