"""Who takes part in `bench_ops.py`, and the batch of logits that all of them are given."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from bench_peers import PEERS
from torch import Tensor

from megatron_hybrid.ops.api import vocab_parallel_hybrid_loss

Run = Callable[["Problem"], Tensor]
"""Forward and backward of the summed loss: the gradient in the student logits."""


@dataclass(frozen=True)
class Problem:
    """One batch of logits; `student` is a leaf that wants a gradient."""

    student: Tensor
    teacher: Tensor
    target: Tensor
    advantage: Tensor

    @classmethod
    def draw(cls, rows: int, vocab: int, dtype: str) -> "Problem":
        generator = torch.Generator().manual_seed(0)
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        student = 2 * torch.randn(rows, vocab, generator=generator)
        teacher = student + torch.randn(rows, vocab, generator=generator)
        target = torch.randint(0, vocab, (rows,), generator=generator)
        advantage = torch.randn(rows, generator=generator)
        return cls(student.to(kind).requires_grad_(), teacher.to(kind), target, advantage)


@dataclass
class Row:
    """One contender and what was measured of it."""

    name: str
    whole_job: bool
    """KL, policy term, entropy and log-probability; else the KL alone."""
    run: Run | None
    note: str = ""
    times_s: list[float] = field(default_factory=list)
    memory: float | None = None
    error: float | None = None

    @property
    def median_s(self) -> float:
        """Of the repeats."""
        return statistics.median(self.times_s)


def ours(backend: str, group: Any = None) -> Run:
    """The op through one of its backends."""

    def run(problem: Problem) -> Tensor:
        out = vocab_parallel_hybrid_loss(
            problem.student,
            problem.teacher,
            problem.target,
            advantage=problem.advantage,
            group=group,
            backend=backend,
        )
        return torch.autograd.grad(out.loss.sum(), problem.student)[0]

    return run


def autograd(compiled: bool) -> Run:
    """The same job written with log_softmax and left to autograd, in fp32."""

    def loss(student: Tensor, teacher: Tensor, target: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        log_p, log_q = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
        p = log_p.exp()
        log_prob = log_p.gather(1, target.unsqueeze(1)).squeeze(1)
        return ((p * (log_p - log_q)).sum(-1) - advantage * log_prob).sum(), -(p * log_p).detach().sum(-1)

    function = torch.compile(loss) if compiled else loss

    def run(problem: Problem) -> Tensor:
        total, _ = function(problem.student, problem.teacher, problem.target, problem.advantage)
        return torch.autograd.grad(total, problem.student)[0]

    return run


def contenders() -> list[Row]:
    """Ours, the two forms of autograd, and whoever else can be imported here."""
    rows = [Row(f"ours, {backend}", True, ours(backend)) for backend in ("torch", "compile")]
    rows += [Row("autograd", True, autograd(False)), Row("torch.compile of autograd", True, autograd(True))]
    for peer in PEERS:
        try:
            loss = peer.load()
        except Exception as error:  # whatever another library raises at import: it is named in its row
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            rows.append(Row(peer.name, False, None, f"not measured ({peer.package}): {reason}"))
            continue

        def run(problem: Problem, loss: Any = loss) -> Tensor:
            return torch.autograd.grad(loss(problem.student, problem.teacher), problem.student)[0]

        rows.append(Row(peer.name, False, run))
    return rows
