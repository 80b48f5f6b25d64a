"""What launched runs need: tokenizer, prompts and teacher, and the steps of a run that nobody interrupts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launch.launched import settings
from tests.online_jobs import run, steps
from tests.train.conftest import folder

__all__ = ["folder"]


@pytest.fixture(scope="module")
def uninterrupted(rank_pool: Any, folder: Path) -> Callable[[int], list[dict[str, Any]]]:
    """The steps of the run on so many data-parallel ranks, in one go."""

    def whole(size: int) -> list[dict[str, Any]]:
        name = f"whole-{size}"
        if not (folder / name).exists():
            rank_pool(size, init=False).run(run, str(folder), settings(folder, name))
        return steps(folder, name)

    return whole
