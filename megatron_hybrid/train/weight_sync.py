"""The student's weights to the rollout server: through a Hugging Face folder on a disk that both read.

    student ──► torch_dist, all ranks ──► rank 0: Hugging Face folder ──► the server's reload call ──► old folder gone

What it costs, while everybody waits: the weights written twice and read twice (by rank 0 and by the server), at the
speed of that disk; rank 0 holds them whole in host memory, twice; and what the server needs to take them, without
running requests, after which it has forgotten its prompt cache. With a new copy every N steps the responses between are
up to N - 1 steps old, which `training/policy_age` says and `rollout_correction` corrects.
Not here: transfer from GPU to GPU (NCCL, CUDA IPC); models other than Llama-shaped ones (`checkpoint/convert.py`).
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_hybrid.collectives import from_first
from megatron_hybrid.parallel import GroupView
from megatron_hybrid.servers.engine import Engine

_OURS = re.compile(r"(megatron|step)_\d{7}")


def weights_folder(run_dir: str | Path, sync_dir: str | Path | None) -> Path:
    """Where a run puts weights, on a file system that all ranks and the server share: beside its report, or below a
    folder that runs may share. Another run's weights are never in it; its own, of a start that was cut off, are."""
    own = Path(run_dir).resolve()
    if sync_dir is None:
        return own / "rollout_weights"
    mark = hashlib.sha256(str(own).encode()).hexdigest()[:8]  # runs may have one name in different folders
    return Path(sync_dir).resolve() / "rollout_weights" / f"{own.name}-{mark}"


class WeightSync:
    """Knows which weights the server has; collective over all ranks.

    Args:
        engine: the rollout server.
        interval: steps after which it gets new ones.
        folder: this run's own, see `weights_folder`; made, and emptied of older weights.
        tokenizer: Hugging Face folder of the tokenizer, which goes with the weights.
    """

    def __init__(self, engine: Engine, *, interval: int, folder: str | Path, tokenizer: str) -> None:
        self.engine = engine
        self.interval = interval
        self.folder = Path(folder).resolve()
        self.tokenizer = tokenizer
        self._version: int | None = None
        """Steps that the server's weights have seen; None: it was not told yet."""

    def version_for(self, model: list[torch.nn.Module], step: int, *, exact: bool = False) -> int:
        """The version that the server has when this returns, at most `interval` - 1 steps old.

        exact  it is to be the student as it is, as an evaluation means it

        Raises:
            ServerError, DataError: on every rank.
        """
        age = None if self._version is None else step - self._version
        if age is None or age >= (1 if exact else self.interval):
            self._send(model, step)
            self._version = step
        assert self._version is not None
        return self._version

    def _send(self, model: list[torch.nn.Module], step: int) -> None:
        from megatron_hybrid.mcore.second_model import save_weights, settle_weights

        written, folder = (self.folder / f"{kind}_{step:07d}" for kind in ("megatron", "step"))
        settle_weights(model)
        self._on_rank_0(lambda: self._clear(written, folder))
        save_weights(model, written)
        self._on_rank_0(lambda: self._hand_over(written, folder))

    def _hand_over(self, written: Path, folder: Path) -> None:
        from megatron_hybrid.checkpoint.folders import megatron_folder_to_hf

        megatron_folder_to_hf(written, folder, tokenizer=self.tokenizer)
        self.engine.load_weights(str(folder))
        for old in self.folder.iterdir():
            if old != folder and _OURS.fullmatch(old.name):
                shutil.rmtree(old, ignore_errors=True)

    @staticmethod
    def _clear(*folders: Path) -> None:
        """A run that was cut off may have left parts of them."""
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    @staticmethod
    def _on_rank_0(do: Callable[[], None]) -> None:
        from_first(do, (GroupView.of(dist.group.WORLD),))
