"""What no implementation goes below: the bytes that the op must move, at this machine's bandwidth and at an H100's.

The op reads both shards twice (statistics, then the gradient) and writes the gradient once: five times the student's
logits with a teacher, three times without. What an H100 would take is computed from these bytes, not measured.
"""

import statistics
import time
from collections.abc import Callable

import torch
from bench_measure import ALL, DTYPES, KL, POLICY, Record

H100_BYTES_PER_S = 3.35e12
"""HBM3 of an H100 SXM, from its data sheet."""
_PASSES = {ALL.name: 5, KL.name: 5, POLICY.name: 3}


def op_bytes(record: Record) -> float:
    """Least that a contender of this job moves in two passes over the logits."""
    return _PASSES[record.job] * record.tokens * record.vocab * DTYPES[record.dtype].itemsize


def bandwidth() -> dict[str, float]:
    """Bytes per second of this machine now, all threads."""
    size = 1 << 24  # 64 MB each: beyond the caches of most machines
    source, factor, out = torch.ones(size), torch.ones(size), torch.empty(size)
    forms: dict[str, tuple[int, Callable[[], object]]] = {
        "copy": (2, lambda: out.copy_(source)),
        "triad": (3, lambda: torch.add(source, factor, alpha=3.0, out=out)),
    }
    result = {}
    for name, (passes, run) in forms.items():
        times = []
        for _ in range(8):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        result[name] = passes * 4 * size / statistics.median(times[1:])
    return result


def h100_s(tokens: int, vocab: int, dtype: str, tp: int = 1) -> float:
    """Seconds that the op's bytes take at an H100's peak bandwidth: COMPUTED."""
    return _PASSES[ALL.name] * tokens * vocab / tp * DTYPES[dtype].itemsize / H100_BYTES_PER_S
