"""Questions from a file of records {"prompt": str, "answer": str, "task": str (optional)}: .jsonl lines, .parquet rows.

Further fields are kept and reach the reward in `entry["record"]`. The whole file is read and checked at once, so that a
bad line 90 000 is a message in the first second and not a crash in the second hour.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_hybrid.errors import DataError
from megatron_hybrid.prompts.jsonl import jsonl_records
from megatron_hybrid.prompts.parquet import parquet_records
from megatron_hybrid.prompts.question import Question, Refuse

_SHOWN_PROBLEMS = 5  # enough to see the pattern of what is wrong without burying it
_FORMS = {".jsonl": ("line", jsonl_records), ".parquet": ("row", parquet_records)}
FILE_ENDINGS = tuple(_FORMS)

_log = logging.getLogger(__name__)


class FileSource:
    """The questions of a file, in the file's order (the stream shuffles)."""

    def __init__(self, questions: Sequence[Question], name: str) -> None:
        self._questions = tuple(questions)
        self.size: int = len(self._questions)
        self.tasks = frozenset(question.task for question in self._questions)
        self._name = name

    @classmethod
    def read(cls, path: str | Path) -> "FileSource":
        """The file's ending, one of `FILE_ENDINGS`, says what it is.

        Raises:
            DataError: it cannot be read, holds a record that is no question, or none at all.
        """
        path = Path(path)

        def question(record: Any, place: dict[str, int]) -> Question:
            return _question(record, {"source": path.suffix[1:], **place, "record": record}, path.stem)

        expected = '{"prompt": "...", "answer": "..."}'
        return cls(parsed_records(path, question, what="questions", expected=expected), str(path))

    def item(self, index: int) -> Question:
        return self._questions[index]

    def probe(self, count: int) -> Iterator[Question]:
        return iter(self._questions)

    def without(self, texts: Collection[str]) -> "FileSource":
        kept = [question for question in self._questions if question.text not in texts]
        if not kept:
            raise DataError(
                f"every question of {self._name} is also held out, so nothing is left to train on: use different "
                "files for training and evaluation."
            )
        if dropped := self.size - len(kept):
            _log.warning("%s: %d questions are also held out and are not trained on", self._name, dropped)
        return FileSource(kept, self._name)

    def fitting(self, refuse: Refuse) -> "FileSource":
        reasons = [refuse(question) for question in self._questions]
        kept = [question for question, why in zip(self._questions, reasons, strict=True) if why is None]
        found = Counter(why for why in reasons if why is not None)
        said = "; ".join(f"{number} {why}" for why, number in found.items())
        if not kept:
            raise DataError(f"no question of {self._name} can be used: {said}. Allow longer prompts, or use others.")
        if found:
            _log.warning("%s: %d of %d questions are left out: %s", self._name, sum(found.values()), self.size, said)
        return FileSource(kept, self._name)


def parsed_records[T](path: Path, parse: Callable[[Any, dict[str, int]], T], *, what: str, expected: str) -> list[T]:
    """Every record of a file, the problems of all of them told at once.

    parse           from a record and {"line" or "row": its number}; a ValueError says what is wrong with it
    what, expected  for messages: what the file should hold, and the form of a record

    Raises:
        DataError: it cannot be read, holds a record that `parse` refuses, or none at all.
    """
    unit, records = _FORMS[path.suffix]
    found, problems = [], []
    for number, record in records(path):
        try:
            found.append(parse(record, {unit: number}))
        except ValueError as problem:
            problems.append(f"{unit} {number}: {problem}")
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        raise DataError(
            f"{path}: {len(problems)} of {len(problems) + len(found)} {unit}s cannot be used. Expected "
            f'{expected} in each {unit}, "task" if you like. '
            + "; ".join(problems[:_SHOWN_PROBLEMS])
            + (f"; and {more} more." if more > 0 else ".")
        )
    if not found:
        raise DataError(f"{path} holds no {what}: expected {expected} in each {unit}.")
    return found


def checked_record(record: Any, required: Sequence[str]) -> dict[str, Any]:
    """A record with a prompt, and these fields; a ValueError says what is wrong with it."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, not an object")
    for name in required:
        if name not in record:
            raise ValueError(f"no {name!r} field (it has {', '.join(map(repr, record)) or 'none'})")
    for name in ("prompt", "answer", "task"):
        if not isinstance(record.get(name, ""), str):
            raise ValueError(f"{name!r} is a {type(record[name]).__name__}, not a string")
    if not record["prompt"].strip():
        raise ValueError("'prompt' is empty")
    return record


def _question(record: Any, entry: dict[str, Any], default_task: str) -> Question:
    """One record as a question; a ValueError says what is wrong with it."""
    record = checked_record(record, ("prompt", "answer"))
    return Question(record["prompt"], record.get("task", default_task), record["answer"], entry)
