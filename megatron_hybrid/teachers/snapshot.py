"""A copy of the student as teacher: as it was at the start, as it was some steps ago, or averaged over its steps.

    after each optimizer step    fixed                     nothing
                                 every N steps             w' = w
                                 averaged, decay d         w' = d w' + (1 - d) w     Tarvainen & Valpola 2017,
                                                                                     arXiv 1703.01780

Averages are kept in fp32 beside the copy where the model is not fp32 (4 bytes per weight): 1 - d is 1e-3 and less, a
step's difference times that is below the last bit of bf16, and an average kept in bf16 would stand still.

The copy belongs to the run's state: `save` and `load` keep it, averages included, as a torch_dist checkpoint that loads
at any layout and can be a teacher of its own. What counts is the model's weights after the step, not the optimizer's.
No collectives but where gathers of parameters overlap, and in `save` and `load`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megatron_hybrid.mcore.second_model import build_copy, load_weights, named_tensors, save_weights, settle_weights
from megatron_hybrid.parallel import ParallelContext
from megatron_hybrid.records import HiddenPayload, HybridMicrobatch
from megatron_hybrid.teachers.frozen import FrozenTeacher


class SnapshotTeacher:
    """A teacher that is a copy of the student.

    Args:
        student: the job's own chunks on this rank; read whenever the copy changes.
        parallel: the axes of the job.
        decay: what the average keeps of itself at each step, in [0, 1); None: no average.
        refresh_interval: steps after which the copy is taken anew; None: never. Not together with `decay`.

    Raises:
        ConfigError: the student is not what Megatron builds from the job's arguments.
    """

    def __init__(
        self,
        student: Sequence[torch.nn.Module],
        parallel: ParallelContext,
        *,
        decay: float | None = None,
        refresh_interval: int | None = None,
    ) -> None:
        assert decay is None or refresh_interval is None, "the settings exclude each other"
        self.student = student
        self.model = build_copy(student)
        self._frozen = FrozenTeacher(self.model, parallel)
        self.decay = decay
        self.refresh_interval = refresh_interval
        self._averages: dict[str, Tensor] = {}
        """In fp32, of the copy's tensors that are stored in less."""
        if decay is not None:
            for name, tensor in named_tensors(self.model):
                if tensor.is_floating_point() and tensor.dtype.itemsize < 4:
                    self._averages[name] = tensor.float()

    def annotate(self, batches: Sequence[HybridMicrobatch]) -> list[HiddenPayload | None]:
        """See `Teacher`."""
        return self._frozen.annotate(batches)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """To be called after every optimizer step, on all ranks; `step` steps are done."""
        refresh = self.refresh_interval is not None and step % self.refresh_interval == 0
        if self.decay is None and not refresh:
            return
        settle_weights(self.student)
        for (name, ours), (_, theirs) in zip(named_tensors(self.model), named_tensors(self.student), strict=True):
            if self.decay is None or not ours.is_floating_point():
                ours.copy_(theirs)
                continue
            average = self._averages.get(name, ours)
            average.lerp_(theirs.to(average.dtype), 1 - self.decay)
            if average is not ours:
                ours.copy_(average)

    def save(self, folder: str | Path) -> None:
        """Writes the copy into `folder`, on a file system that all ranks share; called on all ranks."""
        with self._averages_in_place():
            save_weights(self.model, folder)

    def load(self, folder: str | Path) -> None:
        """Puts a saved copy in this one's place, whatever layout saved it; called on all ranks."""
        with self._averages_in_place():
            load_weights(self.model, folder)

    @contextmanager
    def _averages_in_place(self) -> Iterator[None]:
        """The copy's tensors are their fp32 averages; on exit they are what these round to."""
        stored = {name: tensor.data for name, tensor in named_tensors(self.model)}
        for name, tensor in named_tensors(self.model):
            tensor.data = self._averages.get(name, tensor.data)
        try:
            yield
        finally:
            for name, tensor in named_tensors(self.model):
                if name in self._averages:
                    tensor.data = stored[name].copy_(tensor.data)
