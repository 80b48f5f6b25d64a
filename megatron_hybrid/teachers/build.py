"""The teacher that `teacher_load` asks for, put together from the models it names."""

from __future__ import annotations

from collections.abc import Callable

from megatron_hybrid.parallel import GroupView
from megatron_hybrid.teachers.base import Teacher
from megatron_hybrid.teachers.mixture import MixtureTeacher
from megatron_hybrid.teachers.spec import TeacherSpec
from megatron_hybrid.teachers.tasks import TaskTeachers


def build_teacher(
    spec: TeacherSpec, load: Callable[[str], Teacher], *, vocab_size: int, temperature: float, tp: GroupView
) -> Teacher:
    """One teacher for the whole run.

    spec         see `parse_teachers`
    load         from a source (a checkpoint, or `spec.SELF`) to its teacher; called once for each, in one order on all
                 ranks
    vocab_size   true vocabulary
    temperature  the teachers' own, as the op is told it
    tp           the ranks that share the vocabulary
    """
    teachers = {source: load(source) for source in spec.sources}
    if spec.weights:
        return MixtureTeacher(
            list(teachers.values()), spec.weights, vocab_size=vocab_size, temperature=temperature, tp=tp
        )
    if spec.source_of_task:
        return TaskTeachers({task: teachers[source] for task, source in spec.source_of_task.items()})
    (teacher,) = teachers.values()
    return teacher
