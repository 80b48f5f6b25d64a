"""A vocabulary split over ranks: real processes with gloo, one thread each; time, memory, error and what is sent.

Ranks beyond the tensor-parallel size do nothing, so that one pool of ranks serves every size. On fewer cores than ranks
the times are those of ranks that take turns: they compare contenders, not sizes.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import bench_peers
import torch.distributed as dist
from bench_contenders import Judge, Logits, contenders
from bench_measure import Contender, Record, measure
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_hybrid.runtime.spawn import RankPool

_HANDED_OVER = {
    "allreduce_": 0,
    "broadcast_": 0,
    "allgather_": 1,
    "_allgather_base_": 1,
    "reduce_scatter_": 1,
    "_reduce_scatter_base_": 1,
    "alltoall_": 1,
    "alltoall_base_": 1,
}
"""Which argument of an operator of torch.distributed holds what the rank hands over."""


class Collectives(TorchDispatchMode):
    """Counts what goes through torch.distributed, whichever function of it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.sent_bytes = 0, 0
        self.kinds: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function._schema.name.split("::")[1]
            tensors = args[_HANDED_OVER[name]]
            tensors = tensors if isinstance(tensors, list | tuple) else [tensors]
            self.count += 1
            self.kinds[name.strip("_")] += 1
            self.sent_bytes += sum(x.numel() * x.element_size() for x in tensors)
        return function(*args, **(kwargs or {}))


def single_rank() -> None:
    """This process as the only rank of Megatron's groups, which some peers ask for at any size."""
    if bench_peers.want_groups():
        from megatron.core import parallel_state

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel(1)


def tables(
    sizes: list[int],
    shapes: list[tuple[int, int]],
    dtypes: list[str],
    repeats: int,
    peers: Path | None,
    say: Callable[[str, float], None],
) -> Iterator[list[Record]]:
    """For every size, type and (tokens, vocabulary); the slowest rank's time, the largest memory and error of any."""
    say(f"starting {max(sizes)} ranks", 15.0)
    with RankPool(max(sizes)) as pool:
        for tp in sizes:
            for dtype in dtypes:
                for tokens, vocab in shapes:
                    say(f"TP {tp}, {dtype}, vocabulary {vocab}", 4.0 * tp)
                    by_rank = pool.run(_on_rank, tp, tokens, vocab, dtype, repeats, peers)[:tp]
                    yield [_slowest(rows) for rows in zip(*by_rank, strict=True)]


def _on_rank(tp: int, tokens: int, vocab: int, dtype: str, repeats: int, peers: Path | None) -> list[Record]:
    """This rank's records."""
    if peers is not None:
        bench_peers.use(peers)
    group, rank = dist.new_group(list(range(tp))), dist.get_rank()
    if bench_peers.want_groups():
        from megatron.core import parallel_state

        parallel_state.initialize_model_parallel(tp)
        group = parallel_state.get_tensor_model_parallel_group()
    if rank >= tp:
        return []
    whole = Logits.draw(tokens, vocab, dtype)
    problem, judge = whole.shard(rank, tp, group), Judge(whole, rank, tp)
    with redirect_stderr(StringIO()):  # every rank would print what peers warn about at import
        taking_part = contenders(tp)
    records = measure(
        taking_part,
        problem,
        lambda who: Record(who.name, who.job.name, "parallel", dtype, tp, vocab, tokens),
        judge.error,
        repeats,
        unit_bytes=problem.unit_bytes,
        say=lambda text, cost: None,
        wait=lambda: dist.barrier(group),
    )
    for who, record in zip(taking_part, records, strict=True):
        if record.time_s is not None:
            record.collectives, record.sent_bytes, record.extra["kinds"] = _sent(who, problem)
    return records


def _sent(who: Contender, problem: Logits) -> tuple[int, float, dict[str, int]]:
    """(collectives, bytes per token, collectives by kind) of one forward and backward."""
    assert who.forward is not None
    with Collectives() as seen:
        who.backward(who.forward(problem), problem)
    return seen.count, seen.sent_bytes / len(problem.target), dict(seen.kinds)


def _slowest(ranks: tuple[Record, ...]) -> Record:
    """One record for all ranks: the largest of every number."""

    def largest(name: str) -> Any:
        values = [getattr(record, name) for record in ranks if getattr(record, name) is not None]
        return max(values, default=None)

    names = ("forward_s", "backward_s", "memory_bytes", "memory", "error", "collectives", "sent_bytes")
    return replace(ranks[0], **{name: largest(name) for name in names})
