"""The journal: what was written is read again, whatever a crash or a resume did in between."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_hybrid.errors import DataError
from megatron_hybrid.train import journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        journal.append(file, {"step": step, "x": step / 2})
    return file


def steps(path: Path) -> list[int]:
    return [record["step"] for record in journal.read(path)]


def test_records_come_back_in_order(path: Path):
    assert journal.read(path) == [{"step": s, "x": s / 2} for s in (1, 2, 3)]


def test_no_file_is_no_records(tmp_path: Path):
    assert journal.read(tmp_path / "none.jsonl") == []
    assert journal.rewind(tmp_path / "none.jsonl", 5) == 0


def test_non_finite_numbers_are_strict_json_and_come_back_as_numbers(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    journal.append(path, {"step": 1, "values": [math.nan, math.inf, -math.inf]})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    (line,) = path.read_text().splitlines()
    values = json.loads(line, parse_constant=refuse)["values"]
    assert values == ["NaN", "Infinity", "-Infinity"]
    nan, high, low = map(float, values)
    assert math.isnan(nan) and (high, low) == (math.inf, -math.inf)


def test_tensors_arrays_and_the_unknown_become_plain(tmp_path: Path):
    value = {1: torch.tensor([1.5]), "n": np.float32(math.inf), "t": (1, None, True), "dtype": torch.bfloat16}
    assert journal.plain(value) == {"1": [1.5], "n": "Infinity", "t": [1, None, True], "dtype": "torch.bfloat16"}


def test_any_text_of_a_model_survives(tmp_path: Path):
    path, text = tmp_path / "x.jsonl", 'quote " newline \n line separator \u2028 half a pair \ud83d snow ☃'
    journal.append(path, {"step": 1, "text": text})
    journal.append(path, {"step": 2, "text": "after"})
    assert journal.rewind(path, 1) == 1
    assert [record["text"] for record in journal.read(path)] == [text]


@pytest.mark.parametrize("tail", ['{"step": 4, "x"', "{", '"a string"', "\0\0\0\0", '{"step": 4, "x"\n', "4"])
def test_an_unfinished_last_line_is_ignored_then_removed(path: Path, tail: str):
    before = path.read_bytes()
    path.write_bytes(before + tail.encode())
    assert steps(path) == [1, 2, 3]
    assert journal.rewind(path, 3) == 0
    assert path.read_bytes() == before


def test_a_last_line_cut_within_a_character_is_removed(path: Path):
    before = path.read_bytes()
    path.write_bytes(before + '{"step": 4, "text": "☃'.encode()[:-1])
    journal.rewind(path, 3)
    assert path.read_bytes() == before


def test_a_whole_last_line_without_its_newline_is_kept(path: Path):
    path.write_bytes(path.read_bytes()[:-1])
    journal.rewind(path, 3)
    journal.append(path, {"step": 4})
    assert steps(path) == [1, 2, 3, 4]


def test_rewinding_moves_later_records_aside_and_nothing_else(path: Path):
    first = path.read_bytes().split(b"\n")[0]
    assert journal.rewind(path, 1) == 2
    assert path.read_bytes() == first + b"\n"
    assert steps(path.with_name("metrics.dropped.jsonl")) == [2, 3]


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(path: Path):
    path.write_text(path.read_text().replace('{"step": 2', '{"step" 2'))
    with pytest.raises(DataError, match=r"line 2 of .*metrics\.jsonl"):
        journal.read(path)
    with pytest.raises(DataError):
        journal.rewind(path, 3)


def test_a_whole_line_is_handed_to_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[int] = []
    monkeypatch.setattr(journal.os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    journal.append(path, {"step": 4})
    assert synced == [path.stat().st_size]
