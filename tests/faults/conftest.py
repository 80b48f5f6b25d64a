"""One process that forks the ranks of every run in this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.faults.forked import Ends, nursery
from tests.faults.kills import Campaign


@pytest.fixture(scope="session")
def ask() -> Iterator[Callable[..., Ends]]:
    """Starts a run and waits for its end, see `forked.nursery`."""
    with nursery() as ask:
        yield ask


@pytest.fixture(scope="session")
def campaign(ask: Callable[..., Ends], tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """A folder with inputs, and the run that nobody kills."""
    return Campaign(tmp_path_factory.mktemp("kills"), ask, seed=0)
