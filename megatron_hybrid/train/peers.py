"""Where every rank of a job is, so that the end of one is told by all others in one sentence.

    a rank enters a stage       one entry in the store that torch.distributed has anyway: number, step, stage, who; and
                                a look at that of rank 0, where rank 0 keeps the store
    a rank fails                it adds with what; if its collectives broke off, it looks who else has not said a word

A collective that breaks off knows an address at best, and one that times out nobody: but the ranks that waited in it
say so, each in its own entry, and whoever died or hangs does not. Of those that are silent, the ones that are furthest
behind are named; on this host it is also known whether the process still exists. NCCL ends a process from a thread of
its own, without an exception: there a thread says the same shortly before.
No collectives. Not here: ending the ranks that hang, which is for the launcher (torchrun, srun).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_hybrid.errors import HybridError, PeerError

logger = logging.getLogger(__name__)

GRACE_S = 3.0
"""How long a rank whose collectives broke off waits for the others' words: they notice within the same moment."""
_STORE_TIMEOUT = timedelta(seconds=5)
_BROKEN_OFF = re.compile(r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|Timed out waiting", re.IGNORECASE)


@dataclass(frozen=True)
class Entry:
    """What a rank has said of itself."""

    number: int
    """Stages it has entered: every rank goes through the same ones."""
    step: int
    stage: str
    since: float
    host: str
    pid: int
    space: str
    """Within which `pid` is one process: boot and namespace."""
    error: str | None = None
    """It has ended with this; "" where its collectives broke off, which is no cause of its own."""

    @property
    def place(self) -> str:
        return f"stage {self.stage} of step {self.step}"


class Peers:
    """This rank's entry, and the reading of the others'. Torch's process group must be there.

    timeout_s   seconds after which a collective that hangs breaks off
    by_itself   it then ends the process without an exception, as under NCCL
    """

    def __init__(self, *, timeout_s: float, by_itself: bool) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # A connection of its own: the group's may be in a wait of minutes when it is needed.
        self._store = dist.distributed_c10d._get_default_store().clone()
        self._store.set_timeout(_STORE_TIMEOUT)
        self._entry = Entry(0, 0, "start", time.time(), socket.gethostname(), os.getpid(), _space())
        self._keeper = "rank 0" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" else "the launcher"
        self._keepers: Entry | None = None
        """The last word of a rank that keeps the store, which nobody can read any more once it has died."""
        self._write()
        if by_itself and self.size > 1:
            threading.Thread(target=self._warn, args=(0.8 * timeout_s,), name="peers", daemon=True).start()

    def enter(self, step: int, stage: str) -> None:
        """This rank begins a stage of the step."""
        self._entry = replace(self._entry, number=self._entry.number + 1, step=step, stage=stage, since=time.time())
        with contextlib.suppress(RuntimeError):  # a store that is slow or lost ends no run by itself
            self._write()
            if self._keeper == "rank 0" and self.rank > 0 and self._known(_key(0)):
                self._keepers = _entry(self._store.get(_key(0)))

    def failed(self, error: BaseException) -> PeerError | None:
        """To be called with what ended this rank; the sentence that explains it where another rank is the cause."""
        if self.size == 1:
            return None
        broken_off = is_broken_off(error)
        said = "" if broken_off else f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        self._entry = replace(self._entry, error=said)
        try:
            self._write()
            return PeerError(self._cause()) if broken_off else None
        except RuntimeError:  # torch's own errors are some; which one differs by how the store was lost
            if not broken_off:
                return None
            seen = f", last seen in {self._keepers.place}" if self._keepers is not None else ""
            return PeerError(
                f"rank {self.rank} waited in {self._entry.place}, and {self._keeper} is dead or stopped{seen}: the "
                f"store that it kept for the job does not answer. Its log may have last words. {_ADVICE}"
            )

    def _write(self) -> None:
        self._store.set(_key(self.rank), json.dumps(asdict(self._entry)))

    def _read(self) -> dict[int, Entry]:
        """Every rank's last word; without those that have not said one."""
        keys = {rank: _key(rank) for rank in range(self.size)}
        there = keys if self._store.check(list(keys.values())) else {r: k for r, k in keys.items() if self._known(k)}
        found = self._store.multi_get(list(there.values()))
        return {rank: _entry(text) for rank, text in zip(there, found, strict=True)}

    def _known(self, key: str) -> bool:
        return bool(self._store.check([key]))

    def _cause(self) -> str:
        # Whoever keeps the store stays until the others, whose collectives break off with its own, have read it.
        deadline = time.monotonic() + (3 if self._keeper == f"rank {self.rank}" else 1) * GRACE_S
        while True:
            entries = self._read()
            silent = [rank for rank in range(self.size) if rank not in entries or entries[rank].error is None]
            certain = any(entry.error for entry in entries.values())
            if certain or not silent or time.monotonic() > deadline:
                return explanation(self.rank, self.size, entries)
            time.sleep(0.1)

    def _warn(self, patience_s: float) -> None:
        warned = 0
        while True:
            time.sleep(min(1.0, patience_s / 4))
            entry = self._entry
            if time.time() - entry.since < patience_s or warned == entry.number or entry.error is not None:
                continue
            warned = entry.number
            try:
                logger.error("%s", explanation(self.rank, self.size, self._read()))
            except RuntimeError:
                logger.error("rank %d waits in %s, and the job's store is lost", self.rank, entry.place)


def is_broken_off(error: BaseException) -> bool:
    """Whether a collective ended, and nothing of this rank's own: torch has a class for some of its ways only."""
    if isinstance(error, HybridError):
        return False
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _BROKEN_OFF.search(str(error)) is not None
    )


_ADVICE = "The ranks stop; started again, the run goes on from its last checkpoint."


def explanation(rank: int, size: int, entries: Mapping[int, Entry], *, now: float | None = None) -> str:
    """Why this rank's collective breaks off or hangs, from what every rank has said last."""
    own = entries[rank]
    waited = f"rank {rank} waited in {own.place}"
    for other, entry in entries.items():
        if entry.error:
            return f"{waited}, and rank {other} had ended in {entry.place} with {entry.error} {_ADVICE}"
    silent = [other for other in range(size) if other != rank and (other not in entries or _is_silent(entries[other]))]
    gone = [other for other in silent if other in entries and _process(own, entries[other]) == "gone"]
    if gone:
        died = " and ".join(f"rank {other} ({_who(entries[other])}) in {entries[other].place}" for other in gone)
        return (
            f"{waited}, and its peer has died, {died}: the process is gone, by a signal (-9: often out of memory) or "
            f"an exit. {_ADVICE}"
        )
    if not silent:
        return f"{waited}, and so did every other rank: what broke is between them, the network or a timeout. {_ADVICE}"
    unknown = [other for other in silent if other not in entries]
    if unknown:
        return f"{waited}, and {_named(unknown)} had not come as far as the first step. {_ADVICE}"
    least = min(entries[other].number for other in silent)
    behind = [other for other in silent if entries[other].number == least]
    seconds = (time.time() if now is None else now) - entries[behind[0]].since
    processes = {_process(own, entries[other]) for other in behind}
    known = len(processes) == 1 and "unknown" not in processes
    state = f"its process is {processes.pop()}" if known else "dead or hung"
    return (
        f"{waited}, and {_named(behind)} ({_who(entries[behind[0]])}) did not come: last seen entering "
        f"{entries[behind[0]].place}, {seconds:.0f} s ago, {state}. {_ADVICE}"
    )


def _entry(text: bytes) -> Entry:
    return Entry(**json.loads(text))


def _is_silent(entry: Entry) -> bool:
    return entry.error is None


def _named(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"one of ranks {', '.join(map(str, ranks))}"


def _who(entry: Entry) -> str:
    return f"pid {entry.pid} on {entry.host}"


def _process(own: Entry, other: Entry) -> str:
    """What is known of another rank's process from here: gone, stopped, running; unknown on another machine."""
    if own.space != other.space:
        return "unknown"
    try:
        state = Path(f"/proc/{other.pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return "gone" if Path("/proc/self/stat").exists() else "unknown"
    return {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped"}.get(state, "running")


def _space() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


def _key(rank: int) -> str:
    return f"hybrid/peers/{rank}"


def collective_timeout_s(args: Any) -> float:
    """Seconds that Megatron lets a rank wait for the others, after its first step."""
    after_start: int | None = args.distributed_timeout_seconds_after_init
    return 60.0 * args.distributed_timeout_minutes if after_start is None else float(after_start)
