"""Credit over two real context-parallel ranks: the numbers of one rank, with one collective at most."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_hybrid.errors import ShapeError
from megatron_hybrid.metrics import Metrics
from megatron_hybrid.records import TokenStats
from megatron_hybrid.returns.corrections import Correction, finish_metrics
from megatron_hybrid.returns.returns_to_go import cost_to_go
from megatron_hybrid.returns.weights import make_weigh
from tests.ranks import Ranks
from tests.returns.zigzag import positions_of

Pools = Callable[..., Ranks]
LENGTH, ROWS = 16, 4
Job = dict[str, Any]


def problem(*, last: int = LENGTH, forbidden: bool = False) -> Job:
    """Responses with gaps, of uneven length, all before position `last`; two groups of two; rollouts of another mu."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(ROWS, LENGTH, generator=generator) < 0.8
    mask[:, :2] = False
    mask[:, last:] = False
    mask[1, last // 2 :] = False
    row, position = mask.nonzero(as_tuple=True)

    def per_token() -> Tensor:
        return torch.randn(len(row), generator=generator)

    kl, log_prob, teacher_log_prob, entropy = per_token().abs(), -per_token().abs(), -per_token().abs(), per_token()
    if forbidden:
        kl[len(kl) // 3] = torch.inf
    return {
        "stats": torch.stack((kl, log_prob, teacher_log_prob, entropy)),
        "row": row,
        "position": position,
        "sampled_logprobs": log_prob + 0.3 * per_token(),
        "reward_advantage": torch.randn(ROWS, generator=generator),
        "group_id": torch.arange(ROWS) // 2,
    }


def credit_of(job: Job, mine: Tensor, group: Any, **options: Any) -> tuple[Tensor, Tensor, Metrics]:
    """Both weights of the tokens `mine`, and the metrics they left."""
    metrics = Metrics()
    weigh = make_weigh(
        reward_advantage=job["reward_advantage"],
        row_of_token=job["row"][mine],
        position_of_token=job["position"][mine],
        num_positions=LENGTH,
        reward_weight=1.0,
        sampled_logprobs=job["sampled_logprobs"][mine],
        cp_group=group,
        metrics=metrics,
        **({"discount": 0.9, "future_cost": "closed_form", "imitation_weight": 0.7} | options),
    )
    imitation, advantage = weigh(TokenStats(*job["stats"][:, mine]))
    return imitation, advantage, metrics


def on_rank(job: Job, options: dict[str, Any]) -> dict[str, Any]:
    """On each rank: its tokens' weights, in which order they are the job's, its collectives, the reduced metrics."""
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    mine = torch.isin(job["position"], positions_of(rank, ranks, LENGTH)).nonzero().squeeze(1)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        imitation, advantage, metrics = credit_of(job, mine, group, **options)
    names = [event.name for event in seen.events() or [] if event.name.startswith("c10d::")]
    reduced = metrics.reduce(group)
    return {"mine": mine, "weights": torch.stack((imitation, advantage)), "names": names, "metrics": reduced}


def joined(ranks: list[dict[str, Any]], job: Job) -> Tensor:
    together = torch.full((2, len(job["row"])), torch.nan)
    for rank in ranks:
        together[:, rank["mine"]] = rank["weights"]
    return together


EVERYTHING = {"group_id": torch.arange(ROWS) // 2, "correction": Correction("sequence_mask", 3.0, prefix=True)}
VARIANTS = [
    pytest.param({}, id="closed form"),
    pytest.param({"future_cost": "sampled", "group_id": torch.arange(ROWS) // 2}, id="sampled, group baseline"),
    pytest.param({"correction": Correction("sequence_truncate", 1.5, prefix=True)}, id="sequence weights"),
    pytest.param({"correction": Correction("ppo_clip")}, id="PPO"),
    pytest.param(EVERYTHING, id="everything"),
]


@pytest.mark.parametrize("options", VARIANTS)
def test_two_ranks_give_the_credit_of_one_bit_for_bit(rank_pool: Pools, options: dict[str, Any]):
    job = problem()
    alone = credit_of(job, torch.arange(len(job["row"])), None, **options)
    ranks = rank_pool(2).run(on_rank, job, options)
    assert torch.equal(joined(ranks, job), torch.stack(alone[:2]))
    expected = alone[2].reduce()
    for rank in ranks:
        assert rank["names"] == ["c10d::allreduce_"]
        assert rank["metrics"] == pytest.approx(expected, rel=1e-12)  # fp64 sums in another order
    finish_metrics(expected)
    assert 0 < expected["rollout_corr/rollout_is_eff_sample_size"] <= 1


def test_a_rank_without_tokens_takes_part(rank_pool: Pools):
    job = problem(last=LENGTH // 4)  # chunk 0 alone: rank 1 holds chunks 1 and 2
    ranks = rank_pool(2).run(on_rank, job, EVERYTHING)
    assert [len(rank["mine"]) for rank in ranks] == [len(job["row"]), 0]
    assert torch.equal(
        joined(ranks, job), torch.stack(credit_of(job, torch.arange(len(job["row"])), None, **EVERYTHING)[:2])
    )
    assert ranks[0]["metrics"].keys() == ranks[1]["metrics"].keys()


def test_an_infinite_cost_on_another_rank_is_as_infinite_as_ones_own(rank_pool: Pools):
    job = problem(forbidden=True)
    expected = torch.stack(credit_of(job, torch.arange(len(job["row"])), None, **EVERYTHING)[:2])
    assert torch.equal(joined(rank_pool(2).run(on_rank, job, EVERYTHING), job), expected)
    assert expected.isfinite().all()


@pytest.mark.parametrize("options", [{"discount": 0.0}, {"imitation_weight": 0.0}])
def test_nothing_is_sent_where_no_token_looks_at_another(rank_pool: Pools, options: dict[str, Any]):
    job = problem()
    ranks = rank_pool(2).run(on_rank, job, options | {"correction": Correction("token_truncate")})
    assert [rank["names"] for rank in ranks] == [[], []]


PACKED = [[8, 4, 16, 4], [4, 4, 4, 20], [32]]
"""Lengths of the sequences packed into each row."""


def packed_positions_of(rank: int, ranks: int) -> Tensor:
    """[rows, s/cp]: positions that lie on this rank where each packed sequence is cut on its own."""
    rows = []
    for lengths in PACKED:
        starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
        rows.append(
            torch.cat([start + positions_of(rank, ranks, n) for start, n in zip(starts, lengths, strict=False)])
        )
    return torch.stack(rows)


def cost_to_go_of_rank(costs: Tensor, mask: Tensor, segments: Tensor, discount: float) -> list[Tensor]:
    """On each rank: its slice of the future, without and with packed sequences."""
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    own = positions_of(rank, ranks, costs.shape[1])
    plain = cost_to_go(costs[:, own], mask[:, own], discount, cp_group=group)
    packed = packed_positions_of(rank, ranks)
    mine = (values.gather(1, packed) for values in (costs, mask))
    return [plain, cost_to_go(*mine, discount, segments.gather(1, packed), cp_group=group)]


@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
def test_cost_to_go_of_zigzag_slices_is_the_slice_of_the_whole(rank_pool: Pools, discount: float):
    costs, mask = torch.randn(3, 32), torch.rand(3, 32) < 0.7
    costs[0, 20], mask[0, 20] = torch.inf, True
    segments = torch.stack(
        [torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)) for lengths in PACKED]
    )
    whole = [cost_to_go(costs, mask, discount), cost_to_go(costs, mask, discount, segments)]
    for rank, slices in enumerate(rank_pool(2).run(cost_to_go_of_rank, costs, mask, segments, discount)):
        own = [positions_of(rank, 2, 32).expand(3, -1), packed_positions_of(rank, 2)]
        for ours, expected, places in zip(slices, whole, own, strict=True):
            assert torch.equal(ours, expected.gather(1, places))


def odd_slices() -> str:
    """On each rank: what is said of slices that are no two chunks."""
    with pytest.raises(ShapeError) as error:
        cost_to_go(torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool), 1.0, cp_group=dist.group.WORLD)
    return str(error.value)


def test_slices_that_do_not_halve_are_refused(rank_pool: Pools):
    assert all("multiple of 4" in said for said in rank_pool(2).run(odd_slices))
