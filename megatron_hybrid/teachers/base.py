"""What a teacher is: it reads micro-batches and leaves a payload for each, on the last pipeline stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_hybrid.records import HybridMicrobatch, TeacherPayload


class Teacher(Protocol):
    """Asked once per schedule call, before the student runs."""

    def annotate(self, batches: Sequence[HybridMicrobatch]) -> Sequence[TeacherPayload | None]:
        """A payload per micro-batch, in order, on the last stage; None on every other stage.

        Called on every rank of the job at the same time: a teacher may use collectives and the pipeline.
        """
        ...
