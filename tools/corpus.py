"""Texts from files for the tools that read a corpus: a .jsonl file has one in the "text" of each line, any other file
one in each line that is not empty. Checked while they are read; progress is by bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from megatron_hybrid.errors import DataError


def texts(files: list[Path]) -> Iterator[str]:
    """Every text of the files in order, behind a progress bar.

    Raises:
        DataError: a file cannot be read, is not UTF-8, or has a line without a text.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import DownloadColumn as BytesColumn

    columns = TextColumn("{task.description}"), BarColumn(), BytesColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    for file in files:
        if not file.is_file():
            raise DataError(f"{file} is no file: give files of plain text, a text in each line, or .jsonl files.")
    with Progress(*columns) as progress:
        task = progress.add_task("reading", total=sum(file.stat().st_size for file in files))
        for file in files:
            with file.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    progress.advance(task, len(line))
                    if line.strip():
                        yield _text(line, f"{file}, line {number}", is_json=file.suffix == ".jsonl")


def _text(line: bytes, where: str, *, is_json: bool) -> str:
    try:
        text = line.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 ({error.reason}): save the file as UTF-8.") from error
    if not is_json:
        return text
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f'{where} is not JSON ({error.msg}): expected {{"text": "..."}} in each line.') from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str) or not record["text"]:
        raise DataError(f'{where} has no text: expected {{"text": "..."}}, got {str(record)[:60]}.')
    return record["text"]
