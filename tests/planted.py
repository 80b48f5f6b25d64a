"""A thing that tells when it is unpickled: whoever wrote it into a file has run code in the process that reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, file: str | Path) -> None:
        self.file = str(file)

    def __reduce__(self) -> Any:
        return open, (self.file, "w")
