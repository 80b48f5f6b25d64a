"""Questions from a file of records {"prompt": str, "answer": str, "task": str (optional)}: .jsonl lines, .parquet rows.

Further fields are kept and reach the reward in `entry["record"]`. Where records have an `id`, no two have the same.
"""

import logging
import reprlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_hybrid.errors import DataError
from megatron_hybrid.prompts.question import LeftOut, Question, Refuse
from megatron_hybrid.prompts.record_file import checked_record, parsed_records

_log = logging.getLogger(__name__)


class FileSource:
    """The questions of a file, in the file's order (the stream shuffles)."""

    def __init__(self, questions: Sequence[Question], name: str, left_out: tuple[LeftOut, ...] = ()) -> None:
        self._questions = tuple(questions)
        self.size: int = len(self._questions)
        self.tasks = frozenset(question.task for question in self._questions)
        self.left_out = left_out
        self._name = name

    @classmethod
    def read(cls, path: str | Path, *, on_bad_record: str = "stop") -> "FileSource":
        """The file's ending, one of `record_file.FILE_ENDINGS`, says what it is.

        on_bad_record  see `parsed_records`

        Raises:
            DataError: it cannot be read, holds a record that is no question, or none at all.
        """
        path = Path(path)
        places: dict[tuple[type, Any], str] = {}

        def question(record: Any, place: dict[str, int]) -> Question:
            made = _question(record, {"source": path.suffix[1:], **place, "record": record}, path.stem)
            _refuse_known_id(record.get("id"), " ".join(f"{unit} {number}" for unit, number in place.items()), places)
            return made

        expected = '{"prompt": "...", "answer": "..."}'
        records = parsed_records(path, question, what="questions", expected=expected, on_bad_record=on_bad_record)
        return cls(records.found, str(path), () if records.left_out is None else (records.left_out,))

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
        return FileSource(kept, self._name, self.left_out)

    def fitting(self, refuse: Refuse) -> "FileSource":
        reasons = [refuse(question) for question in self._questions]
        kept = [question for question, why in zip(self._questions, reasons, strict=True) if why is None]
        found = Counter(why for why in reasons if why is not None)
        said = "; ".join(f"{number} {why}" for why, number in found.items())
        if not kept:
            raise DataError(f"no question of {self._name} can be used: {said}. Allow longer prompts, or use others.")
        if found:
            _log.warning("%s: %d of %d questions are left out: %s", self._name, sum(found.values()), self.size, said)
        return FileSource(kept, self._name, self.left_out)


def _question(record: Any, entry: dict[str, Any], default_task: str) -> Question:
    """One record as a question; a ValueError says what is wrong with it."""
    record = checked_record(record, ("prompt", "answer"))
    return Question(record["prompt"], record.get("task", default_task), record["answer"], entry)


def _refuse_known_id(found: Any, place: str, places: dict[tuple[type, Any], str]) -> None:
    """Raises ValueError where an earlier record has this id; `places` knows where each was."""
    if not isinstance(found, str | int):
        return
    first = places.setdefault((type(found), found), place)  # 1 and true are not one id
    if first != place:
        raise ValueError(f"'id' is {reprlib.repr(found)}, which {first} has already")
