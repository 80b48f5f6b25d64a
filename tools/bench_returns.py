"""Cost-to-go: our doubling scan beside a loop over positions and a matrix of discounts, forward only.

All give sum over t' > t of gamma^(t' - t) c_t' for costs [b, s] fp32. The judge is the loop in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from bench_logits import exponent
from bench_measure import Contender, Job, Record, measure
from torch import Tensor

from megatron_hybrid.returns.returns_to_go import cost_to_go

DISCOUNT = 0.99
RETURNS = Job("cost-to-go", 0.0, 0.0)


@dataclass(frozen=True)
class Costs:
    """[b, s] fp32, every token counts."""

    costs: Tensor
    mask: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return ()


def loop(costs: Tensor) -> Tensor:
    """From the last position to the first."""
    future, running = torch.empty_like(costs), torch.zeros_like(costs[:, 0])
    for t in reversed(range(costs.shape[1])):
        future[:, t] = DISCOUNT * running
        running = costs[:, t] + DISCOUNT * running
    return future


def matrix(costs: Tensor) -> Tensor:
    """One product with the [s, s] triangle of discounts."""
    position = torch.arange(costs.shape[1])
    distance = position.unsqueeze(1) - position
    return costs @ torch.where(distance > 0, DISCOUNT ** distance.clamp(min=0).float(), 0.0)


def table(rows: int, lengths: list[int], repeats: int, say: Callable[[str, float], None]) -> list[Record]:
    """Every form at every length; `extra` of the longest holds the growth's exponent over the lengths."""

    def given(result: Tensor, _: Costs) -> tuple[Tensor, ...]:
        return (result,)

    contenders = [
        Contender("ours, cost_to_go", RETURNS, lambda p: cost_to_go(p.costs, p.mask, DISCOUNT), given),
        Contender("loop over positions", RETURNS, lambda p: loop(p.costs), given),
        Contender("matrix of discounts", RETURNS, lambda p: matrix(p.costs), given),
    ]
    records: list[Record] = []
    for length in lengths:
        costs = torch.rand(rows, length, generator=torch.Generator().manual_seed(0))
        expected = loop(costs.double())
        records += measure(
            contenders,
            Costs(costs, torch.ones_like(costs, dtype=torch.bool)),
            lambda who, length=length: Record(who.name, who.job.name, "returns", "fp32", 1, 0, length),
            lambda _, got, want=expected: ((got[0].double() - want).abs().max() / want.abs().max()).item(),
            repeats,
            unit_bytes=costs.numel() * 4,
            say=lambda text, cost, length=length: say(f"cost-to-go, {length} positions: {text}", cost / 4),
        )
    for who in contenders:
        mine = [record for record in records if record.name == who.name]
        times = [record.time_s for record in mine if record.time_s is not None]
        if len(times) > 1:
            mine[-1].extra["exponent"] = exponent([record.tokens for record in mine], times)
    return records
