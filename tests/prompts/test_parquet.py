"""A parquet file gives the questions that a .jsonl file of the same records gives."""

import json
import sys

import pytest

from megatron_hybrid.errors import ConfigError, DataError
from megatron_hybrid.prompts.file_source import FileSource
from megatron_hybrid.prompts.sources import open_source

RECORDS = [
    {"prompt": "1+1?", "answer": "2", "task": "sum", "level": 3},
    {"prompt": "2*3?", "answer": "6", "task": "product", "level": 4},
]


def write(path, records):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def test_the_same_records_give_the_same_questions(tmp_path):
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    lines = FileSource.read(tmp_path / "q.jsonl")
    rows = open_source(str(write(tmp_path / "q.parquet", RECORDS)))
    assert rows.tasks == lines.tasks == {"sum", "product"}
    for index in range(2):
        row, line = rows.item(index), lines.item(index)
        assert (row.text, row.task, row.answer) == (line.text, line.task, line.answer)
        assert row.entry == {"source": "parquet", "row": index + 1, "record": RECORDS[index]}


def test_a_bad_row_is_named(tmp_path):
    path = write(tmp_path / "q.parquet", [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": None}])
    with pytest.raises(DataError, match="1 of 2 rows cannot be used.*row 2: 'answer' is a NoneType, not a string"):
        FileSource.read(path)


def test_rows_are_numbered_through_all_batches_and_bad_ones_left_out_where_asked(tmp_path):
    records = [{"prompt": str(i), "answer": "\0" if i in (7, 2500) else "1"} for i in range(3000)]
    source = FileSource.read(write(tmp_path / "q.parquet", records), on_bad_record="skip")
    (left_out,) = source.left_out
    assert (left_out.unit, left_out.count, left_out.of) == ("rows", 2, 3000)
    assert left_out.reasons[1] == "row 2501: 'answer' holds a NUL character (at 0)"
    assert source.item(2998 - 1).entry["row"] == 3000


def test_a_value_that_is_no_text_is_named_by_row_and_column(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    answers = pyarrow.array([b"1", b"\xff", b"2"]).view(pyarrow.string())  # which nobody has looked at
    parquet.write_table(pyarrow.table({"prompt": ["a", "b", "c"], "answer": answers}), tmp_path / "q.parquet")
    with pytest.raises(DataError, match=r"1 of 3 rows .*row 2: 'answer' cannot be read \(not UTF-8, byte 0\)"):
        FileSource.read(tmp_path / "q.parquet")


def test_columns_of_one_name_are_refused(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = [pyarrow.array(["a"])] * 3
    parquet.write_table(pyarrow.Table.from_arrays(columns, ["prompt", "answer", "answer"]), tmp_path / "q.parquet")
    with pytest.raises(DataError, match="2 columns that are called 'answer'"):
        FileSource.read(tmp_path / "q.parquet")


def test_an_altered_page_is_told_by_its_checksum(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist([{"prompt": "a question", "answer": str(i)} for i in range(100)])
    path = tmp_path / "q.parquet"
    parquet.write_table(
        table, path, compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True
    )
    data = path.read_bytes()
    path.write_bytes(data.replace(b"a question", b"a QUESTION", 1))
    with pytest.raises(DataError, match=f"cannot read the prompt file {path}.*[Cc][Rr][Cc]"):
        FileSource.read(path)


def test_what_is_no_parquet_file_is_said(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "q.parquet").write_text("no such thing")
    for path in (tmp_path / "q.parquet", tmp_path / "nowhere.parquet"):
        with pytest.raises(DataError, match=f"cannot read the prompt file {path}"):
            FileSource.read(path)


def test_without_pyarrow_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # what importlib meets
    with pytest.raises(ConfigError, match=r"needs the pyarrow package.*pip install 'megatron-hybrid\[parquet\]'"):
        FileSource.read(tmp_path / "q.parquet")
