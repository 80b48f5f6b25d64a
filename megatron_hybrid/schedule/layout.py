"""Where each position of each sequence of a micro-batch lies on this rank: padded or packed, whole or sliced.

    sequences of token ids  ->  ModelInput: tokens [b, s/cp] and, for each response token, the row that predicts it

padded   one sequence per row of [b, s], padding on the right
packed   (Megatron's THD) all sequences behind one another in one row, described by PackedSeqParams

Context parallelism cuts a sequence into 2 cp equal chunks; rank r holds chunks r and 2 cp - 1 - r, so that a causal
mask gives every rank the same work (Megatron's zig-zag). Padded rows are cut as a whole, packed sequences each on its
own.
No collective: every rank works out its own part of what all of them know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hybrid.mcore.model import packed_sequences
from megatron_hybrid.parallel import ParallelContext
from megatron_hybrid.records import ModelInput


def schedule_shape(inputs: Sequence[ModelInput], cp_size: int) -> tuple[int, int]:
    """(micro_batch_size, seq_length) as Megatron's schedule wants them: on all context-parallel ranks together."""
    return inputs[0].tokens.shape[0], cp_size * max(model_input.tokens.shape[1] for model_input in inputs)


@dataclass(frozen=True)
class SequenceLayout:
    """How this job lays sequences out; the same on every rank but for `cp_rank`."""

    cp_rank: int = 0
    cp_size: int = 1
    row_multiple: int = 1
    """A rank's rows must divide by it: tensor-parallel ranks share them under sequence parallelism."""
    packed: bool = False
    same_width: bool = False
    """Every micro-batch as wide as the widest: pipeline stages rely on it."""
    least_width: int = 1
    """Positions that every micro-batch has at least: those of other micro-batches beside them."""

    @classmethod
    def of(cls, parallel: ParallelContext, *, sequence_parallel: bool = False, packed: bool = False) -> SequenceLayout:
        """The layout of a job."""
        return cls(
            cp_rank=parallel.cp.rank,
            cp_size=parallel.cp.size,
            row_multiple=parallel.tp.size if sequence_parallel else 1,
            packed=packed,
            same_width=parallel.pp.size > 1,
        )

    @property
    def chunks(self) -> int:
        """Equal chunks a sequence is cut into."""
        return 1 if self.cp_size == 1 else 2 * self.cp_size

    def padded_length(self, length: int) -> int:
        """Length of a padded row, or of a whole packed row, that holds `length` positions."""
        return -(-max(length, 1) // self._multiple) * self._multiple

    @property
    def _multiple(self) -> int:
        # Chunks must be equal, and each rank's part shares out over tensor-parallel ranks.
        return math.lcm(self.chunks, self.cp_size * self.row_multiple)

    def width(self, lengths: Sequence[int]) -> int:
        """Positions of a micro-batch's row whose sequences feed `lengths` positions, on all context-parallel ranks."""
        length = sum(self._packed_lengths(lengths)) if self.packed else max(lengths)
        return self.padded_length(max(length, self.least_width))

    def model_input(
        self, sequences: Sequence[Tensor], sequence: Tensor, position: Tensor, *, width: int
    ) -> tuple[ModelInput, Tensor]:
        """What this rank's model reads, and which of the asked positions are its own.

        sequences  b tensors of token ids [length]: what is fed, the last token of a row left out
        sequence   [n] int64: of each asked position, its sequence
        position   [n] int64: and where in it
        width      from `width`, or more
        returns    the input, with rows of the asked positions that lie here; [n] bool: those
        """
        device = position.device
        lengths = torch.tensor([len(tokens) for tokens in sequences])
        if self.packed:
            padded = torch.tensor(self._packed_lengths(lengths.tolist()))
            tail = width - int(padded.sum())
            if tail > 0:  # a sequence of its own, that nobody reads
                lengths, padded = (
                    torch.cat((lengths, lengths.new_zeros(1))),
                    torch.cat((padded, padded.new_tensor([tail]))),
                )
        else:
            padded = torch.full_like(lengths, width)
        starts = torch.cat((padded.new_zeros(1), padded.cumsum(0)))
        place = _Places(self, padded.to(device), starts.to(device))

        every = torch.repeat_interleave(torch.arange(len(padded)), padded).to(device)
        within = torch.arange(int(starts[-1]), device=device) - place.starts[every]
        fed = within < lengths.to(device)[every]
        tokens = torch.zeros_like(within)
        tokens[fed] = torch.cat(list(sequences)).to(device)
        here, row = place(every, within)
        # Position 0 in padding: it may be longer than any sequence, and the model's own positions may end.
        local = torch.stack((tokens[here], torch.where(fed, within, 0)[here]))
        local = torch.zeros_like(local).index_copy_(1, row[here], local)
        if self.packed:
            tokens, positions = local.unsqueeze(1).unbind(0)
            packing = packed_sequences(starts.to(device))
        else:  # [s, b] to Megatron's batch-first input
            tokens, positions = (x.view(-1, len(sequences)).T.contiguous() for x in local.unbind(0))
            packing = None
        mine, row = place(sequence, position)
        return ModelInput(tokens, positions, row[mine], packing), mine

    def _packed_lengths(self, lengths: Sequence[int]) -> list[int]:
        return [-(-max(length, 1) // self.chunks) * self.chunks for length in lengths]


@dataclass(frozen=True)
class _Places:
    layout: SequenceLayout
    padded: Tensor
    """[b]: padded length of each sequence."""
    starts: Tensor
    """[b + 1]: where each begins in a packed row."""

    def __call__(self, sequence: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Whether a position of a sequence lies on this rank [n], and its row in the flattened [s/cp, b]."""
        layout, cp = self.layout, self.layout.cp_size
        here, local = torch.ones_like(position, dtype=torch.bool), position
        if cp > 1:
            chunk_length = self.padded[sequence] // layout.chunks
            chunk = position // chunk_length
            second = chunk >= cp
            here = torch.where(second, layout.chunks - 1 - chunk, chunk) == layout.cp_rank
            local = position - (chunk - second.long()) * chunk_length
        if layout.packed:
            return here, self.starts[sequence] // cp + local
        return here, local * len(self.padded) + sequence
