"""Whole responses from the tokens of this rank, and back: [n] -> [b, s] -> [n].

The op sees n response tokens and knows neither rows nor positions; sums over a response need it whole. Under context
parallelism this rank's tokens are a part of each response, while rows and positions stay global.

Collectives: none at cp = 1; else one all-reduce of [k + 1, b, s] fp32 for k quantities, on every rank, tokens or not.
Each entry has one contributor, so every rank holds the bits that a single rank would have.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hybrid.parallel import Group, GroupView


@dataclass(frozen=True)
class Whole:
    """Whole responses of a micro-batch."""

    mask: Tensor
    """[b, s] bool: response tokens, of all context-parallel ranks."""
    values: Mapping[str, Tensor]
    """Name to [b, s] fp32; exactly 0 off the mask."""


@dataclass(frozen=True)
class TokenTable:
    """Where the tokens of this rank stand."""

    row: Tensor
    """[n] int64: the response each token belongs to."""
    position: Tensor
    """[n] int64: its position in the row, counted over all context-parallel ranks. No two tokens share a place."""
    num_rows: int
    """b."""
    num_positions: int
    """s: larger than every position, the same on every rank."""
    cp_group: Group = None

    def whole(self, values: Mapping[str, Tensor]) -> Whole:
        """Tables of per-token values [n] fp32; every rank must name the same ones, in the same order.

        Of no values at all the mask is this rank's own: nothing is sent that nobody sums.
        """
        stacked = torch.zeros((1 + len(values), self.num_rows, self.num_positions), device=self.row.device)
        ones = torch.ones_like(self.row, dtype=torch.float32)
        stacked[:, self.row, self.position] = torch.stack([ones, *(of.detach().float() for of in values.values())])
        if values and GroupView.of(self.cp_group).size > 1:
            dist.all_reduce(stacked, group=self.cp_group)
        return Whole(stacked[0] > 0, dict(zip(values, stacked[1:], strict=True)))

    def own(self, table: Tensor) -> Tensor:
        """[b, s] to this rank's tokens [n]."""
        return table[self.row, self.position]
