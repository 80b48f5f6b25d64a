"""What the setting `teacher_load` asks for: text to a small record, before anything is loaded. No torch.

    PATH                          one teacher
    TASK=PATH,TASK=PATH,*=PATH    one for each task, '*' for all others
    WEIGHT*PATH,WEIGHT*PATH       a mixture of their distributions

A PATH is a Megatron checkpoint, or `self`: a copy of the student (a folder of that name is ./self). What stands before
the first '=' is a task unless it holds a '/', so a folder named like lr=3 is ./lr=3; a comma always separates.
Not here: whether the checkpoints exist and fit the student.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.weighted import weighted

SELF = "self"
"""The source that is a copy of the student."""
OTHERS = "*"
"""The task that stands for all tasks without a teacher of their own."""

_FORMS = "PATH, TASK=PATH,TASK=PATH,*=PATH or WEIGHT*PATH,WEIGHT*PATH"


@dataclass(frozen=True)
class TeacherSpec:
    """Which teachers, and what each is for."""

    sources: tuple[str, ...]
    """Checkpoints to load, or `SELF`; each once."""
    source_of_task: Mapping[str, str] = field(default_factory=dict)
    """One teacher per task: task, or `OTHERS`, to source. Empty otherwise."""
    weights: tuple[float, ...] = ()
    """Mixture: the share of each source, in order, adding up to 1. Empty otherwise."""

    def check_tasks(self, tasks: Collection[str]) -> None:
        """Raises ConfigError where the tasks of the prompts and those with a teacher are not the same."""
        if not self.source_of_task:
            return
        missing = sorted(set(tasks) - self.source_of_task.keys())
        if missing and OTHERS not in self.source_of_task:
            raise ConfigError(
                f"teacher_load names a teacher for each of {', '.join(self.source_of_task)}, but the prompts also have "
                f"the task {', '.join(missing)}: nobody would answer for its tokens. Add TASK=PATH for it, or *=PATH "
                "for all others."
            )
        unknown = sorted(self.source_of_task.keys() - set(tasks) - {OTHERS})
        if unknown:
            raise ConfigError(
                f"teacher_load names a teacher for the task {', '.join(unknown)}, but the prompts have only "
                f"{', '.join(sorted(tasks))}: a misspelt task would be answered by another teacher, or none. Correct "
                "the name, or leave it out."
            )


def parse_teachers(text: str) -> TeacherSpec:
    """`teacher_load` as a record.

    Raises:
        ConfigError: mixed forms, an empty path, a task or source twice, a weight that is not above 0.
    """
    parts = [part.strip() for part in text.split(",")]
    mixture, of_tasks = _split_all(parts, weighted), _split_all(parts, _task)
    paths = [path for _, path in mixture or of_tasks or [("", parts[0])]]
    if mixture is None and of_tasks is None and len(parts) > 1:
        raise ConfigError(
            f"teacher_load {text!r} has {len(parts)} parts that are not all of one form: several teachers are either "
            f"one for each task or a mixture. Expected {_FORMS}."
        )
    if not all(paths):
        raise ConfigError(f"teacher_load {text!r} has an empty path: nothing could be loaded. Expected {_FORMS}.")
    if mixture is not None:
        return _mixture(text, mixture)
    if of_tasks is not None:
        _refuse_twice(text, "task", [task for task, _ in of_tasks])
        return TeacherSpec(tuple(dict.fromkeys(path for _, path in of_tasks)), source_of_task=dict(of_tasks))
    return TeacherSpec((parts[0],))


def _mixture(text: str, mixture: list[tuple[float, str]]) -> TeacherSpec:
    weights = [weight for weight, _ in mixture]
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(
                f"teacher_load {text!r} has the weight {weight}: a share of a mixture must be a finite number > 0. "
                "Leave out a teacher that should have none."
            )
    sources = [path for _, path in mixture]
    _refuse_twice(text, "checkpoint", sources)
    return TeacherSpec(tuple(sources), weights=tuple(weight / sum(weights) for weight in weights))


def _split_all[T](parts: list[str], split: Callable[[str], tuple[T, str] | None]) -> list[tuple[T, str]] | None:
    """Every part as a pair, or None where not all of them are one."""
    pairs = [pair for part in parts if (pair := split(part)) is not None]
    return pairs if len(pairs) == len(parts) else None


def _task(part: str) -> tuple[str, str] | None:
    """TASK=PATH as (task, path)."""
    task, equals, path = part.partition("=")
    return (task.strip(), path.strip()) if equals and task.strip() and "/" not in task else None


def _refuse_twice(text: str, what: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"teacher_load {text!r} names the {what} {', '.join(twice)} more than once: which one counts would be a "
            "guess. Name it once."
        )
