"""The order of prompts is a function of (seed, position), and ranks share a draw without overlap."""

from collections import Counter

import pytest

from megatron_hybrid.errors import ConfigError, DataError
from megatron_hybrid.prompts.file_source import FileSource
from megatron_hybrid.prompts.question import Question
from megatron_hybrid.prompts.reasoning_gym import ReasoningGymSource, TaskSetting
from megatron_hybrid.prompts.stream import PromptStream


class Letters:
    """A template of one token per letter; the teacher reads the answer too, where there is a hint."""

    def __init__(self, hint=""):
        self.hint = hint

    def encode(self, question):
        return tuple(map(ord, question.text))

    def encode_for_teacher(self, question):
        return tuple(map(ord, question.text + self.hint + question.answer)) if self.hint else None


def file_of(n):
    return FileSource([Question(f"question {i:03}", "file", str(i), {"source": "jsonl"}) for i in range(n)], "a file")


def stream(source=None, *, seed=0, limit=200):
    return PromptStream(source or file_of(10), Letters(), seed=seed, max_prompt_length=limit)


GENERATED = ReasoningGymSource([TaskSetting("chain_sum"), TaskSetting("gcd")], seed=1)


@pytest.mark.parametrize("source", [file_of(10), GENERATED])
def test_a_resumed_stream_continues_as_if_it_had_never_stopped(source):
    whole = stream(source).draw(0, 35)
    resumed = stream(source)
    assert resumed.draw(7, 28) == whole[7:]
    assert resumed.draw(3, 4) == whole[3:7], "going back works too"


@pytest.mark.parametrize("source", [file_of(10), GENERATED])
@pytest.mark.parametrize("dp_size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 5, 24])
def test_ranks_share_a_draw_disjointly_and_completely(source, dp_size, count):
    parts = [stream(source).draw(13, count, rank, dp_size) for rank in range(dp_size)]
    assert sum(parts, []) == stream(source).draw(13, count)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_prompt_ids_are_positions_and_prompts_carry_what_rewards_need():
    prompts = stream().draw(12, 3)
    assert [prompt.prompt_id for prompt in prompts] == [12, 13, 14]
    for prompt in prompts:
        assert prompt.text == f"question {int(prompt.answer):03}"
        assert prompt.token_ids == tuple(map(ord, prompt.text))
        assert (prompt.task, prompt.entry) == ("file", {"source": "jsonl"})


def test_each_epoch_of_a_file_asks_every_question_once_in_a_new_order():
    epochs = [[p.text for p in stream(file_of(50)).draw(50 * e, 50)] for e in range(3)]
    assert all(Counter(epoch).most_common(1)[0][1] == 1 and len(epoch) == 50 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_seed_decides_the_order_of_a_file():
    orders = [[p.text for p in stream(file_of(50), seed=seed).draw(0, 50)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_the_longest_prompt_of_a_file_is_found_at_construction():
    questions = [Question("short", "file", ""), Question("x" * 90, "file", ""), Question("y" * 80, "file", "")]
    with pytest.raises(DataError, match=r"2 of 3 prompts are longer than 79 tokens; the longest has 90 .*'xxxx.*raise"):
        stream(FileSource(questions, "a file"), limit=79)
    stream(FileSource(questions, "a file"), limit=90)


def test_generated_prompts_are_sampled_at_construction_and_checked_at_each_draw():
    with pytest.raises(DataError, match="of 64 prompts are longer than 20 tokens"):
        stream(GENERATED, limit=20)

    class RarelyLong:
        size = None

        def item(self, index):
            return Question("long" * 50 if index == 1000 else "short", "rare", "")

        def probe(self, count):
            return map(self.item, range(count))

    rare = stream(RarelyLong())
    rare.draw(900, 100)
    with pytest.raises(DataError, match="1 of 10 prompts .* the longest has 200"):
        stream(RarelyLong(), limit=199).draw(995, 10)


def test_calls_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="for rank 2 of 2"):
        stream().draw(0, 4, 2, 2)
    with pytest.raises(ConfigError, match="-1 prompts"):
        stream().draw(0, -1)
    with pytest.raises(ConfigError, match="leaves no room for a prompt"):
        stream(limit=0)
    with pytest.raises(DataError, match="no questions"):
        stream(FileSource([], "nothing"))


def test_a_hint_goes_to_the_teacher_alone_and_must_fit_too():
    def hinted(limit):
        return PromptStream(file_of(10), Letters(" is "), seed=0, max_prompt_length=limit)

    (prompt,) = hinted(17).draw(0, 1)  # "question 000" has 12 letters, " is 0" five more
    assert "".join(map(chr, prompt.token_ids)) == prompt.text
    assert "".join(map(chr, prompt.teacher_token_ids)) == f"{prompt.text} is {prompt.answer}"
    with pytest.raises(DataError, match="hint 10 of 10 prompts are longer than 16 tokens; .* has 17, 12 without it"):
        hinted(16)
    assert stream().draw(0, 1)[0].teacher_token_ids is None
