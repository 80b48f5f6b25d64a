"""One small problem of the fused LM head, and its answer by float64 autograd through everything."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_hybrid.ops.reference import autograd_hybrid_loss


class Problem(NamedTuple):
    hidden: Tensor
    """[n, 12]"""
    weight: Tensor
    """[48, 12]"""
    teacher: Any
    """([n, 20], [48, 20])"""
    given_target: Tensor | None
    imitation_weight: Any = 1.0
    advantage: Any = 0.0

    @property
    def target(self) -> Tensor:
        if self.given_target is None:
            return torch.zeros(self.hidden.shape[:-1], dtype=torch.long)
        return self.given_target

    def take(self, rows: Tensor) -> "Problem":
        """These tokens only."""
        states, head = self.teacher
        rest = (self.target[rows], self.imitation_weight[rows], self.advantage[rows])
        return Problem(self.hidden[rows], self.weight, (states[rows], head), *rest)


def problem(n: int = 23, dtype: torch.dtype = torch.float32) -> Problem:
    """Logits of size 1 to 3; 23 tokens are no multiple of any chunk."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, states, head = (
        torch.randn(shape, generator=g).mul(scale).to(dtype)
        for shape, scale in (((n, 12), 1.0), ((48, 12), 0.4), ((n, 20), 1.0), ((48, 20), 0.3))
    )
    target = torch.randint(0, 41, (n,), generator=g)
    return Problem(
        hidden,
        weight,
        (states, head),
        target,
        torch.rand(n, generator=g),
        torch.randn(n, generator=g),
    )


def judged(
    p: Problem,
    *,
    arriving: Tensor | float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [n], dh, dW) in float64, for the whole vocabulary."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (p.hidden, p.weight))
    states, head = (x.double() for x in p.teacher)
    z = logit_scale * (hidden @ weight.T)
    if logit_softcap is not None:
        z = logit_softcap * torch.tanh(z / logit_softcap)
    weights = {"imitation_weight": p.imitation_weight, "advantage": p.advantage}
    loss = autograd_hybrid_loss(z, states @ head.T, p.target, **weights, **options)
    return loss.detach(), *torch.autograd.grad((loss * arriving).sum(), (hidden, weight))


def assert_close(got: Tensor, want: Tensor) -> None:
    """fp32 against float64: 1e-5 of the tensor's norm (the product's figure), 2e-6 where it vanishes."""
    error = (got.double() - want.double()).norm()
    assert got.shape == want.shape and error <= 1e-5 * want.double().norm() + 2e-6, error
