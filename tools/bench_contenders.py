"""Who takes part from logits, and the batch of logits that all of them are given: whole, or a rank's columns of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from bench_measure import ALL, DTYPES, POLICY, Contender, Job
from bench_peers import PEERS
from torch import Tensor

from megatron_hybrid.ops.api import vocab_parallel_hybrid_loss
from megatron_hybrid.ops.reference import reference_hybrid_loss

BACKENDS = ("torch", "compile")


@dataclass(frozen=True)
class Logits:
    """One batch; `student` is a leaf that wants a gradient."""

    student: Tensor
    """[n, v/tp]"""
    teacher: Tensor
    target: Tensor
    """[n] global ids"""
    advantage: Tensor
    group: Any = None

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.student,)

    @property
    def unit_bytes(self) -> int:
        """Of the student logits."""
        return self.student.numel() * self.student.element_size()

    @classmethod
    def draw(cls, tokens: int, vocab: int, dtype: str) -> "Logits":
        generator = torch.Generator().manual_seed(0)
        student = 2 * torch.randn(tokens, vocab, generator=generator)
        teacher = student + torch.randn(tokens, vocab, generator=generator)
        target = torch.randint(0, vocab, (tokens,), generator=generator)
        advantage = torch.randn(tokens, generator=generator)
        return cls(student.to(DTYPES[dtype]).requires_grad_(), teacher.to(DTYPES[dtype]), target, advantage)

    def shard(self, rank: int, size: int, group: Any) -> "Logits":
        """A rank's columns."""
        student, teacher = (x.detach().chunk(size, dim=-1)[rank].clone() for x in (self.student, self.teacher))
        return Logits(student.requires_grad_(), teacher, self.target, self.advantage, group)


class Judge:
    """float64 over the whole vocabulary; keeps the columns of one rank."""

    def __init__(self, whole: Logits, rank: int = 0, size: int = 1) -> None:
        answers = [
            reference_hybrid_loss(z, w, y, advantage=a)  # in pieces: it holds many float64 copies
            for z, w, y, a in zip(
                *(x.detach().split(32) for x in (whole.student, whole.teacher, whole.target, whole.advantage)),
                strict=True,
            )
        ]
        self._dense, self._sparse = (torch.cat([getattr(x, half) for x in answers]) for half in ("dense", "sparse"))
        self._rank, self._size = rank, size

    def error(self, contender: Contender, gradients: tuple[Tensor, ...]) -> float:
        """Largest over the tokens of |gradient - float64 gradient| / |float64 gradient of the whole vocabulary|."""
        expected = contender.job.imitation * self._dense + contender.job.credit * self._sparse
        mine = expected.chunk(self._size, dim=-1)[self._rank]
        return ((gradients[0].double() - mine).norm(dim=-1) / expected.norm(dim=-1)).nan_to_num(torch.inf).max().item()


def ours(backend: str, job: Job = ALL) -> Callable[[Logits], Tensor]:
    """The op through one of its backends."""

    def forward(problem: Logits) -> Tensor:
        teacher = problem.teacher if job.imitation else None
        out = vocab_parallel_hybrid_loss(
            problem.student,
            teacher,
            problem.target,
            advantage=problem.advantage,
            group=problem.group,
            backend=backend,
        )
        return out.loss.sum()

    return forward


def autograd(compiled: bool) -> Callable[[Logits], Tensor]:
    """The same job written with log_softmax and left to autograd, in fp32; over ranks with torch's own all-reduce."""
    loss = torch.compile(_autograd_loss) if compiled else _autograd_loss
    return lambda problem: loss(problem)[0]


def _autograd_loss(problem: Logits) -> tuple[Tensor, Tensor]:
    if problem.group is None:
        log_p, log_q = problem.student.float().log_softmax(-1), problem.teacher.float().log_softmax(-1)
        log_prob = log_p.gather(1, problem.target.unsqueeze(1)).squeeze(1)
        p = log_p.exp()
        loss = (p * (log_p - log_q)).sum(-1) - problem.advantage * log_prob
        return loss.sum(), -(p * log_p).detach().sum(-1)
    log_p, log_q = (_sharded_log_softmax(x.float(), problem.group) for x in (problem.student, problem.teacher))
    width, rank = log_p.shape[-1], torch.distributed.get_rank(problem.group)
    local = problem.target - rank * width
    mine = (local >= 0) & (local < width)
    log_prob = torch.where(mine, log_p.gather(1, local.clamp(0, width - 1).unsqueeze(1)).squeeze(1), 0.0)
    p = log_p.exp()
    loss = (p * (log_p - log_q)).sum(-1) - problem.advantage * log_prob
    # The values of three numbers per token, for whoever reads them; the gradient needs no sum over ranks.
    values = torch.stack((loss, log_prob, -(p * log_p).sum(-1))).detach()
    torch.distributed.all_reduce(values, group=problem.group)
    return loss.sum(), values


def _sharded_log_softmax(logits: Tensor, group: Any) -> Tensor:
    largest = logits.detach().amax(-1, keepdim=True)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
    centred = logits - largest
    total = torch.distributed.nn.functional.all_reduce(centred.exp().sum(-1, keepdim=True), group=group)
    return centred - total.log()


def contenders(tp: int = 1) -> list[Contender]:
    """Ours, forms of autograd, and whoever else can be imported here; beyond one rank, whoever splits a vocabulary."""
    rows = [Contender(f"ours, {backend}", ALL, ours(backend)) for backend in BACKENDS]
    rows += [Contender(f"ours, {backend}, no teacher", POLICY, ours(backend, POLICY)) for backend in BACKENDS]
    rows.append(Contender("autograd", ALL, autograd(compiled=False)))
    if tp == 1:  # torch.compile splits a graph at a collective that autograd goes through
        rows.append(Contender("torch.compile of autograd", ALL, autograd(compiled=True)))
    for peer in PEERS:
        if tp > 1 and not peer.splits_vocabulary:
            continue
        try:
            rows.append(Contender(peer.name, peer.job, peer.load(tp)))
        except Exception as error:  # whatever another library raises at import: it is named in its row
            rows.append(Contender(peer.name, peer.job, None, note=peer.why_not(error)))
    return rows
