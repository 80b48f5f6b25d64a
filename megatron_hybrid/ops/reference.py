"""The judge: the hybrid loss in float64 over the whole vocabulary, twice. No shards, blocks, skipped rows or tricks.

`reference_hybrid_loss` is the closed form, line by line as in the derivation; `autograd_hybrid_loss` is the loss alone,
for torch to differentiate. They share nothing but the logarithm of a softmax, and every other variant answers to them.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Reference(NamedTuple):
    """float64, nats."""

    loss: Tensor
    """[n]"""
    kl: Tensor
    """[n]"""
    log_prob: Tensor
    """[n]"""
    teacher_log_prob: Tensor
    """[n]"""
    entropy: Tensor
    """[n]"""
    dense: Tensor
    """[n, v_padded]: beta dKL/dz; 0 where the KL is infinite."""
    sparse: Tensor
    """[n, v_padded]: -A dlog p(y)/dz."""

    @property
    def gradient(self) -> Tensor:
        """[n, v_padded]: d sum(loss) / d student_logits."""
        return self.dense + self.sparse


def reference_hybrid_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    imitation_weight: Tensor | float = 1.0,
    advantage: Tensor | float = 0.0,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Reference:
    """The closed form. Logits [n, v_padded] of any float type, target [n]; options as `vocab_parallel_hybrid_loss`."""
    v = student_logits.shape[-1] if vocab_size is None else vocab_size
    beta, a = (torch.as_tensor(x, dtype=torch.float64).expand(target.shape) for x in (imitation_weight, advantage))
    log_p = torch.log_softmax(student_logits[:, :v].double() / student_temperature, dim=-1)
    log_q = torch.log_softmax(teacher_logits[:, :v].double() / teacher_temperature, dim=-1)
    p, at_target = log_p.exp(), torch.nn.functional.one_hot(target, v).double()

    log_ratio = torch.where(p > 0, log_p - log_q, 0.0)  # a token of probability 0 costs nothing
    kl = torch.where(p > 0, p * log_ratio, 0.0).sum(-1)
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    log_prob, teacher_log_prob = (x.gather(1, target[:, None]).squeeze(1) for x in (log_p, log_q))

    dense = beta[:, None] * p * (log_ratio - kl[:, None]) / student_temperature
    dense = torch.where(kl.isinf()[:, None], 0.0, dense)
    sparse = a[:, None] * (p - at_target) / student_temperature
    padding = (0, student_logits.shape[-1] - v)
    dense, sparse = (torch.nn.functional.pad(x, padding) for x in (dense, sparse))
    return Reference(beta * kl - a * log_prob, kl, log_prob, teacher_log_prob, entropy, dense, sparse)


def autograd_hybrid_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    imitation_weight: Tensor | float = 1.0,
    advantage: Tensor | float = 0.0,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """The loss [n] alone, float64, differentiable in the student logits by torch. Finite logits only."""
    v = student_logits.shape[-1] if vocab_size is None else vocab_size
    log_p = torch.log_softmax(student_logits[:, :v].double() / student_temperature, dim=-1)
    log_q = torch.log_softmax(teacher_logits[:, :v].double() / teacher_temperature, dim=-1)
    kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return imitation_weight * kl - advantage * log_p.gather(1, target[:, None]).squeeze(1)
