"""Files of records: what can be used is used, everything else is counted, and nothing but DataError comes out."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from megatron_hybrid.errors import DataError
from megatron_hybrid.prompts.file_source import FileSource
from megatron_hybrid.prompts.recorded import read_rollouts
from tests.fuzz.targets import Target
from tests.online_jobs import make_tokenizer

NAMES = ("prompt", "answer", "task", "id", "response", "response_ids", "reward", "logprobs", "group", "truncated", "x")
TEXTS = st.sampled_from(("w1", "w2 w3", "", " ", "a\0b", "\ud800", "é\u2028", "w" * 300, "\n", "7")) | st.text(
    max_size=4
)
NUMBERS = st.sampled_from((0, 1, -1, 3, 16, 0.5, -0.5, 1e39, -1e308, 10**400, float("nan"), float("inf"), True))
ATOMS = st.none() | TEXTS | NUMBERS
VALUES = ATOMS | st.lists(ATOMS, max_size=3) | st.dictionaries(TEXTS, ATOMS, max_size=2)
RECORDS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6).map(
    lambda r: {"prompt": "w1", "answer": "w2"} | r
)
GOOD = st.builds(lambda p: {"prompt": p, "response": "w1", "answer": "w2"}, st.sampled_from(("w1", "w2", "w3")))
BROKEN = st.sampled_from((b"", b"  \r", b"\xef\xbb\xbf{}", b"[" * 3000, b'{"prompt": "a", "prompt": "b"}', b"1" * 5000))
LINES = (GOOD | RECORDS).map(lambda record: json.dumps(record).encode()) | BROKEN | st.binary(max_size=12)
JSONL = st.lists(LINES, max_size=6).map(b"\n".join)


@cache
def folder() -> Path:
    """In memory where there is such a place: the readers are tried, not the disk."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="fuzz", dir=memory if memory.is_dir() else None))


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(make_tokenizer(folder() / "words"))


def write(data: bytes, name: str) -> Path:
    path = folder() / name
    path.write_bytes(data)
    return path


def opened(read: Any) -> FileSource | None:
    """The source; None where the file was refused, in a sentence that can be read."""
    try:
        return read()
    except DataError as error:
        assert len(str(error).replace(str(folder()), "")) < 3000, "a message is to be read"
        str(error).encode()
        return None


def check_questions(path: Path, total: int | None) -> None:
    """total: records of the file, where that is known."""
    strict = opened(lambda: FileSource.read(path))
    lenient = opened(lambda: FileSource.read(path, on_bad_record="skip"))
    if lenient is None:
        assert strict is None
        return
    left_out = sum(each.count for each in lenient.left_out)
    assert total is None or lenient.size + left_out == total, "every record is used or counted"
    assert (strict is not None) == (left_out == 0), "stop ends where skip leaves something out"
    for question in lenient.probe(0):
        assert question.text.strip() and question.task.isprintable()
        f"{question.text}{question.task}{question.answer}".encode()


def check_jsonl(data: bytes) -> None:
    lines = data.split(b"\n")
    first = lines[0].removeprefix(b"\xef\xbb\xbf")
    check_questions(write(data, "q.jsonl"), sum(bool(line.strip()) for line in (first, *lines[1:])))


def check_rollouts(case: tuple[bytes, int]) -> None:
    data, group_size = case
    path = write(data, "r.jsonl")
    strict = opened(lambda: read_rollouts(path, tokenizer(), group_size))
    lenient = opened(lambda: read_rollouts(path, tokenizer(), group_size, on_bad_record="skip"))
    assert strict is None or (lenient is not None and lenient.left_out == () and lenient.size == strict.size)
    for question in () if lenient is None else lenient.probe(0):
        assert len(question.responses) == group_size
        for response in question.responses:
            assert response.token_ids and all(0 <= token < len(tokenizer()) for token in response.token_ids)
            assert response.log_probs is None or len(response.log_probs) == len(response.token_ids)
            assert abs(response.entry["record"].get("reward", 0)) < 3.5e38


COLUMNS = {
    "text": st.sampled_from((b"w1", b"w2", b"", b"\xff", b"\0", "é".encode(), None)),
    "number": st.sampled_from((0, 1, 2**62, None)),
    "real": st.sampled_from((0.5, float("nan"), float("inf"), None)),
    "list": st.sampled_from(([1, 2], [], None)),
}


@st.composite
def tables(draw: st.DrawFn) -> tuple[int, dict[str, tuple[str, list[Any]]], list[tuple[int, int]]]:
    """Rows, columns by name with their kind and values, and bytes of the file to change."""
    rows = draw(st.integers(0, 4))
    names = draw(st.lists(st.sampled_from(NAMES[:6]), unique=True, max_size=3))
    columns = {name: "text" for name in ("prompt", "answer")} | {
        n: draw(st.sampled_from(sorted(COLUMNS))) for n in names
    }
    values = {
        name: (kind, draw(st.lists(COLUMNS[kind], min_size=rows, max_size=rows))) for name, kind in columns.items()
    }
    changes = draw(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=2))
    return rows, values, changes if draw(st.booleans()) else []


def check_parquet(case: tuple[int, dict[str, tuple[str, list[Any]]], list[tuple[int, int]]]) -> None:
    import pyarrow
    from pyarrow import parquet

    rows, columns, changes = case
    kinds = {"number": pyarrow.int64(), "real": pyarrow.float64(), "list": pyarrow.list_(pyarrow.int64())}
    arrays = [
        pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())
        if kind == "text"
        else pyarrow.array(values, kinds[kind])
        for kind, values in columns.values()
    ]
    path = folder() / "q.parquet"
    parquet.write_table(pyarrow.Table.from_arrays(arrays, list(columns)), path, write_page_checksum=True)
    if changes:
        data = bytearray(path.read_bytes())
        for place, change in changes:
            data[place % len(data)] ^= change
        path.write_bytes(data)
    check_questions(path, None if changes else rows)


TARGETS = {
    "prompts, jsonl": Target(JSONL, check_jsonl),
    "prompts, parquet": Target(tables(), check_parquet),
    "rollouts, jsonl": Target(st.tuples(JSONL, st.sampled_from((1, 2))), check_rollouts),
}
