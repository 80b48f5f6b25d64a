"""Questions from a file with one JSON object per line: {"prompt": str, "answer": str, "task": str (optional)}.

Further fields are kept and reach the reward in `entry["record"]`. The whole file is read and checked at once, so that a
bad line 90 000 is a message in the first second and not a crash in the second hour.
"""

import json
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from megatron_hybrid.errors import DataError
from megatron_hybrid.prompts.question import Question

_SHOWN_PROBLEMS = 5  # enough to see the pattern of what is wrong without burying it

_log = logging.getLogger(__name__)


class JsonlSource:
    """The questions of a file, in the file's order (the stream shuffles)."""

    def __init__(self, questions: Sequence[Question], name: str) -> None:
        self._questions = tuple(questions)
        self.size: int = len(self._questions)
        self._name = name

    @classmethod
    def read(cls, path: str | Path) -> "JsonlSource":
        path = Path(path)
        try:
            # utf-8-sig: files from Windows editors open with a byte order mark, which json would refuse.
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except OSError as error:
            raise DataError(
                f"cannot read the prompt file {path}: {error.strerror or error}. Give a readable .jsonl file, or "
                "'reasoning_gym:task,task' for generated questions."
            ) from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not UTF-8 (byte {error.start}: {error.reason}): save it as UTF-8 JSON lines."
            ) from error
        questions, problems = [], []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                questions.append(_question(line, number, path.stem))
            except ValueError as problem:
                problems.append(f"line {number}: {problem}")
        if problems:
            more = len(problems) - _SHOWN_PROBLEMS
            raise DataError(
                f"{path}: {len(problems)} of {len(problems) + len(questions)} lines cannot be used. Expected "
                '{"prompt": "...", "answer": "..."} in each line, "task" if you like. '
                + "; ".join(problems[:_SHOWN_PROBLEMS])
                + (f"; and {more} more." if more > 0 else ".")
            )
        if not questions:
            raise DataError(f'{path} holds no questions: expected {{"prompt": "...", "answer": "..."}} in each line.')
        return cls(questions, str(path))

    def item(self, index: int) -> Question:
        return self._questions[index]

    def without(self, texts: Collection[str]) -> "JsonlSource":
        kept = [question for question in self._questions if question.text not in texts]
        if not kept:
            raise DataError(
                f"every question of {self._name} is also held out, so nothing is left to train on: use different "
                "files for training and evaluation."
            )
        if dropped := self.size - len(kept):
            _log.warning("%s: %d questions are also held out and are not trained on", self._name, dropped)
        return JsonlSource(kept, self._name)


def _question(line: str, number: int, default_task: str) -> Question:
    """One line as a question; a ValueError says what is wrong with it."""
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, not an object")
    for name in ("prompt", "answer"):
        if name not in record:
            raise ValueError(f"no {name!r} field (it has {', '.join(map(repr, record)) or 'none'})")
    for name in ("prompt", "answer", "task"):
        if not isinstance(record.get(name, ""), str):
            raise ValueError(f"{name!r} is a {type(record[name]).__name__}, not a string")
    if not record["prompt"].strip():
        raise ValueError("'prompt' is empty")
    entry = {"source": "jsonl", "line": number, "record": record}
    return Question(record["prompt"], record.get("task", default_task), record["answer"], entry)
