"""What a call allocates at most at once, by torch's own record of its allocator: temporaries inside operations, too."""

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes on the CPU that the call held at once, beyond those that it found."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = call()
    results = seen.profiler.kineto_results  # type: ignore[union-attr]
    changes = sorted(
        ((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"),
        key=lambda change: change[0],
    )
    assert changes, "torch recorded no allocation, so this sees nothing"
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    del result  # freed only after the record, whatever it is
    return most
