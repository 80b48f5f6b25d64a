"""The layouts on which the gradient must be the same number: one table for the tests and for the README.

python -m tests.distributed.layouts        prints it with the errors measured now, in about three minutes
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.distributed.problem import Problem

TIED: dict[str, Any] = {}
UNTIED: dict[str, Any] = {"untie_embeddings_and_output_weights": True}
HEADS = {"tied": TIED, "untied": UNTIED}


@dataclass(frozen=True)
class Layout:
    """One way to lay a job out."""

    name: str
    num_ranks: int
    flags: dict[str, Any] = field(default_factory=dict)
    """Megatron's."""
    packed: bool = False
    """Sequences behind one another (THD) instead of padded rows."""


TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
VPP = {PP: 2, "num_virtual_stages_per_pipeline_rank": 2}
SP = {"sequence_parallel": True}
DISTRIBUTED = {"use_distributed_optimizer": True}

LAYOUTS = [
    Layout("one rank, micro-batches of 1", 1, {"micro_batch_size": 1}),
    Layout("one rank, micro-batches of 2", 1),
    Layout("one rank, micro-batches of 4", 1, {"micro_batch_size": 4}),
    Layout("one rank, packed", 1, {"micro_batch_size": 4}, packed=True),
    Layout("TP 2, padded vocabulary", 2, {TP: 2}),
    Layout("TP 2, sequence parallel", 2, {TP: 2} | SP),
    Layout("PP 2", 2, {PP: 2}),
    Layout("PP 2, interleaved", 2, VPP),
    Layout("PP 2, packed", 2, {PP: 2}, packed=True),
    Layout("DP 2", 2),
    Layout("DP 2, distributed optimizer", 2, DISTRIBUTED),
    Layout("CP 2", 2, {CP: 2}),
    Layout("CP 2, packed", 2, {CP: 2}, packed=True),
    Layout("TP 4, sequence parallel", 4, {TP: 4} | SP),
    Layout("PP 4", 4, {PP: 4}),
    Layout("TP 2 x PP 2", 4, {TP: 2, PP: 2}),
    Layout("TP 2 x PP 2, interleaved, sequence parallel", 4, {TP: 2} | VPP | SP),
    Layout("TP 2 x CP 2", 4, {TP: 2, CP: 2}),
    Layout("TP 2 x CP 2, sequence parallel, packed", 4, {TP: 2, CP: 2} | SP, packed=True),
    Layout("DP 2 x CP 2, distributed optimizer", 4, {CP: 2} | DISTRIBUTED),
    Layout("PP 2 x DP 2 x TP 2, sequence parallel, distributed optimizer", 8, {PP: 2, TP: 2} | SP | DISTRIBUTED),
]


def measured(pools: Callable[..., Any], layout: Layout, head: dict[str, Any], problem: Problem) -> dict[str, Any]:
    """The whole gradient of a problem on a layout."""
    from tests.distributed.gradient import gradient, whole

    ranks = pools(layout.num_ranks, init=False).run(quietly, gradient, head | layout.flags, problem, layout.packed)
    return whole(ranks)


def expected(pools: Callable[..., Any], head: dict[str, Any], problem: Problem) -> dict[str, Any]:
    """The float64 reference."""
    from tests.distributed.gradient import whole
    from tests.distributed.problem import reference

    return whole(pools(1, init=False).run(quietly, reference, head, problem))


def quietly(job: Callable[..., Any], *args: Any) -> Any:
    """A job without Megatron's log."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    return job(*args)


def main() -> None:
    """Prints the table as Markdown, one line at a time."""
    from megatron_hybrid.runtime.spawn import RankPool
    from tests.distributed.gradient import errors

    def report(text: str) -> None:
        print(text, flush=True)

    report("| layout | ranks | " + " | ".join(f"{name} embeddings" for name in HEADS) + " |")
    report("| :-- | --: |" + " --: |" * len(HEADS))
    problem = Problem()
    with RankPool(1, init=False) as one:
        truth = {name: expected(lambda size, init: one, head, problem) for name, head in HEADS.items()}
    for size in sorted({layout.num_ranks for layout in LAYOUTS}):
        with RankPool(size, init=False) as pool:
            for layout in [layout for layout in LAYOUTS if layout.num_ranks == size]:
                found = [
                    max(errors(measured(lambda size, init: pool, layout, head, problem), truth[name]).values())
                    for name, head in HEADS.items()
                ]
                report(f"| {layout.name} | {size} | " + " | ".join(f"{error:.1e}" for error in found) + " |")


if __name__ == "__main__":
    sys.exit(main())
