"""Signals that ask a job to stop, kept from the helper process of Megatron's checkpoint writer.

The writer starts it at the first save of a process and keeps it. Launchers signal all processes of a rank, the rank
answers by saving once more (--exit-signal-handler), and without its helper that save breaks. So every save of a run
happens inside this block, whichever comes first: Megatron's own, a copy of the student, weights for a server.
"""

import contextlib
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker

_FROM_LAUNCHERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@contextlib.contextmanager
def helpers_deaf_to_launchers() -> Iterator[None]:
    """Processes that are started inside never see the signals that ask a job to stop; this one sees them afterwards."""
    resource_tracker.ensure_running()  # where it starts later it lets SIGTERM and SIGINT through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FROM_LAUNCHERS)  # processes inherit what is blocked
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
