"""A file of responses becomes groups of token ids, and a record that cannot be learnt from is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_hybrid.errors import DataError
from megatron_hybrid.prompts.recorded import read_rollouts, too_long_response
from tests.online_jobs import make_tokenizer

EOS = 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(make_tokenizer(tmp_path_factory.mktemp("words")))


@pytest.fixture
def read(tmp_path: Path, tokenizer: Any):
    def read(*records: dict[str, Any], group_size: int = 1) -> Any:
        path = tmp_path / "old.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return read_rollouts(path, tokenizer, group_size)

    return read


def said(prompt: str, response: str = "w1", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "response": response} | more


def test_text_ends_in_end_of_sequence_unless_it_was_cut_off(read):
    source = read(said("w0", "w1 w2"), said("w0", "w1", truncated=True))
    whole, cut = (source.item(i).responses[0] for i in range(2))
    assert (whole.token_ids, whole.truncated) == ((3, 4, EOS), False)
    assert (cut.token_ids, cut.truncated) == ((3,), True)


def test_token_ids_stay_as_they_are_and_tell_whether_they_were_cut_off(read):
    source = read({"prompt": "w0", "response_ids": [5, EOS]}, {"prompt": "w0", "response_ids": [5, 6]})
    found = [source.item(i).responses[0] for i in range(2)]
    assert [(r.token_ids, r.truncated) for r in found] == [((5, EOS), False), ((5, 6), True)]


def test_groups_are_those_of_the_field_or_of_equal_prompts_or_single_lines(read):
    def lines(source: Any) -> list[list[int]]:
        return [[r.entry["line"] for r in source.item(i).responses] for i in range(source.size)]

    by_prompt = said("w0"), said("w1"), said("w1"), said("w0")
    assert lines(read(*by_prompt, group_size=2)) == [[1, 4], [2, 3]]
    by_field = said("w0", group="a"), said("w0", group="b"), said("w0", group="a"), said("w0", group="b")
    assert lines(read(*by_field, group_size=2)) == [[1, 3], [2, 4]]
    assert lines(read(*by_field, group_size=1)) == [[1], [2], [3], [4]]


def test_a_record_keeps_its_own_fields_for_the_reward(read):
    (first, second) = (
        read(said("w0", reward=1, answer="w9"), said("w0", reward=0.5, answer="w9"), group_size=2).item(0).responses
    )
    assert first.entry == {
        "source": "recorded",
        "line": 1,
        "record": {"prompt": "w0", "response": "w1", "reward": 1, "answer": "w9"},
    }
    assert second.entry["record"]["reward"] == 0.5


def test_the_log_probs_of_the_sampler_come_along(read):
    assert read(said("w0", logprobs=[-1, -0.5])).item(0).responses[0].log_probs == (-1.0, -0.5)
    assert read(said("w0")).item(0).responses[0].log_probs is None


def test_parquet_rows_are_read_as_lines_are(tmp_path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {
        "prompt": ["w0", "w0"],
        "response_ids": [[3, EOS], [4]],
        "logprobs": [[-1.0, -2.0], [-0.5]],
        "reward": [1.0, 0.0],
        "answer": [None, None],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "old.parquet")
    (question,) = read_rollouts(tmp_path / "old.parquet", tokenizer, 2).probe(0)
    assert [(r.token_ids, r.log_probs, r.truncated) for r in question.responses] == [
        ((3, EOS), (-1.0, -2.0), False),
        ((4,), (-0.5,), True),
    ]
    assert question.answer is None


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"prompt": "w0"}], r"line 1: needs 'response' or 'response_ids', one of the two \(it has 'prompt'\)"),
        ([said("w0", response_ids=[3])], "one of the two"),
        ([said("")], "'prompt' is empty"),
        ([said("w0", response=3)], "'response' is a int, not a string"),
        ([said("w0", group=[1])], "'group' is a list, not a name or a number"),
        ([said("w0", truncated="no")], "'truncated' is a str, not true or false"),
        ([said("w0", "", truncated=True)], "the response has no token to learn from"),
        ([{"prompt": "w0", "response_ids": [3, 16]}], "holds 16, and the tokenizer has 16 tokens"),
        ([{"prompt": "w0", "response_ids": [3.0]}], "no list of whole numbers"),
        ([said("w0", reward="good")], "'reward' is 'good', not a finite number"),
        ([said("w0", reward=True)], "'reward' is True"),
        ([said("w0", logprobs=[-1.0])], "has 1 numbers, but the response 2 tokens, end-of-sequence included"),
        ([said("w0", logprobs=[-1.0, float("nan")])], "'logprobs' holds NaN, which is no JSON"),
        ([said("w0", logprobs=[-1.0, "2"])], "no list of finite numbers"),
        ([said("w0", logprobs=[-1.0, 0.5])], "holds 0.5, which is above 0"),
        ([said("w0", reward=10**400)], "'reward' is 1000000.*0000, not a finite number"),
        ([said("w0", reward=1e39)], "'reward' is 1e[+]39, not a finite number"),
        ([said("w0", "w1\ud800")], r"'response' holds half a surrogate pair \(at 2\)"),
        ([{"prompt": "w0", "response_ids": [10**400]}], r"holds 1000.*\.\.\..*, and the tokenizer has 16"),
        ([said("w0"), said("w0", reward=1.0)], r"1 of 2 records have no 'reward', the first is line 1.*all of them"),
        ([said("w0", logprobs=[-1, -1]), said("w0")], "no 'logprobs', the first is line 2"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(read, records, message):
    with pytest.raises(DataError, match=message):
        read(*records)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([said("w0"), said("w1"), said("w0")], r"1 of 2 groups do not have the 2 .*: line 2 are 1\. .*Set the group"),
        ([said("w0")] * 5, "line 1, line 2, line 3, line 4, ... are 5"),
        ([said("w0", group=1), said("w1", group=1)], r"line 1 and line 2 are one group \(1\) but not one prompt"),
    ],
)
def test_a_group_of_another_size_or_of_several_prompts_is_named(read, records, message):
    with pytest.raises(DataError, match=message):
        read(*records, group_size=2)


def test_skipped_records_take_their_groups_with_them_and_both_are_counted(tmp_path, tokenizer, caplog):
    lines = [json.dumps(said("w0", group=g)) for g in "aabb"] + [json.dumps(said(p, group="c")) for p in ("w0", "w1")]
    lines[1] = '{"prompt": "w0", "response": "w1", "group": "a"'
    (tmp_path / "old.jsonl").write_text("\n".join(lines))
    source = read_rollouts(tmp_path / "old.jsonl", tokenizer, 2, on_bad_record="skip")
    assert [[r.entry["line"] for r in source.item(i).responses] for i in range(source.size)] == [[3, 4]]
    record, groups = source.left_out
    assert (record.unit, record.count, record.of) == ("lines", 1, 6)
    assert (groups.unit, groups.count, groups.of) == ("groups", 2, 3)
    assert groups.reasons == ("line 1: 1 of 2 responses", "line 5: line 6 has another prompt, task or answer")
    assert "1 of 6 lines cannot be used" in caplog.text and "2 of 3 groups are not whole" in caplog.text


def test_a_file_of_which_no_group_is_whole_ends_the_run_also_where_records_are_skipped(tmp_path, tokenizer):
    (tmp_path / "old.jsonl").write_text(json.dumps(said("w0")))
    with pytest.raises(DataError, match="1 of 1 groups do not have the 2 responses"):
        read_rollouts(tmp_path / "old.jsonl", tokenizer, 2, on_bad_record="skip")


def test_groups_with_a_response_that_has_no_room_can_be_left_out(read):
    source = read(said("w0", "w1 w2 w3"), said("w1", "w1"), said("w1", "w2"), said("w0", "w1"), group_size=2)
    kept = source.fitting(too_long_response(3))
    assert [kept.item(i).text for i in range(kept.size)] == ["w1"]
