"""Several sources keep their shares in every block, resume from a position, and go through their own epochs."""

from collections import Counter

import pytest

from megatron_hybrid.errors import ConfigError, DataError
from megatron_hybrid.prompts.file_source import FileSource
from megatron_hybrid.prompts.mixture import BLOCK, MixtureSource
from megatron_hybrid.prompts.question import Question
from megatron_hybrid.prompts.reasoning_gym import ReasoningGymSource, TaskSetting
from tests.prompts.test_stream import stream


def letters(name, n):
    questions = [Question(f"{name}{i:03}", name, str(i), {"source": "jsonl"}) for i in range(n)]
    return FileSource(questions, f"{name}.jsonl")


def mixture(*shares, sizes=(7, 300, 50), seed=3):
    sources = [letters(name, n) for name, n in zip("abc", sizes, strict=False)]
    return MixtureSource(list(zip(shares, sources, strict=False)), seed=seed)


def test_every_block_holds_each_source_as_often_as_its_share_says():
    source = mixture(2, 5, 1)
    for block in range(3):
        found = Counter(source.item(block * BLOCK + i).task for i in range(BLOCK))
        assert found == {"a": 250, "b": 625, "c": 125}
    third = mixture(1, 1, 1)
    assert Counter(third.item(i).task for i in range(BLOCK)) == {"a": 334, "b": 333, "c": 333}


def test_each_source_is_asked_in_full_epochs_of_its_own():
    source = mixture(2, 5, 1)
    of_task = {task: [] for task in "abc"}
    for index in range(2 * BLOCK):
        question = source.item(index)
        of_task[question.task].append(question.text)
    for task, size in zip("abc", (7, 300, 50), strict=True):
        texts = of_task[task]
        for first in range(0, len(texts) - size, size):
            assert len(set(texts[first : first + size])) == size
        assert texts[:size] != texts[size : 2 * size], "each epoch has an order of its own"


def test_a_mixture_resumes_at_any_position_and_ranks_share_a_draw():
    whole = stream(mixture(2, 5, 1)).draw(0, 40)
    assert stream(mixture(2, 5, 1)).draw(33, 7) == whole[33:]
    assert [p for rank in range(3) for p in stream(mixture(2, 5, 1)).draw(0, 40, rank, 3)] == whole
    across = stream(mixture(2, 5, 1)).draw(BLOCK - 5, 10)
    assert stream(mixture(2, 5, 1)).draw(BLOCK - 5, 10) == across


def test_the_seed_decides_the_order():
    first, again, other = ([mixture(1, 1, seed=seed).item(i).text for i in range(50)] for seed in (3, 3, 4))
    assert first == again != other


def test_generated_questions_and_files_mix():
    generated = ReasoningGymSource([TaskSetting("chain_sum"), TaskSetting("gcd")], seed=1)
    source = MixtureSource([(0.75, generated), (0.25, letters("a", 5))], seed=0)
    assert source.tasks == {"chain_sum", "gcd", "a"}
    found = Counter(source.item(i).task for i in range(BLOCK))
    assert found == {"chain_sum": 375, "gcd": 375, "a": 250}
    # Its k-th question is the k-th of the mixture's generated ones.
    mixed = [q.text for q in map(source.item, range(40)) if q.task != "a"]
    assert mixed == [generated.item(i).text for i in range(len(mixed))]


def test_a_share_below_the_resolution_is_refused():
    with pytest.raises(ConfigError, match=r"a share of 0\.0001, and shares are kept to 1/1000"):
        mixture(0.9999, 0.0001)


def test_all_of_a_file_in_a_mixture_is_checked_for_length():
    long = FileSource([Question("short", "d", "")] * 90 + [Question("x" * 90, "d", "")], "long.jsonl")
    source = MixtureSource([(0.999, letters("a", 5)), (0.001, long)], seed=0)
    with pytest.raises(DataError, match="1 of 96 prompts are longer than 79 tokens"):
        stream(source, limit=79)
