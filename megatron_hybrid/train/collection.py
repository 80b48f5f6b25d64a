"""Rollouts that later steps still learn from, kept beside a checkpoint that falls in the middle of their collection.

    CHECKPOINTS/hybrid_collection/iter_<steps>/rank_<rank>.pt        each rank writes and reads its own; no collectives

A run that is told to stop saves after whichever step it is in. Weights that sampled the collection are gone then, so it
cannot be drawn again. It fits the layout that sampled it only.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_hybrid.parallel import ParallelContext
from megatron_hybrid.train.credit import Scored


def save_collection(folder: Path, scored: Scored, parallel: ParallelContext) -> None:
    """Keeps this rank's part in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"layout": _layout(parallel), "scored": scored}, _file(folder))


def load_collection(folder: Path, parallel: ParallelContext) -> Scored | None:
    """This rank's part; None where none was kept, or by another layout."""
    if not _file(folder).exists():
        return None
    device = torch.device(torch.cuda.current_device())
    kept = torch.load(_file(folder), map_location=device, weights_only=False)  # our own records, prompts among them
    return kept["scored"] if kept["layout"] == _layout(parallel) else None


def _file(folder: Path) -> Path:
    rank = torch.distributed.get_rank()
    return folder / f"rank_{rank}.pt"


def _layout(parallel: ParallelContext) -> list[tuple[int, int]]:
    """Size of each axis, and where on it this rank is."""
    return [(axis.size, axis.rank) for axis in (parallel.tp, parallel.pp, parallel.dp, parallel.cp)]
