"""A teacher's top k from shards of its vocabulary, against torch.topk of the whole log-softmax."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hybrid.errors import ConfigError, ShapeError
from megatron_hybrid.parallel import GroupView
from megatron_hybrid.records import HiddenPayload, TopKPayload
from megatron_hybrid.teachers import topk
from megatron_hybrid.teachers.topk import TopKTeacher, topk_log_probs
from tests.ranks import Ranks

Pools = Callable[..., Ranks]
INF, NAN = float("inf"), float("nan")
ALONE = GroupView()


def padded(v: int, columns: int = 48, n: int = 9) -> Tensor:
    """Logits whose columns from v on hold NaN and infinity."""
    logits = torch.randn(n, columns) * 4
    logits[:, v:], logits[:, v + 1 :: 2] = NAN, INF
    return logits


def expected_topk(logits: Tensor, k: int, vocab_size: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """torch's own, float64, over the whole vocabulary; a stable sort, so equal ones come by rising id."""
    log_probs = torch.log_softmax(logits[:, :vocab_size].double() / temperature, dim=-1)
    values, ids = log_probs.sort(dim=-1, descending=True, stable=True)
    return ids[:, :k], values[:, :k]


def shard_topk(logits: Tensor, k: int, vocab_size: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """On each rank: the answer from its own columns."""
    tp = GroupView.of(dist.group.WORLD)
    shard = logits.chunk(tp.size, dim=1)[tp.rank]
    return topk_log_probs(shard, k, vocab_size=vocab_size, temperature=temperature, tp=tp)


class WithHead:
    """A teacher whose head is a matrix; keeps the sizes of the chunks its head was asked for."""

    def __init__(self, hidden: Sequence[Tensor | None], head: Tensor) -> None:
        self.hidden = hidden
        self.head = head
        self.chunks: list[int] = []

    def annotate(self, batches: Any) -> list[HiddenPayload | None]:
        return [None if h is None else HiddenPayload(hidden=h, logits_of=self.logits_of) for h in self.hidden]

    def logits_of(self, hidden: Tensor) -> Tensor:
        self.chunks.append(len(hidden))
        return hidden @ self.head


def annotate_shard(hidden: Tensor, head: Tensor, k: int, vocab_size: int) -> TopKPayload | None:
    """On each rank: a TopKTeacher around its columns of the head."""
    tp = GroupView.of(dist.group.WORLD)
    inner = WithHead([hidden], head.chunk(tp.size, dim=1)[tp.rank])
    return TopKTeacher(inner, k, vocab_size, 1.3, tp).annotate([])[0]


def assert_topk(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert got[0].dtype == torch.int64 and got[1].dtype == torch.float32
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1].double(), expected[1], rtol=2e-7, atol=1e-7)  # one rounding to fp32, and of exp


@pytest.mark.parametrize("v", [48, 29])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("k", [1, 7, 29])
def test_one_rank_gives_torchs_topk(k: int, temperature: float, v: int):
    logits = padded(v)
    got = topk_log_probs(logits, k, vocab_size=v, temperature=temperature, tp=ALONE)
    assert_topk(got, expected_topk(logits, k, v, temperature))


@pytest.mark.parametrize("v", [48, 29, 10])  # 10: the second shard is all padding
def test_two_shards_give_torchs_topk_on_both_ranks(rank_pool: Pools, v: int):
    logits = padded(v)
    for k in (1, 7, v):  # v: more than a shard has
        ranks = rank_pool(2).run(shard_topk, logits, k, v, 0.7)
        assert all(torch.equal(a, b) for a, b in zip(*ranks, strict=True))
        assert_topk(ranks[0], expected_topk(logits, k, v, 0.7))


def test_equal_logits_come_by_rising_id(rank_pool: Pools):
    logits = torch.randint(-1, 2, (16, 48)).float()  # three values: every cut at k goes through equal ones
    logits[:, ::5] *= -1  # zeros of both signs, which are equal
    expected = expected_topk(logits, 20, 48)
    assert_topk(topk_log_probs(logits, 20, vocab_size=48, temperature=1.0, tp=ALONE), expected)
    assert_topk(rank_pool(2).run(shard_topk, logits, 20, 48)[1], expected)


def test_bf16_logits_and_a_large_offset_keep_the_digits():
    logits = (padded(48) + 1000).bfloat16()
    got = topk_log_probs(logits, 8, vocab_size=48, temperature=1.0, tp=ALONE)
    assert_topk(got, expected_topk(logits, 8, 48))


def test_a_probability_near_one_keeps_what_it_lacks():
    logits = torch.zeros(1, 48)
    logits[0, 5] = 30.0
    _, log_probs = topk_log_probs(logits, 1, vocab_size=48, temperature=1.0, tp=ALONE)
    lacking = 47 * torch.tensor(-30.0, dtype=torch.float64).exp()
    torch.testing.assert_close(-log_probs[0, 0].double(), lacking, rtol=1e-3, atol=0)  # 1 + 4e-12 in float64


def test_forbidden_tokens_take_no_slot(rank_pool: Pools):
    logits = torch.randn(3, 8)
    logits[:, [1, 5, 6]] = -INF
    for ids, log_probs in (
        topk_log_probs(logits, 7, vocab_size=8, temperature=1.0, tp=ALONE),
        *rank_pool(2).run(shard_topk, logits, 7, 8),
    ):
        assert ids[:, 5:].eq(-1).all() and log_probs[:, 5:].eq(-INF).all()
        assert_topk((ids[:, :5], log_probs[:, :5]), expected_topk(logits, 5, 8))


def test_a_nan_that_counts_is_never_silent(rank_pool: Pools):
    logits = torch.randn(4, 48)
    logits[2, 40] = NAN
    for _, log_probs in rank_pool(2).run(shard_topk, logits, 5, 48):
        assert log_probs[2].isnan().all() and log_probs[[0, 1, 3]].isfinite().all()


def test_logits_are_not_mutated():
    logits = torch.randn(3, 8)  # fp32: a cast to fp32 makes no copy
    before = logits.clone()
    topk_log_probs(logits, 2, vocab_size=8, temperature=0.5, tp=ALONE)
    assert torch.equal(logits, before)


def test_a_teacher_of_hidden_states_leaves_its_top_k(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(topk, "CHUNK_TOKENS", 4)
    hidden, head = torch.randn(10, 6), torch.randn(6, 48)
    inner = WithHead([hidden, None, hidden[:0]], head)
    first, elsewhere, empty = TopKTeacher(inner, 5, 40, 1.3, ALONE).annotate([])
    assert elsewhere is None and isinstance(first, TopKPayload) and isinstance(empty, TopKPayload)
    assert_topk((first.ids, first.log_probs), expected_topk(hidden @ head, 5, 40, 1.3))
    assert empty.ids.shape == empty.log_probs.shape == (0, 5)
    assert max(inner.chunks) == 4  # logits never exist for more


def test_shards_of_the_head_leave_the_same_payload(rank_pool: Pools):
    hidden, head = torch.randn(150, 6), torch.randn(6, 48)  # three chunks
    ranks = rank_pool(2).run(annotate_shard, hidden, head, 5, 40)
    ids, log_probs = expected_topk(hidden @ head, 5, 40, 1.3)
    for payload in ranks:
        assert torch.equal(payload.ids, ids)
        # the shards' matrix products may round otherwise than the whole one's: fp32 logits of size 10
        torch.testing.assert_close(payload.log_probs.double(), log_probs, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"k": 0}, ConfigError, "k must lie in"),
        ({"k": 41}, ConfigError, "k must lie in"),
        ({"temperature": 0.0}, ConfigError, "temperature must be"),
        ({"vocab_size": 49}, ShapeError, "vocab_size is 49"),
        ({"logits": torch.zeros(2, 3, 48)}, ShapeError, "teacher logits must be"),
        ({"logits": torch.zeros(3, 48, dtype=torch.long)}, ShapeError, "teacher logits must be"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], error: type[Exception], match: str):
    arguments = {"logits": torch.zeros(3, 48), "k": 2, "vocab_size": 40, "temperature": 1.0, "tp": ALONE} | change
    with pytest.raises(error, match=match):
        topk_log_probs(**arguments)


def test_a_teacher_without_hidden_states_is_refused():
    inner = SimpleNamespace(annotate=lambda batches: [TopKPayload(torch.zeros(1, 2), torch.zeros(1, 2))])
    with pytest.raises(ConfigError, match="SimpleNamespace left a TopKPayload"):
        TopKTeacher(inner, 2, 8, 1.0, ALONE).annotate([])
