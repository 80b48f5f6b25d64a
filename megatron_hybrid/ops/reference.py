"""The judge: the hybrid loss in float64 over the whole vocabulary, twice. No shards, blocks, skipped rows or tricks.

`reference_hybrid_loss` is the closed form, line by line as in the derivation; `autograd_hybrid_loss` is the loss alone,
for torch to differentiate. They share nothing but the logarithm of a softmax, and every other variant answers to them.
Divergences are written out one by one, each as its paper has it (see `divergence.py`), from p and q and not from u.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Reference(NamedTuple):
    """float64, nats."""

    loss: Tensor
    """[n]"""
    kl: Tensor
    """[n]: KL(p || q), whatever the divergence."""
    log_prob: Tensor
    """[n]"""
    teacher_log_prob: Tensor
    """[n]"""
    entropy: Tensor
    """[n]"""
    dense: Tensor
    """[n, v_padded]: beta dD/dz; 0 where D is infinite."""
    sparse: Tensor
    """[n, v_padded]: -A dlog p(y)/dz."""
    divergence: Tensor
    """[n]: D."""

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
    divergence: str = "reverse_kl",
    divergence_mix: float = 0.5,
) -> Reference:
    """The closed form. Logits [n, v_padded] of any float type, target [n]; options as `vocab_parallel_hybrid_loss`."""
    v = student_logits.shape[-1] if vocab_size is None else vocab_size
    beta, a = (torch.as_tensor(x, dtype=torch.float64).expand(target.shape) for x in (imitation_weight, advantage))
    log_p = torch.log_softmax(student_logits[:, :v].double() / student_temperature, dim=-1)
    log_q = torch.log_softmax(teacher_logits[:, :v].double() / teacher_temperature, dim=-1)
    p, at_target = log_p.exp(), torch.nn.functional.one_hot(target, v).double()

    kl = _kl(log_p, log_q)
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    log_prob, teacher_log_prob = (x.gather(1, target[:, None]).squeeze(1) for x in (log_p, log_q))

    value, slope = _divergence(log_p, log_q, divergence, divergence_mix)
    slope = torch.where(p > 0, p * slope, 0.0)  # no probability, nothing to gain
    if divergence == "forward_kl":
        slope = p - log_q.exp()  # p (1 - q/p), also where p is 0
    dense = beta[:, None] * (slope - p * slope.sum(-1, keepdim=True)) / student_temperature
    dense = torch.where(value.isinf()[:, None], 0.0, dense)
    sparse = a[:, None] * (p - at_target) / student_temperature
    padding = (0, student_logits.shape[-1] - v)
    dense, sparse = (torch.nn.functional.pad(x, padding) for x in (dense, sparse))
    return Reference(beta * value - a * log_prob, kl, log_prob, teacher_log_prob, entropy, dense, sparse, value)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) [n]; a token that p forbids costs nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def _divergence(log_p: Tensor, log_q: Tensor, divergence: str, c: float) -> tuple[Tensor, Tensor]:
    """D [n], and dD/dp_v [n, v] up to a constant of each row; garbage where p is 0."""
    p, q = log_p.exp(), log_q.exp()
    match divergence:
        case "reverse_kl":
            return _kl(log_p, log_q), log_p - log_q
        case "forward_kl":
            return _kl(log_q, log_p), -q / p
        case "jsd":
            m = c * q + (1 - c) * p
            return c * _kl(log_q, m.log()) + (1 - c) * _kl(log_p, m.log()), (1 - c) * (log_p - m.log())
        case "skewed_kl":
            m = c * q + (1 - c) * p
            return _kl(log_q, m.log()), -(1 - c) * q / m
        case "skewed_reverse_kl":
            m = c * p + (1 - c) * q
            return _kl(log_p, m.log()), log_p - m.log() - c * p / m
    raise ValueError(f"the judge knows no divergence {divergence!r}")


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
    divergence: str = "reverse_kl",
    divergence_mix: float = 0.5,
) -> Tensor:
    """The loss [n] alone, float64, differentiable in the student logits by torch. Finite logits only."""
    v = student_logits.shape[-1] if vocab_size is None else vocab_size
    log_p = torch.log_softmax(student_logits[:, :v].double() / student_temperature, dim=-1)
    log_q = torch.log_softmax(teacher_logits[:, :v].double() / teacher_temperature, dim=-1)

    def kl(of: Tensor, to: Tensor) -> Tensor:
        return torch.nn.functional.kl_div(to, of, reduction="none", log_target=True).sum(-1)

    def mixed(log_a: Tensor, log_b: Tensor) -> Tensor:
        share = torch.tensor(divergence_mix, dtype=torch.float64)
        return torch.logaddexp(log_a + share.log(), log_b + (1 - share).log())

    m = mixed(log_q, log_p)
    value = {
        "reverse_kl": lambda: kl(log_p, log_q),
        "forward_kl": lambda: kl(log_q, log_p),
        "jsd": lambda: divergence_mix * kl(log_q, m) + (1 - divergence_mix) * kl(log_p, m),
        "skewed_kl": lambda: kl(log_q, m),
        "skewed_reverse_kl": lambda: kl(log_p, mixed(log_p, log_q)),
    }[divergence]()
    return imitation_weight * value - advantage * log_p.gather(1, target[:, None]).squeeze(1)
