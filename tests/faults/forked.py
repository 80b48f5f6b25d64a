"""Runs of several ranks, forked from one process that has torch and Megatron imported: seconds each, not half a minute.

    with nursery() as ask:                            one process that imports, and then only forks
        ends = ask(folder, name, flags, size, trap)   a run of `size` ranks; how each of them ended

A rank is a process like any other: of its own session, with its own MASTER_PORT and log. Linux and gloo only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_hybrid.runtime.spawn import free_port

LONGEST_S = 240.0
"""A run that takes longer hangs: its ranks are killed, and say so by their code."""
PATIENCE_S = 60.0
"""As a launcher does: ranks that do not end after another has failed are killed; those that are stopped, at once."""

Trap = Callable[[int], contextlib.AbstractContextManager[Any]]
"""Made around the run of each rank, from its number: what makes it die or hang. Must be importable by name."""


@dataclass(frozen=True)
class Ends:
    """How a run ended."""

    codes: tuple[int, ...]
    """Exit code of each rank; negative: the signal."""
    seconds: float
    logs: tuple[str, ...]
    """What each rank has said."""
    left: tuple[int, ...]
    """Processes that its ranks had started and that outlived them all by half a minute."""


@contextlib.contextmanager
def nursery() -> Iterator[Callable[..., Ends]]:
    """A process that makes runs."""
    spawn = get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(theirs,))
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    process.start()
    theirs.close()
    if before is None:
        del os.environ["OMP_NUM_THREADS"]

    def ask(folder: Path, name: str, flags: dict[str, Any], size: int, trap: Any = None, **more: Any) -> Ends:
        ours.send((str(folder), name, flags, size, trap, more))
        return ours.recv()  # type: ignore[no-any-return]

    try:
        yield ask
    finally:
        ours.close()
        process.join(timeout=10)
        process.kill()


def _serve(pipe: Connection) -> None:
    import importlib

    for slow in (
        "torch",
        "megatron.training.training",
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
        "megatron.core.tokenizers.text",
        "transformers.models.auto.tokenization_auto",
        "megatron_hybrid.train.loop",
        "megatron_hybrid.train.plots",
        "megatron_hybrid.train.pretrain",
        "tests.online_jobs",
    ):
        importlib.import_module(slow)  # none of them starts a thread, so a fork copies none
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            return
        pipe.send(_run(*asked))


def _run(folder: str, name: str, flags: dict[str, Any], size: int, trap: Any, more: dict[str, Any]) -> Ends:
    port, started = free_port(), time.monotonic()
    logs = [Path(folder, f"{name}.rank{rank}.log") for rank in range(size)]
    pids = [os.fork() or _rank(folder, flags, rank, size, port, logs[rank], trap, more) for rank in range(size)]
    codes: dict[int, int] = {}
    helpers: set[int] = set()
    looked = failed = started
    while len(codes) < size:
        now = time.monotonic()
        if now - looked > 0.5:
            looked, helpers = now, helpers.union(*(_children(pid) for pid in pids if pid not in codes))
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in pids:
            codes[pid] = os.waitstatus_to_exitcode(status)
            failed = now if any(codes.values()) else failed
        elif hopeless := [
            pid
            for pid in set(pids) - codes.keys()
            if now - started > LONGEST_S or (any(codes.values()) and (now - failed > PATIENCE_S or _state(pid) == "T"))
        ]:
            for pid in hopeless:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)
        else:
            time.sleep(0.1)
    took = time.monotonic() - started
    deadline = time.monotonic() + 30  # a helper that was being started when its rank died first has to start
    while (left := [pid for pid in helpers if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    said = tuple(log.read_text(errors="replace") for log in logs)
    return Ends(tuple(codes[pid] for pid in pids), took, said, tuple(left))


def _rank(
    folder: str, flags: dict[str, Any], rank: int, size: int, port: int, log: Path, trap: Any, more: dict[str, Any]
) -> int:
    """The rest of a rank's life, as under a launcher."""
    import sys

    code = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        from tests.online_jobs import run

        with trap(rank) if trap is not None else contextlib.nullcontext():
            run(folder, flags, **more)
        code = 0
    except BaseException as error:
        import traceback

        traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        import atexit
        import multiprocessing.util

        multiprocessing.util._exit_function()  # type: ignore[attr-defined]
        atexit._clear()
        os._exit(code)


def _children(pid: int) -> list[int]:
    import psutil

    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


def _runs(pid: int) -> bool:
    """False for a zombie too."""
    return _state(pid) not in ("Z", None)


def _state(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return None
