"""Other libraries' losses behind one call, for the benchmark. None of them is required: see `bench_peers.sh`.

A peer that is not installed, or cannot be imported, is a row with the reason. From PyPI they do other jobs than ours:
the KL alone, or no teacher at all; the row says which, and it is judged against the reference of that job.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bench_measure import KL, POLICY, Job
from torch import Tensor

Forward = Callable[[Any], Tensor]
"""`bench_contenders.Logits` to the loss, summed over the tokens."""

_folder: Path | None = None


def use(folder: Path) -> None:
    """Peers are looked for in the folders below this one, after everything that the environment has."""
    global _folder
    _folder = folder
    sys.path += [str(path) for path in sorted(folder.iterdir()) if path.is_dir() and str(path) not in sys.path]


@dataclass(frozen=True)
class Peer:
    """One library's loss, imported when it is asked for."""

    package: str
    """As it is installed from PyPI."""
    name: str
    job: Job
    load: Callable[[int], Forward]
    """Of the tensor-parallel size."""
    splits_vocabulary: bool = False
    """Over Megatron's tensor-parallel group, which has to be there."""

    def why_not(self, error: Exception) -> str:
        """One line for the row of a peer that could not be loaded."""
        failed = _folder / f"{self.package}.failed" if _folder else None
        if failed is not None and failed.exists():
            return f"{self.package} does not install: {failed.read_text().strip()}"
        return f"{self.package} not imported: {type(error).__name__}: {error}".splitlines()[0]


def want_groups() -> bool:
    """Whether a peer is here that asks for Megatron's groups, at any tensor-parallel size."""
    return any(importlib.util.find_spec(name) is not None for name in ("modelopt", "swift", "verl"))


def _file(module: str) -> Any:
    """A module without what the packages above it import in their `__init__`: ray, datasets, whole trainers."""
    if module in sys.modules:
        return sys.modules[module]
    *parents, _ = module.split(".")
    spec = importlib.util.find_spec(parents[0])
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {parents[0]!r}")
    root = Path(spec.submodule_search_locations[0]).parent
    for depth in range(1, len(parents) + 1):
        bare = ModuleSpec(".".join(parents[:depth]), loader=None, is_package=True)
        bare.submodule_search_locations = [str(root.joinpath(*parents[:depth]))]
        sys.modules.setdefault(bare.name, importlib.util.module_from_spec(bare))
    return importlib.import_module(module)


def _trl(_: int) -> Forward:
    from trl.experimental.gkd import GKDTrainer

    return lambda p: GKDTrainer.generalized_jsd_loss(p.student, p.teacher, beta=1.0, reduction="sum")


def _liger(_: int) -> Forward:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    return lambda p: LigerFusedLinearJSDFunction.distillation_loss_fn(p.student, p.teacher, beta=1.0)


def _modelopt(tp: int) -> Forward:
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    loss = LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=tp), reverse=True)
    return lambda p: loss(p.student.unsqueeze(1), p.teacher.unsqueeze(1))[0].sum()


def _swift(_: int) -> Forward:
    ops = _file("swift.megatron.trainers.vocab_parallel_utils")

    def forward(problem: Any) -> Tensor:
        log_p, log_q = (ops.vocab_parallel_log_softmax(x) for x in (problem.student, problem.teacher))
        return ops.vocab_parallel_kl_div(log_q, log_p).sum()

    return forward


def _verl(_: int) -> Forward:
    ops = _file("verl.utils.megatron.tensor_parallel")

    def forward(problem: Any) -> Tensor:
        logits = problem.student.clone()  # as verl's engine does: the log-probability overwrites what it reads
        with torch.no_grad():
            ops.vocab_parallel_entropy(problem.student)
        return -(problem.advantage * ops.vocab_parallel_log_probs_from_logits(logits, problem.target)).sum()

    return forward


PEERS = (
    Peer("trl", "trl generalized_jsd_loss, beta 1", KL, _trl),
    Peer("liger-kernel", "liger chunked JSD's loss, beta 1", KL, _liger),
    Peer("nvidia-modelopt", "modelopt LogitsKLLoss, reverse", KL, _modelopt, splits_vocabulary=True),
    Peer("ms-swift", "ms-swift vocab_parallel_kl_div", KL, _swift, splits_vocabulary=True),
    Peer("verl", "verl vocab-parallel log-prob, entropy", POLICY, _verl, splits_vocabulary=True),
)


def liger_fused_jsd() -> Callable[[Any], Tensor]:
    """liger's reverse KL from hidden states, `bench_heads.Heads` to its mean over the tokens."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    def forward(problem: Any) -> Tensor:
        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, chunk_size=problem.chunk_size
        )
        return loss(problem.hidden, problem.weight, *problem.teacher, problem.target)

    return forward
