"""The records of a file with one JSON object per line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_hybrid.errors import DataError


def jsonl_records(path: Path) -> Iterator[tuple[int, Any]]:
    """(number of the line, its JSON); a ValueError stands for a line that is none. Blank lines are left out.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    try:
        # utf-8-sig: files from Windows editors open with a byte order mark, which json would refuse.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(
            f"cannot read the prompt file {path}: {error.strerror or error}. Give a readable file, or "
            "'reasoning_gym:task,task' for generated questions."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start}: {error.reason}): save it as UTF-8 JSON lines."
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            yield number, ValueError(f"not JSON ({error.msg} at column {error.colno})")
