"""Disks of a test's own that are full, read-only or gone: small tmpfs mounts, where the machine lets us mount."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class SmallDisk:
    """A mounted tmpfs."""

    def __init__(self, path: Path, size: str) -> None:
        self.path = path
        self.size = size

    def fill(self) -> None:
        """Not one more byte fits."""
        with open(self.path / "filler", "wb", buffering=0) as file:
            for size in (1 << 16, 1 << 12, 1):
                try:
                    while file.write(bytes(size)):
                        pass
                except OSError:
                    continue

    def free(self) -> None:
        (self.path / "filler").unlink()

    def read_only(self, on: bool = True) -> None:
        """Fails while a file is open for writing, as any remount does."""
        mount("-o", f"remount,{'ro' if on else 'rw'},size={self.size}", str(self.path))


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@contextmanager
def small_disk(path: Path, size: str = "64k") -> Iterator[SmallDisk]:
    """Skips the test where mounting is not allowed."""
    path.mkdir()
    try:
        mount("-t", "tmpfs", "-o", f"size={size}", "none", str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a tmpfs here: {error}")
    try:
        yield SmallDisk(path, size)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
