"""From hidden states: the fused head beside the four matrix products it cannot do without, the logits path and liger's.

The four are student logits, teacher logits, dh and dW, in the same type; chunked as ours and whole. They are the time
that no fused head of this kind goes below, so every time is also given as a multiple of theirs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from bench_contenders import BACKENDS
from bench_measure import ALL, DTYPES, KL, Contender, Job, Record, measure
from bench_peers import liger_fused_jsd
from torch import Tensor

from megatron_hybrid.ops.api import vocab_parallel_hybrid_loss
from megatron_hybrid.ops.lm_head import linear_hybrid_loss
from megatron_hybrid.ops.reference import reference_hybrid_loss
from tests.memory import peak_bytes

PRODUCTS = Job("nothing but the products", 0.0, 0.0)
CHUNKED = "four products, in chunks"
MEMORY_TIMES = 2
"""Memory is measured again with so many times the tokens."""


@dataclass(frozen=True)
class Heads:
    """Hidden states and heads of student and teacher; `hidden` and `weight` are leaves that want gradients."""

    hidden: Tensor
    """[n, h]"""
    weight: Tensor
    """[v, h]"""
    teacher: tuple[Tensor, Tensor]
    """Hidden states [n, h] and head [v, h]."""
    target: Tensor
    advantage: Tensor
    chunk_size: int

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.hidden, self.weight

    @classmethod
    def draw(cls, tokens: int, hidden_size: int, vocab: int, chunk_size: int, dtype: str) -> "Heads":
        g = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(*shape, generator=g)).to(DTYPES[dtype])

        student = normal(tokens, hidden_size), normal(vocab, hidden_size, scale=2 * hidden_size**-0.5)
        teacher = tuple(x + normal(*x.shape, scale=0.2) * x.abs().mean() for x in student)
        target = torch.randint(0, vocab, (tokens,), generator=g)
        hidden, weight = (x.requires_grad_() for x in student)
        return cls(hidden, weight, teacher, target, torch.randn(tokens, generator=g), chunk_size)


class HeadJudge:
    """float64: dense and sparse halves of dh and dW, summed over the tokens."""

    def __init__(self, problem: Heads) -> None:
        hidden, weight = (x.detach().double() for x in problem.leaves)
        states, head = (x.double() for x in problem.teacher)
        self._dh: list[list[Tensor]] = [[], []]
        self._dw = [torch.zeros_like(weight) for _ in range(2)]
        for h, t, y, a in zip(*(x.split(64) for x in (hidden, states, problem.target, problem.advantage)), strict=True):
            answer = reference_hybrid_loss(h @ weight.T, t @ head.T, y, advantage=a)
            for half, dz in enumerate((answer.dense, answer.sparse)):
                self._dh[half].append(dz @ weight)
                self._dw[half].addmm_(dz.T, h)

    def error(self, contender: Contender, gradients: tuple[Tensor, ...]) -> float:
        """The larger of |dh - float64 dh| / |float64 dh| and that of dW; liger's are of the mean over the tokens."""
        if contender.job is PRODUCTS:
            return 0.0
        worst = 0.0
        scale = len(gradients[0]) if contender.job is KL else 1
        for got, halves in zip(gradients, ([torch.cat(x) for x in self._dh], self._dw), strict=True):
            expected = contender.job.imitation * halves[0] + contender.job.credit * halves[1]
            worst = max(worst, ((got.double() * scale - expected).norm() / expected.norm()).item())
        return worst


def _products(problem: Heads) -> tuple[Tensor, Tensor]:
    return problem.hidden.detach() @ problem.weight.detach().T, problem.teacher[0] @ problem.teacher[1].T


def _their_backward(logits: tuple[Tensor, Tensor], problem: Heads) -> tuple[Tensor, Tensor]:
    return logits[0] @ problem.weight.detach(), logits[0].T @ problem.hidden.detach()


def _chunked_products(problem: Heads) -> tuple[Tensor, Tensor]:
    """All four, chunk by chunk, each logits tensor made once."""
    hidden, weight = (x.detach() for x in problem.leaves)
    states, head = problem.teacher
    dh, dw = torch.empty_like(hidden), torch.zeros_like(weight)
    z, w = (hidden.new_empty(problem.chunk_size, len(weight)) for _ in range(2))
    for start in range(0, len(hidden), problem.chunk_size):
        rows = slice(start, start + problem.chunk_size)
        num = len(hidden[rows])
        torch.mm(hidden[rows], weight.T, out=z[:num])
        torch.mm(states[rows], head.T, out=w[:num])
        torch.mm(z[:num], weight, out=dh[rows])
        dw.addmm_(z[:num].T, hidden[rows])
    return dh, dw


def _fused(backend: str, one_pass: bool) -> Callable[[Heads], Tensor]:
    def forward(problem: Heads) -> Tensor:
        out = linear_hybrid_loss(
            problem.hidden,
            problem.weight,
            problem.teacher,
            problem.target,
            advantage=problem.advantage,
            chunk_size=problem.chunk_size,
            one_pass=one_pass,
            backend=backend,
        )
        return out.loss.sum()

    return forward


def _from_logits(problem: Heads) -> Tensor:
    teacher = problem.teacher[0] @ problem.teacher[1].T
    student = problem.hidden @ problem.weight.T
    out = vocab_parallel_hybrid_loss(student, teacher, problem.target, advantage=problem.advantage, backend="compile")
    return out.loss.sum()


def contenders() -> list[Contender]:
    """The products alone, ours, and liger's where it can be imported."""

    def given(result: Any, _: Heads) -> Any:
        return result

    rows = [
        Contender(CHUNKED, PRODUCTS, _chunked_products, given),
        Contender("four products, whole", PRODUCTS, _products, _their_backward),
    ]
    for one_pass in (False, True):
        name = "one pass" if one_pass else "two passes"
        rows += [Contender(f"ours, {name}, {backend}", ALL, _fused(backend, one_pass)) for backend in BACKENDS]
    rows.append(Contender("head, then ours from logits, compile", ALL, _from_logits))
    try:
        rows.append(Contender("liger fused linear JSD, beta 1", KL, liger_fused_jsd()))
    except Exception as error:  # whatever another library raises at import: it is named in its row
        note = f"liger-kernel not imported: {type(error).__name__}: {error}".splitlines()[0]
        rows.append(Contender("liger fused linear JSD, beta 1", KL, None, note=note))
    return rows


def table(
    sizes: tuple[int, int, int, int], dtype: str, repeats: int, say: Callable[[str, float], None]
) -> list[Record]:
    """All contenders; sizes: tokens, hidden size, vocabulary, chunk size."""
    tokens, hidden_size, vocab, chunk_size = sizes
    problem = Heads.draw(tokens, hidden_size, vocab, chunk_size, dtype)
    taking_part = contenders()
    records = measure(
        taking_part,
        problem,
        lambda who: Record(who.name, who.job.name, "heads", dtype, 1, vocab, tokens),
        HeadJudge(problem).error,
        repeats,
        unit_bytes=tokens * vocab * DTYPES[dtype].itemsize,
        say=lambda text, cost: say(f"heads, {dtype}: {text}", 3 * cost),
    )
    unit = next(record.time_s for record in records if record.name == CHUNKED)
    longer = Heads.draw(MEMORY_TIMES * tokens, hidden_size, vocab, chunk_size, dtype)
    for who, record in zip(taking_part, records, strict=True):
        record.extra |= {"hidden_size": hidden_size, "chunk_size": chunk_size}
        if record.time_s is not None and unit is not None and who.forward is not None:
            say(f"heads, {dtype}: memory of {who.name} at {longer.hidden.shape[0]} tokens", 3.0)
            record.extra["x_products"] = record.time_s / unit
            record.extra["memory_bytes_longer"] = peak_bytes(
                lambda w=who: w.backward(w.forward(longer), longer)  # type: ignore[misc]
            )
    return records
