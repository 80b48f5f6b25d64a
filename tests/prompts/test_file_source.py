"""A prompt file is read whole, checked whole, and its faults are named by line."""

import json

import pytest

from megatron_hybrid.errors import DataError
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
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(write, line, complaint):
    with pytest.raises(DataError) as caught:
        FileSource.read(write('{"prompt": "fine", "answer": "1"}\n' + line))
    assert "line 2: " in str(caught.value)
    assert complaint in str(caught.value)


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
    with pytest.raises(DataError, match="not UTF-8"):
        FileSource.read(write('{"prompt": "é", "answer": "1"}'.encode("latin-1")))


def test_held_out_questions_are_taken_out_and_a_file_of_nothing_else_is_refused(write):
    source = FileSource.read(write("\n".join(json.dumps({"prompt": p, "answer": "1"}) for p in "abc")))
    rest = source.without({"b", "elsewhere"})
    assert [rest.item(i).text for i in range(rest.size)] == ["a", "c"]
    with pytest.raises(DataError, match="every question .* is also held out"):
        source.without({"a", "b", "c"})
