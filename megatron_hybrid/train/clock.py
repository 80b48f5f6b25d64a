"""How long the stages of a step take. Each begins by telling whoever wants to know where this rank is."""

import contextlib
import time
from collections.abc import Callable, Iterator

from torch.profiler import record_function


class StageClock:
    """Seconds of each stage; in a profile each is a span of its name."""

    def __init__(self, enter: Callable[[str], None]) -> None:
        self.laps: dict[str, float] = {}
        self._enter = enter
        self._last = time.perf_counter()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._enter(name)
        started = time.perf_counter()
        with record_function(f"hybrid/{name}"):
            yield
        self._last = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + self._last - started

    def rest(self, name: str) -> None:
        """What has passed since the last stage."""
        self.laps[name] = time.perf_counter() - self._last
