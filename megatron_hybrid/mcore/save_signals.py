"""The helper process of Megatron's checkpoint writer: kept from signals that ask a job to stop, ended with its rank.

The writer starts it at the first save of a process and keeps it. Launchers signal all processes of a rank, the rank
answers by saving once more (--exit-signal-handler), and without its helper that save breaks. A rank that is killed
would leave it behind, one at every restart. So every save of a run happens inside this block, whichever comes first:
Megatron's own, a copy of the student, weights for a server.
"""

import contextlib
import importlib
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import get_context, resource_tracker
from multiprocessing.managers import SyncManager
from typing import Any

from megatron_hybrid.runtime.spawn import wait_for_the_end_of_the_parent

_FROM_LAUNCHERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@contextlib.contextmanager
def helper_of_the_writer() -> Iterator[None]:
    """The helper is there, and neither it nor another process that is started inside ever sees the signals that ask a
    job to stop; this one sees them afterwards, or at once where another of its threads takes them."""
    resource_tracker.ensure_running()  # where it starts later it lets SIGTERM and SIGINT through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FROM_LAUNCHERS)  # processes inherit what is blocked
    try:
        _start_helper()
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_helper() -> None:
    """What the writer would start itself, a queue in a process of its own; one that ends with this one."""
    writer: Any = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    if writer._results_queue is None:
        manager = SyncManager(ctx=get_context("spawn"))
        manager.start(initializer=_end_with_parent)
        writer._results_queue = manager.Queue()  # which keeps its manager


def _end_with_parent() -> None:
    def watch() -> None:
        wait_for_the_end_of_the_parent()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
