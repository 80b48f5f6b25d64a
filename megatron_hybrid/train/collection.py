"""Rollouts that later steps still learn from, kept beside a checkpoint that falls in the middle of their collection.

    CHECKPOINTS/hybrid_collection/iter_<steps>/rank_<rank>.pt        sha256, then tensors and plain values

A run that is told to stop saves after whichever step it is in. Weights that sampled the collection are gone then, so it
cannot be drawn again. It fits the layout and the batches that sampled it only. Each rank writes and reads its own part,
and all parts are used or none. Collectives, over all ranks: a barrier where it is saved, a sum where it is loaded.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.parallel import ParallelContext
from megatron_hybrid.records import Prompt, RolloutBatch
from megatron_hybrid.train.credit import Scored

logger = logging.getLogger(__name__)

_DIGEST_BYTES = hashlib.sha256().digest_size


def fingerprint(config: HybridConfig, parallel: ParallelContext, global_batch_size: int) -> dict[str, Any]:
    """What a collection was cut by, and where on each axis this rank is: a run of another cannot use it."""
    axes = (parallel.tp, parallel.pp, parallel.dp, parallel.cp)
    names = ("mini_batches", "ppo_epochs", "group_size")
    cut = {name: getattr(config, name) for name in names} | {"global_batch_size": global_batch_size}
    return cut | {"layout": [(axis.size, axis.rank) for axis in axes]}


def save_collection(folder: Path, scored: Scored, made_by: dict[str, Any]) -> None:
    """Keeps this rank's part in `folder`, in place of whatever an earlier run has left there."""
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    dist.barrier()
    # Questions are scored: the sources' own records, of any type, are needed no more.
    prompts = [vars(prompt) | {"entry": {}} for prompt in scored.rollouts.prompts]
    parts = vars(scored) | {"rollouts": vars(scored.rollouts) | {"prompts": prompts}}
    kept = io.BytesIO()
    torch.save({"made_by": made_by, "scored": parts}, kept)
    _file(folder).write_bytes(hashlib.sha256(kept.getbuffer()).digest() + kept.getbuffer())


def load_collection(folder: Path, made_by: dict[str, Any]) -> Scored | None:
    """This rank's part; None on every rank where one of them has none, or one that a run of other settings made."""
    device = torch.device(torch.cuda.current_device())
    part = _read(_file(folder), made_by, device)
    missing = torch.tensor(int(part is None), device=device)
    dist.all_reduce(missing)
    return None if missing.item() else part


def _read(file: Path, made_by: dict[str, Any], device: torch.device) -> Scored | None:
    if not file.exists():
        return None
    data = file.read_bytes()
    known, kept_bytes = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if hashlib.sha256(kept_bytes).digest() != known:
        logger.warning("%s is cut off or altered, by its sha256, and is not used", file)
        return None
    try:
        kept = torch.load(io.BytesIO(kept_bytes), map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        logger.warning("%s cannot be read and is not used: %s", file, error)
        return None
    if kept["made_by"] != made_by:
        logger.warning("%s is not used: a run with %s made it, this one has %s", file, kept["made_by"], made_by)
        return None
    rollouts = kept["scored"]["rollouts"]
    prompts = tuple(Prompt(**prompt) for prompt in rollouts["prompts"])
    return Scored(**kept["scored"] | {"rollouts": RolloutBatch(**rollouts | {"prompts": prompts})})


def _file(folder: Path) -> Path:
    return folder / f"rank_{dist.get_rank()}.pt"
