"""What a run writes to, any of which may fail while training goes on: its folder, TensorBoard, wandb, its output.

A disk fills up, a folder vanishes, a service dies: the rank that writes warns once, with what is lost meanwhile,
counts, and tries again at the next step; no other rank hears of it. Lines of a journal wait in memory until they can
be appended. Not here: checkpoints, whose failures are Megatron's and end a run; a folder that cannot be written at the
start, which `prepare` refuses.
"""

from __future__ import annotations

import functools
import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_hybrid.train import journal

logger = logging.getLogger(__name__)

MOST_WAITING_BYTES = 16 << 20
"""Of one journal, while its file cannot be written: some ten thousand steps, a few hundred samples."""


class Outlet:
    """One thing a run writes to.

    name   as the run's messages call it
    loses  what is not written while it fails, as the end of a sentence
    """

    def __init__(self, name: str, loses: str) -> None:
        self.name = name
        self.loses = loses
        self.failures = 0
        """Calls that failed."""

    def write[T](self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T | None:
        """What the call returns; None where it fails."""
        try:
            return call(*args, **kwargs)
        except Exception as error:  # whatever a writer throws, it is no reason to lose a run
            self._failed(error)
            return None

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        if self.failures == 1:
            logger.warning(
                "%s cannot be written (%s: %s): %s. Training goes on; this is said once.",
                self.name,
                type(error).__name__,
                error,
                self.loses,
            )

    @property
    def summary(self) -> str | None:
        """What became of it, for the end of a run; None where all went well."""
        return f"{self.name}: {self.failures} calls failed" if self.failures else None

    @contextmanager
    def guards(self, owner: Any, names: Iterable[str]) -> Iterator[None]:
        """Inside the block these functions of an object or module go through `write`, whoever calls them."""
        own = dict(vars(owner))
        guards = {name: self._guarded(getattr(owner, name)) for name in names if hasattr(owner, name)}
        vars(owner).update(guards)
        try:
            yield
        finally:
            for name, guard in guards.items():
                if vars(owner).get(name) is not guard:
                    continue  # wandb puts others in their place when it finishes
                if name in own:
                    setattr(owner, name, own[name])
                else:  # it is the class's
                    delattr(owner, name)

    def _guarded(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            return self.write(call, *args, **kwargs)

        return guarded


class JournalOutlet(Outlet):
    """A journal whose lines wait in memory while its file cannot be written; too many, and the oldest are dropped."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.name, f"up to {MOST_WAITING_BYTES >> 20} MiB of its lines wait in memory for it")
        self.path = path
        self.lost = 0
        """Lines that waited too long."""
        self._waiting: deque[bytes] = deque()

    def append(self, *records: journal.Record) -> None:
        """Adds lines, behind those that wait."""
        waited, failures = len(self._waiting), self.failures
        self._waiting.extend(map(journal.line, records))
        self.write(journal.append_lines, self.path, list(self._waiting))
        if self.failures == failures:
            self._waiting.clear()
            if waited:
                logger.warning(
                    "%s can be written again: %d lines that waited are in it, %d were lost meanwhile",
                    self.name,
                    waited,
                    self.lost,
                )
        size = sum(map(len, self._waiting))
        while size > MOST_WAITING_BYTES:
            size -= len(self._waiting.popleft())
            self.lost += 1

    def read(self) -> list[journal.Record]:
        """Its records, those that wait too; what cannot be read is left out."""
        found: list[journal.Record] = []
        with suppress(OSError):
            found = journal.read(self.path)
        return found + [json.loads(line) for line in self._waiting]

    @property
    def summary(self) -> str | None:
        left = len(self._waiting)
        return f"{super().summary}, {self.lost + left} lines are missing in it" if self.failures else None
