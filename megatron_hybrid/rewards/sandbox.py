"""Runs a program that nobody trusts: Python written by the model, followed by tests.

    program, tests -> an interpreter in namespaces of its own (`sandbox_child.py`) -> whether it came to its end

What holds, on Linux: no network (a network namespace without a device); an empty environment; no file of the machine
but Python's own and the system's libraries, read-only; 64 MiB of files in memory, gone afterwards; no process of the
machine is seen or signalled (a process namespace, with which everything ends that the program has started); no
capability, and none to be had by setuid programs; limits of time, address space, processes (32), open files (64) and
file size (16 MiB); another user than root where the run is root.
What does not: the kernel is shared, and a hole in it is a way out; 32 processes may each have the memory and time
allowed; the program knows the machine's processor and kernel version; it can fake the result of its tests, which run in
the same interpreter.
Only Python's standard library is there.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_hybrid.errors import ConfigError, RewardError

_CHILD = Path(__file__).with_name("sandbox_child.py")
_SETUP_S = 30.0
"""On top of the program's own time: two starts of Python on a busy machine."""


@dataclass(frozen=True)
class Limits:
    """What is allowed for one response; inf: no limit."""

    seconds: float
    memory_gib: float
    """Of address space, for each process."""

    @property
    def memory_bytes(self) -> int | None:
        return None if math.isinf(self.memory_gib) else int(self.memory_gib * 2**30)


def passes(program: str, tests: Sequence[str], limits: Limits) -> bool:
    """Whether the program and then its tests run to their end, within the limits.

    Raises:
        RewardError: there is no sandbox; the program has not been run.
    """
    token = secrets.token_hex(16)  # a program that ends early does not know what to say
    read_end, write_end = os.pipe()
    try:
        with tempfile.TemporaryDirectory(prefix="hybrid_sandbox_") as root:
            settings = {
                "root": root,
                "verdict": write_end,
                "parent": os.getpid(),
                "seconds": None if math.isinf(limits.seconds) else limits.seconds,
                "memory_bytes": limits.memory_bytes,
                "prefix": sys.base_prefix,
                "python": f"{sys.base_prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}",
            }
            given = json.dumps({"program": program, "tests": list(tests), "token": token}).encode()
            error = _run(settings, given, limits.seconds + _SETUP_S)
        os.set_blocking(read_end, False)
        with suppress(BlockingIOError):
            said = b""  # whoever floods the pipe fills it, and waits for his end
            said = os.read(read_end, 1000)
    finally:
        os.close(read_end)
        os.close(write_end)
    if error:
        raise RewardError(f"there is no sandbox for a response's code: {error}")
    return said == token.encode()


def _run(settings: dict[str, Any], given: bytes, timeout_s: float) -> str:
    """Runs a program to its end, whichever; why it could not be run, where it could not."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_CHILD), json.dumps(settings)],
        env={},
        pass_fds=[settings["verdict"]],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        _, error = process.communicate(given, None if math.isinf(timeout_s) else timeout_s)
    except subprocess.TimeoutExpired:
        error = f"it was not ready within {_SETUP_S:g} s".encode()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the program is in the namespace that ends with it
        process.communicate()
    return error.decode(errors="replace").strip()


@lru_cache(maxsize=1)
def check_sandbox() -> None:
    """Raises ConfigError where untrusted code cannot be run as this file says."""
    reason = "" if sys.platform == "linux" else f"it needs Linux, this is {sys.platform}"
    try:
        if not reason and not passes("answer = 42", ["assert answer == 42"], Limits(30.0, 8.0)):
            reason = f"Python in {sys.base_prefix} does not run there"
    except RewardError as error:
        reason = str(error)
    if reason:
        raise ConfigError(
            f"the reward python_tests would run what the model writes without protection: {reason}. It needs "
            "Linux 5.12 or later, and the right to make namespaces: root with CAP_SYS_ADMIN in a container, or user "
            "namespaces (sysctl kernel.unprivileged_userns_clone, user.max_user_namespaces, "
            "kernel.apparmor_restrict_unprivileged_userns). Or score on a server of your own, --hybrid-reward http://..."
        )
