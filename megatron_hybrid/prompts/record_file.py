"""A file of records, .jsonl lines or .parquet rows, read and checked whole: what every such file goes through.

    jsonl.py | parquet.py -> parse, record by record -> what can be used, and what cannot: the end, or left out

The whole file is read at once, so that a bad line 90 000 is a message in the first second and not a crash in the second
hour. Records that cannot be used end the run, or are left out and counted, with the first few reasons; never silently.
"""

import logging
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hybrid.errors import DataError
from megatron_hybrid.prompts.jsonl import jsonl_records
from megatron_hybrid.prompts.parquet import parquet_records
from megatron_hybrid.prompts.question import LeftOut

_SHOWN_PROBLEMS = 5  # enough to see the pattern of what is wrong without burying it
_SHOWN_FIELDS = 8
_LONGEST_TASK = 200
_FORMS = {".jsonl": ("line", jsonl_records), ".parquet": ("row", parquet_records)}
FILE_ENDINGS = tuple(_FORMS)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Records[T]:
    """The records of a file that can be used, and the account of those that were left out."""

    found: list[T]
    left_out: LeftOut | None


def parsed_records[T](
    path: Path,
    parse: Callable[[Any, dict[str, int]], T],
    *,
    what: str,
    expected: str,
    on_bad_record: str = "stop",
) -> Records[T]:
    """Every record of a file, the problems of all of them told at once.

    parse           from a record and {"line" or "row": its number}; a ValueError says what is wrong with it
    what, expected  for messages: what the file should hold, and the form of a record
    on_bad_record   "stop", or "skip": leave out what `parse` refuses, and say so in the log

    Raises:
        DataError: it cannot be read, holds a record that `parse` refuses, or none that can be used.
    """
    unit, records = _FORMS[path.suffix]
    found: list[T] = []
    bad, reasons = 0, []
    for number, record in records(path):
        try:
            found.append(parse(record, {unit: number}))
        except ValueError as problem:
            bad += 1
            if bad <= _SHOWN_PROBLEMS:
                reasons.append(f"{unit} {number}: {problem}")
    total = bad + len(found)
    if not total:
        raise DataError(f"{path} holds no {what}: expected {expected} in each {unit}.")
    if not bad:
        return Records(found, None)
    listed = "; ".join(reasons) + (f"; and {bad - len(reasons)} more." if bad > len(reasons) else ".")
    if on_bad_record == "stop" or not found:
        hint = " Mend them, or leave them out: --hybrid-on-bad-record skip." if found else ""
        raise DataError(
            f"{path}: {bad} of {total} {unit}s cannot be used. Expected "
            f'{expected} in each {unit}, "task" if you like. {listed}{hint}'
        )
    _log.warning("%s: %d of %d %ss cannot be used and are left out: %s", path, bad, total, unit, listed)
    return Records(found, LeftOut(str(path), f"{unit}s", bad, total, tuple(reasons)))


def checked_record(record: Any, required: Sequence[str]) -> dict[str, Any]:
    """A record with a prompt, and these fields; a ValueError says what is wrong with it."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, not an object")
    for name in required:
        if name not in record:
            raise ValueError(f"no {name!r} field (it has {field_names(record)})")
    for name in ("prompt", "answer", "task"):
        if name in record:
            check_text(name, record[name])
    if not record["prompt"].strip():
        raise ValueError("'prompt' is empty")
    task = record.get("task", "task")
    if not (0 < len(task) <= _LONGEST_TASK and task.isprintable()):
        raise ValueError(
            f"'task' is {reprlib.repr(task)}, and metrics are named after it: expected 1 to {_LONGEST_TASK} printable "
            "characters"
        )
    return record


def check_text(name: str, value: Any) -> None:
    """Raises ValueError unless a field is text that tokenizers, JSON and files can hold."""
    if not isinstance(value, str):
        raise ValueError(f"{name!r} is a {type(value).__name__}, not a string")
    if "\0" in value:
        raise ValueError(f"{name!r} holds a NUL character (at {value.index(chr(0))})")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name!r} holds half a surrogate pair (at {error.start}), which is no character") from error


def field_names(record: dict[str, Any]) -> str:
    """The first names of a record's fields, for messages."""
    names = [reprlib.repr(name) for name in list(record)[:_SHOWN_FIELDS]]
    return ", ".join([*names, *(["..."] if len(record) > _SHOWN_FIELDS else [])]) or "none"
