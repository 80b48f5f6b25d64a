"""What a run was made by: package versions and the git revision, for its config.json."""

import subprocess
import sys
from importlib import metadata
from typing import Any

PACKAGES = (
    "megatron-hybrid",
    "megatron-core",
    "transformer-engine",
    "torch",
    "triton",
    "transformers",
    "reasoning-gym",
    "math-verify",
    "numpy",
)
"""Packages whose version can change a result; what is not installed is left out."""


def versions() -> dict[str, str]:
    """Python and the installed packages that can change a result; read from their metadata, none is imported."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> dict[str, Any] | None:
    """Revision of the working directory and whether it holds uncommitted changes; None outside a repository."""
    try:
        revision = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"revision": revision, "uncommitted_changes": bool(changed)}


def _git(*arguments: str) -> str:
    # 10 s: a repository on a slow network file system must not hold up a run for longer.
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
