"""One call of the op, checked once and flattened: what every backend and diagnostic reads.

Data in: logits [..., v/tp], targets [...], options.  Data out: a frozen `Call` over n counted rows, with this rank's
slice of the vocabulary as plain integers.  No collective; a device sync only where `ignore_index` has to find the rows
that count.
Not here: weights, passes, autograd.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hybrid.errors import ConfigError, ShapeError
from megatron_hybrid.parallel import Group, GroupView


@dataclass(frozen=True)
class Shard:
    """What one rank's columns mean."""

    first: int
    """Global id of column 0."""
    width: int
    """Columns below the true vocabulary's end; the others are never read. 0 on a rank that holds only padding."""
    student_scale: float
    """1 / temperature."""
    teacher_scale: float
    teacher_floor: float | None
    """Raw teacher logits below this are raised to it."""

    @property
    def floor(self) -> float:
        """The same as a number: without a floor, one that nothing lies below."""
        return -math.inf if self.teacher_floor is None else self.teacher_floor


@dataclass(frozen=True)
class Call:
    """Arguments of the op that do not depend on the logits' values."""

    target: Tensor
    """[n] int64, global ids of the counted rows."""
    rows: Tensor | None
    """[n] int64: the counted rows of the flattened logits; None where all of them count."""
    shape: torch.Size
    """Shape of the caller's target."""
    shard: Shard
    group: Group

    def counted(self, values: Tensor) -> Tensor:
        """[...] values in the target's shape to the n counted rows."""
        flat = values.reshape(-1)
        return flat if self.rows is None else flat.index_select(0, self.rows)

    def restored(self, values: Tensor) -> Tensor:
        """[n] back to the target's shape; 0 in the rows that do not count."""
        if self.rows is None:
            return values.view(self.shape)
        full = values.new_zeros(self.shape.numel())
        return full.index_copy_(0, self.rows, values).view(self.shape)

    def positions(self, num_rows: int) -> Tensor | None:
        """[num_rows] int32: which of the counted rows each row of the logits is, -1 for none; None where all count."""
        if self.rows is None:
            return None
        positions = torch.full((num_rows,), -1, dtype=torch.int32, device=self.rows.device)
        counted = torch.arange(len(self.rows), dtype=torch.int32, device=self.rows.device)
        return positions.index_copy_(0, self.rows, counted)

    def owned(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Column of each target of rows [start:stop] on this rank (clamped), and whether it lies here; [r] each."""
        local = self.target[start:stop] - self.shard.first
        return local.clamp(0, max(self.shard.width - 1, 0)), (local >= 0) & (local < self.shard.width)


def rows_of(logits: Tensor) -> Tensor:
    """[..., v/tp] to [rows, v/tp]: a view wherever the strides allow one, as Megatron's do."""
    return logits.reshape(-1, logits.shape[-1])


def read_call(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    target: Tensor,
    *,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    vocab_size: int | None = None,
    group: Group = None,
    ignore_index: int | None = -100,
    teacher_logit_floor: float | None = None,
) -> Call:
    """Checks the arguments (see `vocab_parallel_hybrid_loss`) and reads them into a `Call`."""
    _check_tensors(student_logits, teacher_logits, target)
    for name, value in (("student_temperature", student_temperature), ("teacher_temperature", teacher_temperature)):
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name} must be a finite number > 0, got {value}: logits are divided by it.")
    if teacher_logit_floor is not None and not math.isfinite(teacher_logit_floor):
        raise ConfigError(
            f"teacher_logit_floor must be finite, got {teacher_logit_floor}: it is there to keep the KL finite. "
            "Leave it None for no floor."
        )
    columns, ranks = student_logits.shape[-1], GroupView.of(group)
    v = columns * ranks.size if vocab_size is None else vocab_size
    if not 0 < v <= columns * ranks.size:
        raise ShapeError(
            f"vocab_size is {vocab_size}, but {ranks.size} rank(s) with {columns} columns each hold "
            f"{columns * ranks.size}: the true vocabulary must lie within the padded one. Pass the tokenizer's size."
        )
    first = ranks.rank * columns
    shard = Shard(
        first=first,
        width=min(max(v - first, 0), columns),
        student_scale=1 / student_temperature,
        teacher_scale=1 / teacher_temperature,
        teacher_floor=teacher_logit_floor,
    )
    flat, rows = target.reshape(-1).long().contiguous(), None  # backends read it by its address
    if ignore_index is not None:
        kept = (flat != ignore_index).nonzero().squeeze(1)
        if len(kept) < len(flat):
            rows, flat = kept, flat.index_select(0, kept)
    # Asserted where the data is: a Python check would make the host wait for the device.
    torch._assert_async(
        ((flat >= 0) & (flat < v)).all(),
        f"a target lies outside the vocabulary [0, {v}) and is not ignore_index ({ignore_index}): its log-probability "
        "does not exist. Check the label shift and the tokenizer, or mark rows to skip with ignore_index.",
    )
    return Call(flat, rows, target.shape, shard, group)


def _check_tensors(student: Tensor, teacher: Tensor | None, target: Tensor) -> None:
    if student.dim() < 1 or not student.is_floating_point() or student.shape[-1] == 0:
        raise ShapeError(
            f"student logits must be floating point [..., v/tp], got {student.dtype} {list(student.shape)}."
        )
    if target.shape != student.shape[:-1] or target.is_floating_point() or target.dtype == torch.bool:
        raise ShapeError(
            f"target must hold integer token ids in the shape of the logits without their last dimension, "
            f"{list(student.shape[:-1])}; got {target.dtype} {list(target.shape)}."
        )
    if teacher is not None and (teacher.shape != student.shape or not teacher.is_floating_point()):
        raise ShapeError(
            f"teacher logits are {teacher.dtype} {list(teacher.shape)}, the student's are {list(student.shape)}: the "
            "KL compares them column by column, so both heads must be padded alike (to one padded vocabulary)."
        )
    for name, tensor in (("teacher logits", teacher), ("target", target)):
        if tensor is not None and tensor.device != student.device:
            raise ShapeError(
                f"{name} are on {tensor.device}, the student logits on {student.device}: move them there, the op "
                "copies nothing between devices."
            )
