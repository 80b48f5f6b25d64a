"""Append-only files of a run, one JSON object a line, that survive a crash and a resume.

A record holds an integer `step`. The last line of a file may be unfinished (the run died while writing it): it is
ignored by `read` and removed by `rewind`. A broken line anywhere else is an error.

Numbers that JSON does not know are the strings "NaN", "Infinity" and "-Infinity": every parser accepts the file, a
diverged run still shows how it diverged (null would look like a missing value), and float() turns them back.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_hybrid.errors import DataError

Record = dict[str, Any]


def plain(value: Any) -> Any:
    """A value as JSON knows it: containers walked, tensors and numpy scalars unwrapped, the unknown as its str()."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def write_json(path: Path, value: Any) -> None:
    """One indented JSON file, replaced as a whole."""
    write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def line(record: Record) -> bytes:
    """A record as its file holds it."""
    return _encoded(json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n")


def append(path: Path, *records: Record) -> None:
    """Adds lines and waits until the disk has them: a few ms a step, and a crash costs at most the lines in flight."""
    append_lines(path, map(line, records))


def append_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Adds what `line` made: all or, where it raises OSError, none. What a full disk took of them is cut off again."""
    end = _end_of_whole_lines(path)
    try:
        with open(path, "ab") as file:
            file.truncate(end)
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):  # where even this fails, the next call does it
            os.truncate(path, end)
        raise


def read(path: Path) -> list[Record]:
    """The records of a file in order; none where there is no file."""
    return [record for record, _ in _parsed(path)]


def rewind(path: Path, step: int) -> int:
    """Takes out the records after `step`, which a resumed run will produce again, and returns how many there were.

    They move to `<stem>.dropped.jsonl`: a run started in a used folder by mistake loses nothing.
    """
    if not path.exists():
        return 0
    parsed = _parsed(path)
    late = [line for record, line in parsed if record["step"] > step]
    if late:
        with open(path.with_name(f"{path.stem}.dropped{path.suffix}"), "a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in late)
    kept = "".join(line + "\n" for record, line in parsed if record["step"] <= step)
    if kept.encode() != path.read_bytes():
        write_text(path, kept)
    return len(late)


def _parsed(path: Path) -> list[tuple[Record, str]]:
    if not path.exists():
        return []
    # Split at \n alone: str.splitlines would also cut at the Unicode line ends a model may write.
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["step"] + 0
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise DataError(
                f"line {number} of {path} is no JSON object with a number under 'step' ({error}): only the last line "
                "of a journal may be unfinished. Repair or delete that line, or use another run folder."
            ) from error
        parsed.append((record, line))
    return parsed


def _end_of_whole_lines(path: Path) -> int:
    """Bytes of a file up to its last line break: what stands behind it was never finished."""
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 4096)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def _encoded(text: str) -> bytes:
    # Half a surrogate pair, which some tokenizers decode to, becomes \udXXX: within JSON that is its valid escape.
    return text.encode("utf-8", errors="backslashreplace")


def write_text(path: Path, text: str) -> None:
    """Replaces a file by renaming a finished neighbour: a reader, or a crash, meets the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(_encoded(text))
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):  # a part of a page must not fill what is left of a disk
            temporary.unlink(missing_ok=True)
        raise
