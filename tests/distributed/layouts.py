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

from tests.distributed.gradient import FP32
from tests.distributed.problem import Problem

TP, PP, CP, EP = (f"{axis}_parallel_size" for axis in ("tensor_model", "pipeline_model", "context", "expert_model"))
VPP = {PP: 2, "num_virtual_stages_per_pipeline_rank": 2}
SP = {"sequence_parallel": True}
DISTRIBUTED = {"use_distributed_optimizer": True}
ALL_TO_ALL = {"moe_token_dispatcher_type": "alltoall"}


@dataclass(frozen=True)
class Model:
    """What is trained."""

    flags: dict[str, Any] = field(default_factory=dict)
    """Megatron's."""
    staged: dict[str, Any] = field(default_factory=dict)
    """Those that differ on two pipeline stages."""
    tolerance: float = FP32
    bf16: bool = False
    """Compared with float64 at the weights as bf16 has them."""

    def on(self, layout: Layout) -> dict[str, Any]:
        """The whole command line."""
        return self.flags | (self.staged if PP in layout.flags else {}) | layout.flags


BF16 = 0.1
"""Of a parameter's largest gradient. A rounding to bf16 is up to 2**-9 = 0.2 % of a number; four layers make about 60
of them one after another, forward and backward, and their sum grows like the root: 1.5 %. The largest deviation of some
thousand entries is four times the typical one, 6 %, which is what is measured."""

MODELS = {
    "GPT, tied": Model(),
    "GPT, untied": Model({"untie_embeddings_and_output_weights": True}),
    "HybridModel": Model(
        {"hybrid_layer_pattern": "*-*-", "num_layers": None}, staged={"hybrid_layer_pattern": "*-|*-"}
    ),
    # The router's gradient is a difference of the chosen experts' outputs, which cancel: twice the usual roundings.
    "GPT, 4 experts": Model(
        {"num_experts": 4, "moe_router_topk": 2, "moe_router_load_balancing_type": "none"}, tolerance=2 * FP32
    ),
    "GPT in bf16": Model({"bf16": True}, tolerance=BF16, bf16=True),
}
GPT = ("GPT, tied", "GPT, untied")
EVERY = tuple(MODELS)


@dataclass(frozen=True)
class Layout:
    """One way to lay a job out."""

    name: str
    num_ranks: int
    flags: dict[str, Any] = field(default_factory=dict)
    """Megatron's."""
    packed: bool = False
    """Sequences behind one another (THD) instead of padded rows."""
    models: tuple[str, ...] = GPT


LAYOUTS = [
    Layout("one rank, micro-batches of 1", 1, {"micro_batch_size": 1}),
    Layout("one rank, micro-batches of 2", 1, models=EVERY),
    Layout("one rank, micro-batches of 4", 1, {"micro_batch_size": 4}),
    Layout("one rank, packed", 1, {"micro_batch_size": 4}, packed=True),
    Layout("TP 2, padded vocabulary", 2, {TP: 2}),
    Layout("TP 2, sequence parallel", 2, {TP: 2} | SP, models=EVERY),
    Layout("PP 2", 2, {PP: 2}, models=EVERY),
    Layout("PP 2, interleaved", 2, VPP),
    Layout("PP 2, packed", 2, {PP: 2}, packed=True),
    Layout("DP 2", 2),
    Layout("DP 2, distributed optimizer", 2, DISTRIBUTED, models=EVERY),
    Layout("CP 2", 2, {CP: 2}, models=EVERY),
    Layout("CP 2, packed", 2, {CP: 2}, packed=True),
    # Not the all-gather dispatcher: it wants the same number of tokens on every replica, and responses have their own.
    Layout("DP 2, EP 2, all-to-all", 2, {EP: 2} | ALL_TO_ALL, models=("GPT, 4 experts",)),
    Layout("TP 4, sequence parallel", 4, {TP: 4} | SP),
    Layout("PP 4", 4, {PP: 4}),
    Layout("TP 2 x PP 2", 4, {TP: 2, PP: 2}),
    Layout("TP 2 x PP 2, interleaved, sequence parallel", 4, {TP: 2} | VPP | SP),
    Layout("PP 2 x CP 2, interleaved", 4, {CP: 2} | VPP),
    Layout("TP 2 x CP 2", 4, {TP: 2, CP: 2}),
    Layout("TP 2 x CP 2, sequence parallel, packed", 4, {TP: 2, CP: 2} | SP, packed=True),
    Layout("DP 2 x CP 2, distributed optimizer", 4, {CP: 2} | DISTRIBUTED),
    Layout("PP 2 x DP 2 x TP 2, sequence parallel, distributed optimizer", 8, {PP: 2, TP: 2} | SP | DISTRIBUTED),
]


def measured(pools: Callable[..., Any], layout: Layout, model: Model, problem: Problem) -> dict[str, Any]:
    """The whole gradient of a problem on a layout."""
    from tests.distributed.gradient import gradient, whole

    flags = model.on(layout)
    return whole(pools(layout.num_ranks, init=False).run(quietly, gradient, flags, problem, layout.packed))


def expected(pools: Callable[..., Any], model: Model, problem: Problem) -> dict[str, Any]:
    """The float64 reference."""
    from tests.distributed.gradient import whole
    from tests.distributed.problem import reference

    # The reference computes in float64 whatever the model's own type is.
    flags = {name: value for name, value in model.flags.items() if name != "bf16"}
    return whole(pools(1, init=False).run(quietly, reference, flags, problem, model.bf16))


def quietly(job: Callable[..., Any], *args: Any) -> Any:
    """A job without Megatron's log; the rank's next job has it again."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return job(*args)
    finally:
        logging.disable(logging.NOTSET)


def main() -> None:
    """Prints the table as Markdown, one line at a time."""
    from megatron_hybrid.runtime.spawn import RankPool
    from tests.distributed.gradient import errors

    def report(text: str) -> None:
        print(text, flush=True)

    report("| layout | ranks | " + " | ".join(MODELS) + " |")
    report("| :-- | --: |" + " --: |" * len(MODELS))
    problem = Problem()
    with RankPool(1, init=False) as one:
        truth = {name: expected(lambda size, init: one, model, problem) for name, model in MODELS.items()}
    for size in sorted({layout.num_ranks for layout in LAYOUTS}):
        with RankPool(size, init=False) as pool:
            for layout in [layout for layout in LAYOUTS if layout.num_ranks == size]:
                cells = []
                for name, model in MODELS.items():
                    if name not in layout.models:
                        cells.append("")
                        continue
                    found = errors(measured(lambda size, init: pool, layout, model, problem), truth[name])
                    cells.append(f"{max(found.values()):.1e}")
                report(f"| {layout.name} | {size} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    sys.exit(main())
