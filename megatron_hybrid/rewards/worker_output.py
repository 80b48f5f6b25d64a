"""What processes that score print: kept in a file of the run folder up to a size, beyond it read and thrown away.

    stdout and stderr of any number of processes -> one pipe -> a thread -> FILE

A pipe, not the file itself: a process that meets the end of its allowance would get an error from print().
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from pathlib import Path

logger = logging.getLogger(__name__)

LARGEST_FILE_BYTES = 1 << 20


class WorkerOutput:
    """One file; nothing is made before somebody asks for the pipe."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._end: int | None = None
        self._lock = threading.Lock()

    def write_end(self) -> int:
        """The end of the pipe that processes write to: a file descriptor that is closed with this object."""
        with self._lock:
            if self._end is None:
                read_end, self._end = os.pipe()
                weakref.finalize(self, os.close, self._end)
                threading.Thread(target=_keep, args=(read_end, self.file), name="reward output", daemon=True).start()
            return self._end


def _keep(read_end: int, file: Path) -> None:
    """Until every process has closed the pipe."""
    keeps = True
    with open(read_end, "rb", buffering=0) as pipe:
        while text := pipe.read(1 << 16):
            if keeps and (reason := _append(file, text)):
                keeps = False
                logger.warning("nothing more of what rewards print is kept in %s: %s", file, reason)


def _append(file: Path, text: bytes) -> str:
    """Adds to the file; why not all of it, or nothing."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "ab") as kept:
            room = LARGEST_FILE_BYTES - kept.tell()
            kept.write(text[: max(room, 0)])
    except OSError as error:
        return str(error)
    return f"it is full, at {LARGEST_FILE_BYTES} bytes" if len(text) > room else ""
