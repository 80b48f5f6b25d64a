"""The records of a file with one JSON object per line, a line at a time: what is wrong with one harms no other."""

import json
import reprlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_hybrid.errors import DataError

LONGEST_LINE_BYTES = 64 << 20
"""A million tokens are some 5 MB. What is longer has lost its line breaks, and would be held several times over."""


def jsonl_records(path: Path) -> Iterator[tuple[int, Any]]:
    """(number of the line, its JSON); a ValueError stands for a line that is none. Blank lines are left out.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(_lines(file), start=1):
                # Files from Windows editors open with a byte order mark, which json would refuse.
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 and line is not None else line
                if text is None or text.strip():
                    yield number, _parsed(text)
    except OSError as error:
        raise DataError(
            f"cannot read the prompt file {path}: {error.strerror or error}. Give a readable file, or "
            "'reasoning_gym:task,task' for generated questions."
        ) from error


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """Each line; None for one that is too long, of which no more than the bound is ever held."""
    while line := file.readline(LONGEST_LINE_BYTES + 1):
        if len(line) <= LONGEST_LINE_BYTES or line.endswith(b"\n"):
            yield line
            continue
        while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
            pass
        yield None


def _parsed(line: bytes | None) -> Any:
    """A line's JSON, or a ValueError that says why it is none."""
    if line is None:
        return ValueError(f"longer than {LONGEST_LINE_BYTES >> 20} MB")
    if b"\0" in line:
        return ValueError(f"not JSON (NUL at byte {line.index(0)}, as in a file that was not written to its end)")
    try:
        return json.loads(line.decode(), object_pairs_hook=_object, parse_constant=_no_json)
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 (byte {error.start}: {error.reason})")
    except json.JSONDecodeError as error:
        return ValueError(f"not JSON ({error.msg} at column {error.colno})")
    except _NoJson as error:
        return ValueError(f"{_field_that_is_not_finite(line)}holds {error}, which is no JSON")
    except _Twice as error:
        return error
    except RecursionError:
        return ValueError("nested too deeply to be read")
    except ValueError:
        return ValueError("holds a whole number of more digits than can be read")


class _NoJson(ValueError):
    """NaN or Infinity, which Python's parser takes."""


class _Twice(ValueError):
    """One name for two values, of which Python's parser drops the first."""


def _no_json(constant: str) -> Any:
    raise _NoJson(constant)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name, times = Counter(name for name, _ in pairs).most_common(1)[0]
        raise _Twice(f"{reprlib.repr(name)} stands {times} times in one object")
    return found


def _field_that_is_not_finite(line: bytes) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # something else is wrong behind it
        return ""
    for name, value in record.items() if isinstance(record, dict) else ():
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            return f"{reprlib.repr(name)} "
    return ""
