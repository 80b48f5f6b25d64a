"""Other libraries' full-vocabulary reverse KL behind one call, for `bench_ops.py`. None of them is required.

A peer that cannot be imported, or has no such loss, is a row with the reason. All compute KL(student || teacher) alone:
no policy term, no entropy, no log-probability, so theirs is the smaller job. The full vocabulary on one rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
"""(student logits [n, v], teacher logits [n, v]) to the KL summed over tokens and vocabulary."""


@dataclass(frozen=True)
class Peer:
    """One library's loss, imported when it is asked for."""

    package: str
    """As it is installed from PyPI."""
    name: str
    load: Callable[[], Loss]


def _trl() -> Loss:
    from trl.experimental.gkd import GKDTrainer

    return lambda z, w: GKDTrainer.generalized_jsd_loss(z, w, beta=1.0, reduction="sum")


def _liger() -> Loss:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    return lambda z, w: LigerFusedLinearJSDFunction.distillation_loss_fn(z, w, beta=1.0)


def _modelopt() -> Loss:
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    loss = LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=1), reverse=True)
    return lambda z, w: loss(z.unsqueeze(1), w.unsqueeze(1))[0].sum()


def _swift() -> Loss:
    from swift.megatron.trainers.vocab_parallel_utils import vocab_parallel_kl_div, vocab_parallel_log_softmax

    return lambda z, w: vocab_parallel_kl_div(vocab_parallel_log_softmax(w), vocab_parallel_log_softmax(z)).sum()


def _verl() -> Loss:
    raise ImportError("has a top-k forward KL only, not this job")


PEERS = (
    Peer("trl", "trl generalized_jsd_loss, beta 1", _trl),
    Peer("liger-kernel", "liger chunked JSD's loss, beta 1", _liger),
    Peer("nvidia-modelopt", "modelopt LogitsKLLoss, reverse", _modelopt),
    Peer("ms-swift", "ms-swift vocab_parallel_kl_div", _swift),
    Peer("verl", "verl vocab-parallel KL", _verl),
)
