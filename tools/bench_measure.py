"""One way to measure for every part of the benchmark: contenders take turns, medians count, memory by torch's record.

A contender is a forward and a backward on a problem that all of them are given; what was measured of it is one flat
record, which tables, picture and JSON are made from.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from tests.memory import peak_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WRONG = {"fp32": 1e-3, "bf16": 0.1}
"""Relative error beyond which a gradient is wrong and not just rounded: computing in bf16 throughout gives 1 to 5 %."""


@dataclass(frozen=True)
class Job:
    """What a contender computes; its gradient is imitation * dense + credit * sparse of the reference."""

    name: str
    imitation: float
    credit: float


ALL = Job("all", 1.0, 1.0)
KL = Job("KL alone", 1.0, 0.0)
POLICY = Job("no teacher", 0.0, 1.0)


class Problem(Protocol):
    """What a part of the benchmark gives to all its contenders."""

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What wants a gradient."""


def gradients(loss: Tensor, problem: Problem) -> tuple[Tensor, ...]:
    """The backward of whoever leaves it to autograd."""
    return torch.autograd.grad(loss, problem.leaves)


@dataclass(frozen=True)
class Contender:
    """One way to do a job."""

    name: str
    job: Job
    forward: Callable[[Any], Any] | None
    """Of a problem; None: cannot run here, for the reason in `note`."""
    backward: Callable[[Any, Any], tuple[Tensor, ...]] = gradients
    """Of what forward returned and the problem: the gradients, or whatever is held against the reference."""
    note: str = ""


@dataclass
class Record:
    """What was measured of one contender on one problem; None: it is not measured there."""

    name: str
    job: str
    part: str
    dtype: str
    tp: int
    vocab: int
    tokens: int
    note: str = ""
    forward_s: float | None = None
    """Median of the rounds, as `backward_s`; of the slowest rank."""
    backward_s: float | None = None
    memory_bytes: int | None = None
    """Largest that torch's allocator held at once beside what it held before."""
    memory: float | None = None
    """The same in multiples of the (rank's) student logits: a gradient in their dtype is 1."""
    error: float | None = None
    """Relative, of the gradient, against float64."""
    collectives: int | None = None
    sent_bytes: float | None = None
    """Handed to collectives by one rank, per token, forward and backward."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What only one part of the benchmark measures."""

    @property
    def time_s(self) -> float | None:
        """Forward and backward."""
        return None if self.forward_s is None or self.backward_s is None else self.forward_s + self.backward_s

    @property
    def wrong(self) -> bool:
        return self.error is not None and not self.error <= WRONG[self.dtype]


class Progress:
    """What is being done, for how long, and about how long the rest takes; on stderr, one line that is written over."""

    def __init__(self, total: float) -> None:
        self.total, self.done, self.started = total, 0.0, time.monotonic()
        self._end = "\r" if sys.stderr.isatty() else "\n"

    def __call__(self, text: str, cost: float = 0.0) -> None:
        """Starts a step whose share of the whole is `cost`; the one before it is done."""
        taken = time.monotonic() - self.started
        left = f"about {taken * max(0.0, self.total - self.done) / self.done:.0f} s left" if self.done else ""
        print(f"{taken:4.0f} s  {text:<68.68} {left:<18}", end=self._end, file=sys.stderr, flush=True)
        self.done += cost


def measure(
    contenders: Sequence[Contender],
    problem: Problem,
    record: Callable[[Contender], Record],
    error: Callable[[Contender, tuple[Tensor, ...]], float],
    repeats: int,
    *,
    unit_bytes: int,
    say: Callable[[str, float], None],
    wait: Callable[[], None] = lambda: None,
) -> list[Record]:
    """One run each for warmth, error and memory, then `repeats` rounds in which they take turns.

    record   makes the empty record of a contender
    error    of its gradients, relative
    wait     called before each timed run: a barrier, where ranks run together
    """
    running: list[tuple[Contender, Record, list[tuple[float, float]]]] = []
    records = []
    for contender in contenders:
        row = record(contender)
        row.note = contender.note
        records.append(row)
        if contender.forward is None:
            continue
        say(f"{contender.name}: first run, error, memory", 1.0)
        forward = contender.forward
        try:
            row.error = error(contender, contender.backward(forward(problem), problem))
            row.memory_bytes = peak_bytes(lambda f=forward, c=contender: c.backward(f(problem), problem))
        except Exception as failure:  # another library's: named in its row, and the others go on
            row.note = f"failed: {type(failure).__name__}: {failure}".splitlines()[0]
            continue
        row.memory = row.memory_bytes / unit_bytes
        running.append((contender, row, []))
    for repeat in range(repeats):
        say(f"timing, round {repeat + 1} of {repeats}", 1.0)
        for contender, _, taken in running:
            wait()
            taken.append(timed(contender, problem))
    for _, row, taken in running:
        row.forward_s, row.backward_s = (statistics.median(times) for times in zip(*taken, strict=True))
    return records


def timed(contender: Contender, problem: Problem) -> tuple[float, float]:
    """Seconds of one forward and of one backward."""
    assert contender.forward is not None
    started = time.perf_counter()
    result = contender.forward(problem)
    between = time.perf_counter()
    contender.backward(result, problem)
    return between - started, time.perf_counter() - between
