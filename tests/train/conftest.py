"""What online runs need: a folder with a tokenizer, prompts and a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.online_jobs import make_prompts, make_teacher, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, rank_pool: Any) -> Path:
    """Tokenizer, prompts and a teacher of a random model."""
    path = tmp_path_factory.mktemp("online")
    make_tokenizer(path / "tokenizer")
    make_prompts(path / "prompts.jsonl")
    rank_pool(1, init=False).run(make_teacher, str(path), {})
    return path
