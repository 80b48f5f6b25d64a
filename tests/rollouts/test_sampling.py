"""Draws follow softmax(logits / T) over the true vocabulary, and vocabulary shards draw as the whole one does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_hybrid.parallel import GroupView
from megatron_hybrid.rollouts.sampling import sample_tokens

ALONE = GroupView()
GRID = 20_000
INF = float("inf")
EDGES = torch.tensor([0.0, 0.999999, 1 - 2**-53], dtype=torch.float64)
"""Both ends of the noise; the last is the largest number below 1, and rounds to 1 in fp32."""


def grid(count: int = GRID) -> Tensor:
    """The middles of `count` equal parts of [0, 1): probability p gives count * p draws, give or take one."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def draw(
    logits: Tensor, uniform: Tensor, *, temperature: float = 1.0, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """One row of logits, drawn from with every uniform number."""
    rows = logits.expand(len(uniform), -1)
    return sample_tokens(rows, uniform, temperature=temperature, vocab_size=vocab_size or len(logits), tp=ALONE)


def test_two_tokens_by_hand():
    logits = torch.tensor([0.75, 0.25]).log()
    drawn, log_prob = draw(logits, torch.tensor([0.0, 0.74, 0.76, 0.999999], dtype=torch.float64))
    assert drawn.tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(log_prob.exp(), torch.tensor([0.75, 0.75, 0.25, 0.25]))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("offset", [0.0, 300.0, -300.0])
def test_frequencies_and_log_probs_are_those_of_the_softmax(temperature, offset):
    logits = 2 * torch.randn(40) + offset
    drawn, log_prob = draw(logits, grid(), temperature=temperature)
    expected = torch.log_softmax(logits.double() / temperature, dim=-1)
    counts = torch.bincount(drawn, minlength=40)
    # Two edges of the interval, each off by at most one grid point, and by fp32's rounding of the cumulative sum.
    assert (counts - GRID * expected.exp()).abs().max() < 2.1
    # Logits of 300 / T are rounded to 3e-5 before the softmax sees them; without an offset 1e-6 would do.
    torch.testing.assert_close(log_prob.double(), expected[drawn], rtol=0, atol=2e-6 if offset == 0 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_read_in_fp32(dtype):
    logits = torch.randn(40).to(dtype)
    _, log_prob = draw(logits, grid(1000), temperature=0.7)
    drawn, expected = draw(logits.float(), grid(1000), temperature=0.7)
    assert torch.equal(log_prob, expected) and log_prob.dtype == torch.float32 and drawn.dtype == torch.int64


def test_logits_are_not_written():
    logits = torch.randn(3, 10)
    before = logits.clone()
    sample_tokens(logits, torch.rand(3), temperature=0.5, vocab_size=8, tp=ALONE)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("garbage", [100.0, INF, float("nan")])
def test_padded_columns_are_never_drawn_whatever_they_hold(garbage):
    logits = torch.cat([torch.randn(10), torch.full((6,), garbage)])
    drawn, log_prob = draw(logits, torch.cat([grid(), EDGES]), vocab_size=10)
    assert drawn.max() == 9
    assert torch.isfinite(log_prob).all()


@pytest.mark.parametrize("forbidden", [[0], [9], [0, 1, 8, 9], [3, 4, 5]])
def test_forbidden_columns_are_never_drawn_even_at_both_ends_of_the_noise(forbidden):
    logits = torch.randn(10)
    logits[forbidden] = -INF
    drawn, log_prob = draw(logits, torch.cat([grid(), EDGES]))
    assert not torch.isin(drawn, torch.tensor(forbidden)).any()
    assert torch.isfinite(log_prob).all()


@pytest.mark.parametrize("place", [0, 4, 9])
def test_a_logit_far_above_the_rest_is_always_drawn_with_log_prob_zero(place):
    logits = torch.full((10,), -1e30)
    logits[place] = 1e30
    drawn, log_prob = draw(logits, torch.cat([grid(100), EDGES]))
    assert (drawn == place).all()
    assert (log_prob == 0).all()


def test_rows_are_drawn_independently():
    logits = torch.eye(5) * 1000
    drawn, _ = sample_tokens(logits, torch.full((5,), 0.5), temperature=1.0, vocab_size=5, tp=ALONE)
    assert drawn.tolist() == [0, 1, 2, 3, 4]


# Vocabulary shards.

WIDTH = 12


def case(name: str) -> tuple[Tensor, int]:
    """Logits [2 * WIDTH] as two shards of WIDTH, and the true vocabulary."""
    generator = torch.Generator().manual_seed(5)
    logits = 2 * torch.randn(2 * WIDTH, generator=generator)
    if name == "second rank only padding":
        return logits, WIDTH - 2
    if name == "nothing allowed on the first rank":
        logits[:WIDTH] = -INF
    if name == "nothing allowed on the second rank":
        logits[WIDTH:] = -INF
    if name == "forbidden at the border":
        logits[WIDTH - 2 : WIDTH + 2] = -INF
    if name == "second rank far above":
        logits[WIDTH:] += 50
    return logits, 2 * WIDTH - 3


CASES = (
    "usual",
    "second rank only padding",
    "nothing allowed on the first rank",
    "nothing allowed on the second rank",
    "forbidden at the border",
    "second rank far above",
)
NOISE = torch.cat([grid(4000), EDGES])


def shard_job(names: tuple[str, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """This rank's draws from its half of each case's logits."""
    tp = GroupView.of(torch.distributed.group.WORLD)
    results = {}
    for name in names:
        logits, vocab_size = case(name)
        shard = logits[tp.rank * WIDTH : (tp.rank + 1) * WIDTH].expand(len(NOISE), -1)
        results[name] = sample_tokens(shard, NOISE, temperature=0.7, vocab_size=vocab_size, tp=tp)
    return results


@pytest.fixture(scope="module")
def shards(rank_pool):
    return rank_pool(2).run(shard_job, CASES)


@pytest.mark.parametrize("name", CASES)
def test_two_vocabulary_shards_draw_as_one(shards, name):
    logits, vocab_size = case(name)
    drawn, log_prob = draw(logits, NOISE, temperature=0.7, vocab_size=vocab_size)
    for rank in shards:
        assert torch.equal(rank[name][0], drawn)
        # fp32 sums over one or two shards: a few roundings of log-probabilities of order 10.
        torch.testing.assert_close(rank[name][1], log_prob, rtol=0, atol=4e-6)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(shards[0][name], shards[1][name], strict=True))
    allowed = torch.isfinite(logits) & (torch.arange(2 * WIDTH) < vocab_size)
    assert allowed[drawn].all()
