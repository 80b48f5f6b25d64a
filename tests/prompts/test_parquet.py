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
