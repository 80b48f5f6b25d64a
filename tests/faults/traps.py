"""What makes a rank die or hang at a moment of its run, from outside the product; and what notes the moments.

A trap is made around a rank's run (`forked.nursery`). It learns where the rank is from what the rank tells its peers
(`Peers.enter`), and of the optimizer from Megatron's own.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

Entered = Callable[[int, str], None]


@contextlib.contextmanager
def told(entered: Entered) -> Iterator[None]:
    """Calls `entered(step, stage)` whenever this rank enters a stage; "optimizer" is one too."""
    from megatron.core.optimizer import ChainedOptimizer

    from megatron_hybrid.train.peers import Peers

    enter, optimizer_step, last = Peers.enter, ChainedOptimizer.step, [0]

    def entering(self: Peers, step: int, stage: str) -> None:
        enter(self, step, stage)
        last[0] = step
        entered(step, stage)

    @functools.wraps(optimizer_step)
    def stepping(self: ChainedOptimizer) -> object:
        entered(last[0], "optimizer")
        return optimizer_step(self)

    with mock.patch.object(Peers, "enter", entering), mock.patch.object(ChainedOptimizer, "step", stepping):
        yield


@dataclass(frozen=True)
class Note:
    """Writes when each stage was entered, a line each, to FILE.rank<rank>."""

    file: str

    @contextlib.contextmanager
    def __call__(self, rank: int) -> Iterator[None]:
        with open(f"{self.file}.rank{rank}", "w") as out:
            with told(lambda step, stage: print(json.dumps([time.monotonic(), step, stage]), file=out)):
                yield
            print(json.dumps([time.monotonic(), 0, "end"]), file=out)


@dataclass(frozen=True)
class Kill:
    """SIGKILL for this rank, or for all of them, some time after it has entered a stage; FILE will say where it was."""

    file: str
    rank: int
    step: int
    stage: str
    after_s: float = 0.0
    everybody: bool = False

    @contextlib.contextmanager
    def __call__(self, rank: int) -> Iterator[None]:
        Path(f"{self.file}.pid{rank}").write_text(str(os.getpid()))
        if rank != self.rank:
            yield
            return
        at: list[tuple[int, str]] = []

        def entered(step: int, stage: str) -> None:
            at.append((step, stage))
            if (step, stage) == (self.step, self.stage) and at.count((step, stage)) == 1:
                if self.after_s:
                    threading.Timer(self.after_s, self._shoot, (at,)).start()
                else:
                    self._shoot(at)

        with told(entered):
            yield

    def _shoot(self, at: list[tuple[int, str]]) -> None:
        Path(self.file).write_text(json.dumps(at[-1]))
        others = Path(self.file).parent.glob(f"{Path(self.file).name}.pid*") if self.everybody else []
        for path in others:
            if (pid := int(path.read_text())) != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class At:
    """What one rank does where it enters a stage of a step: SIGSTOP, or an error of its own."""

    rank: int
    step: int
    stage: str
    does: str

    @contextlib.contextmanager
    def __call__(self, rank: int) -> Iterator[None]:
        def entered(step: int, stage: str) -> None:
            if (rank, step, stage) != (self.rank, self.step, self.stage):
                return
            if self.does == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            raise ZeroDivisionError("of this rank alone")

        with told(entered):
            yield
