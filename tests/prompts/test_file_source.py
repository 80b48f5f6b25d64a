"""A prompt file is read whole, checked whole, and its faults are named by line."""

import json
import tracemalloc

import pytest

from megatron_hybrid.errors import DataError
from megatron_hybrid.prompts import jsonl
from megatron_hybrid.prompts.file_source import FileSource


@pytest.fixture
def write(tmp_path):
    def write(text, name="sums.jsonl"):
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def test_each_line_becomes_a_question_with_its_own_record(write):
    source = FileSource.read(write('{"prompt": "1+1?", "answer": "2", "task": "sum", "level": 3}\n'))
    question = source.item(0)
    assert (source.size, question.text, question.answer, question.task) == (1, "1+1?", "2", "sum")
    assert question.entry["source"] == "jsonl"
    assert question.entry["record"]["level"] == 3


def test_the_file_names_the_task_where_a_line_does_not(write):
    assert FileSource.read(write('{"prompt": "1+1?", "answer": "2"}')).item(0).task == "sums"


def test_blank_lines_windows_endings_byte_order_marks_and_line_separators_are_harmless(write):
    # U+2028 counts as a line end for str.splitlines, but may stand inside a JSON string.
    lines = ['{"prompt": "a\u2028b", "answer": "1"}', "", "  ", '{"prompt": "c", "answer": "2"}', ""]
    source = FileSource.read(write("\ufeff" + "\r\n".join(lines)))
    assert [source.item(i).text for i in range(source.size)] == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt": "a", "answer": ', "not JSON"),
        ('["a", "b"]', "a JSON list, not an object"),
        ('{"prompt": "a"}', "no 'answer' field (it has 'prompt')"),
        ('{"answer": "a"}', "no 'prompt' field"),
        ('{"prompt": "a", "answer": 4}', "'answer' is a int, not a string"),
        ('{"prompt": ["a"], "answer": "4"}', "'prompt' is a list, not a string"),
        ('{"prompt": "a", "answer": "4", "task": null}', "'task' is a NoneType, not a string"),
        ('{"prompt": "  ", "answer": "4"}', "'prompt' is empty"),
        ('{"prompt": "a\\ud800", "answer": "4"}', "'prompt' holds half a surrogate pair (at 1)"),
        ('{"prompt": "a", "answer": "4\\u0000"}', "'answer' holds a NUL character (at 1)"),
        ('{"prompt": "a", "answer": "4\0"}', "not JSON (NUL at byte "),
        ('{"prompt": "a", "answer": "4", "level": [0, NaN]}', "'level' holds NaN, which is no JSON"),
        ("-Infinity", "holds -Infinity, which is no JSON"),
        ("[NaN, ", "holds NaN, which is no JSON"),
        ('{"prompt": "a", "answer": "4", "level": 1' + "0" * 5000 + "}", "a whole number of more digits than can be"),
        ('{"prompt": "a", "prompt": "b", "answer": "4"}', "'prompt' stands 2 times in one object"),
        ('{"prompt": "a", "answer": "4", "task": "a\\nb"}', "metrics are named after it"),
        ('{"prompt": "a", "answer": "4", "task": "' + "t" * 201 + '"}', "metrics are named after it"),
        ("[" * 100_000, "nested too deeply to be read"),
        ('\ufeff{"prompt": "a", "answer": "4"}', "not JSON (Unexpected UTF-8 BOM"),
        ('{"' + "k" * 10**6 + '": 1}', "no 'prompt' field (it has 'kkkkkkkkkkkk...kkkkkkkkkkkkk')"),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(write, line, complaint):
    with pytest.raises(DataError) as caught:
        FileSource.read(write('{"prompt": "fine", "answer": "1"}\n' + line))
    assert "line 2: " in str(caught.value)
    assert complaint in str(caught.value)
    assert len(str(caught.value)) < 1000, "a message is to be read"


def test_only_the_first_bad_lines_are_listed_and_the_rest_are_counted(write):
    with pytest.raises(DataError, match=r"9 of 9 lines.*line 5: .*; and 4 more\.") as caught:
        FileSource.read(write("x\n" * 9))
    assert "line 6" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_file_is_an_error(write, text):
    with pytest.raises(DataError, match="holds no questions"):
        FileSource.read(write(text))


def test_a_missing_file_and_a_wrong_encoding_are_explained(write, tmp_path):
    with pytest.raises(DataError, match="cannot read the prompt file"):
        FileSource.read(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"line 1: not UTF-8 \(byte 12: invalid continuation byte\)"):
        FileSource.read(write('{"prompt": "é", "answer": "1"}'.encode("latin-1")))


def test_bad_lines_are_left_out_where_asked_counted_and_said(write, caplog):
    good = '{"prompt": "%s", "answer": "1", "id": %s}\n'
    text = good % ("a", 7) + "x\n" * 7 + good % ("b", 7) + good % ("c", "true")
    source = FileSource.read(write(text), on_bad_record="skip")
    assert [source.item(i).text for i in range(source.size)] == ["a", "c"]
    (left_out,) = source.left_out
    assert (left_out.unit, left_out.count, left_out.of) == ("lines", 8, 10)
    assert left_out.reasons[0] == "line 2: not JSON (Expecting value at column 1)" and len(left_out.reasons) == 5
    assert "8 of 10 lines cannot be used and are left out: line 2: not JSON" in caplog.text
    assert source.without({"a"}).left_out == source.fitting(lambda question: None).left_out == (left_out,)


def test_a_file_of_bad_lines_alone_ends_the_run_also_where_they_are_skipped(write):
    with pytest.raises(DataError, match=r"2 of 2 lines cannot be used.*line 2: not JSON"):
        FileSource.read(write("x\nx\n"), on_bad_record="skip")


def test_an_id_that_stands_twice_is_named_with_both_places(write):
    text = "\n".join(json.dumps({"prompt": prompt, "answer": "1", "id": "q1"}) for prompt in "ab")
    with pytest.raises(DataError, match="line 2: 'id' is 'q1', which line 1 has already.*--hybrid-on-bad-record skip"):
        FileSource.read(write(text))


def test_a_line_without_end_is_named_and_never_held(write, monkeypatch):
    monkeypatch.setattr(jsonl, "LONGEST_LINE_BYTES", 1 << 20)
    good = b'{"prompt": "a", "answer": "1"}'
    path = write(good + b"\n" + good[:-2] + b"1" * (20 << 20) + b'"}\n' + good.ljust(1 << 20) + b"\n")
    tracemalloc.start()
    source = FileSource.read(path, on_bad_record="skip")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert source.left_out[0].reasons == ("line 2: longer than 1 MB",)
    assert [source.item(i).entry["line"] for i in range(source.size)] == [1, 3], "the longest that is allowed is read"
    assert peak < 6 << 20, "of 20 MB"


def test_held_out_questions_are_taken_out_and_a_file_of_nothing_else_is_refused(write):
    source = FileSource.read(write("\n".join(json.dumps({"prompt": p, "answer": "1"}) for p in "abc")))
    rest = source.without({"b", "elsewhere"})
    assert [rest.item(i).text for i in range(rest.size)] == ["a", "c"]
    with pytest.raises(DataError, match="every question .* is also held out"):
        source.without({"a", "b", "c"})
