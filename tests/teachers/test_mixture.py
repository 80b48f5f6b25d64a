"""The mixture's logits give, at the teachers' temperature, the weighted sum of the teachers' probabilities."""

import pytest
import torch
import torch.distributed as dist

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.ops.api import vocab_parallel_hybrid_loss
from megatron_hybrid.parallel import GroupView
from megatron_hybrid.records import HiddenPayload, TopKPayload
from megatron_hybrid.teachers import blocks
from megatron_hybrid.teachers.mixture import MixturePayload, MixtureTeacher
from tests.memory import peak_bytes
from tests.teachers.scripted import Scripted, micro_batch

TOKENS, VOCAB, PADDED = 6, 13, 16
BATCH = micro_batch(("maths",), (0,) * TOKENS)
WEIGHTS = (0.7, 0.3)


def tables(*, garbage: bool = True) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    # Normalisers far apart: mixing raw logits would let the second teacher win everywhere.
    made = [offset + 3 * torch.randn(TOKENS, PADDED, generator=generator) for offset in (0.0, 40.0)]
    if garbage:
        made[0][:, VOCAB:], made[1][:, VOCAB:] = torch.nan, torch.inf
    return made


def expected(temperature: float) -> torch.Tensor:
    parts = [c * (w[:, :VOCAB].double() / temperature).softmax(-1) for c, w in zip(WEIGHTS, tables(), strict=True)]
    return torch.stack(parts).sum(0)


def mixture(temperature: float = 1.0, tp: GroupView | None = None, made: list[torch.Tensor] | None = None):
    teachers = [Scripted(table) for table in made or tables()]
    options = {"vocab_size": VOCAB, "temperature": temperature, "tp": tp or GroupView()}
    (payload,) = MixtureTeacher(teachers, WEIGHTS, **options).annotate([BATCH])
    return payload


def assert_mixed(logits: torch.Tensor, temperature: float) -> None:
    # fp32: a log-probability of size 20 has an error of some 2e-6, and with it the probability.
    mixed = (logits[:, :VOCAB].double() / temperature).exp()
    torch.testing.assert_close(mixed, expected(temperature), rtol=1e-5, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_probabilities_are_mixed_each_at_the_teachers_temperature(temperature):
    assert_mixed(mixture(temperature).logits(), temperature)


def shard_of_mixture(temperature: float, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    tp = GroupView.of(dist.group.WORLD)
    padded = [torch.nn.functional.pad(table, (0, tp.size * width - PADDED), value=torch.nan) for table in tables()]
    payload = mixture(temperature, tp, [table[:, tp.rank * width :][:, :width] for table in padded])
    return payload.logits(), payload.logits(slice(2, 2))


@pytest.mark.parametrize("width", [PADDED // 2, PADDED], ids=["both", "one rank holds padding alone"])
def test_shards_of_the_vocabulary_are_mixed_as_the_whole_is(rank_pool, width):
    for temperature in (1.0, 2.0):
        shards, empty = zip(*rank_pool(2).run(shard_of_mixture, temperature, width), strict=True)
        assert_mixed(torch.cat(shards, dim=1), temperature)
        assert all(part.shape == (0, width) for part in empty)


def test_the_op_measures_the_divergence_from_the_mixture():
    student = torch.randn(TOKENS, PADDED)
    target = torch.zeros(TOKENS, dtype=torch.int64)
    got = vocab_parallel_hybrid_loss(
        student, mixture(2.0).logits(), target, vocab_size=VOCAB, student_temperature=0.7, teacher_temperature=2.0
    )
    log_p = (student[:, :VOCAB].double() / 0.7).log_softmax(-1)
    kl = (log_p.exp() * (log_p - expected(2.0).log())).sum(-1)
    torch.testing.assert_close(got.kl.double(), kl, rtol=1e-5, atol=0)  # fp32
    torch.testing.assert_close(got.teacher_log_prob.double(), expected(2.0)[:, 0].log(), rtol=1e-5, atol=0)


def test_some_rows_are_those_rows_of_all():
    payload = mixture()
    some, every = payload.logits(slice(2, 5))[:, :VOCAB], payload.logits()[2:5, :VOCAB]
    torch.testing.assert_close(some, every)  # not equal bits: vectorised and single elements are rounded differently


def test_blocks_of_rows_are_mixed_as_all_rows_are(monkeypatch):
    monkeypatch.setitem(blocks._BLOCK_ELEMENTS, "cpu", 2 * PADDED)
    assert len(blocks.row_blocks(tables()[0])) == 3
    for temperature in (1.0, 2.0):
        assert_mixed(mixture(temperature).logits(), temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixture_holds_one_fp32_shard_and_the_logits_of_one_teacher(monkeypatch, dtype):
    rows, columns, block = 64, 1024, 4096
    monkeypatch.setitem(blocks._BLOCK_ELEMENTS, "cpu", block)
    parts = tuple(HiddenPayload(torch.randn(rows, columns).to(dtype), torch.clone) for _ in range(3))
    payload = MixturePayload(parts, (-1.0, -1.0, -1.0), columns - 5, 2.0, GroupView())
    payload.logits()  # whatever torch keeps from a first call
    shards = rows * columns * (4 + dtype.itemsize)
    # Three fp32 blocks at once (a cast, a quotient, what logsumexp makes of it), and some numbers per row.
    assert shards <= peak_bytes(payload.logits) <= shards + 3 * 4 * block + 64 * rows


def test_the_teachers_own_logits_are_left_as_they_were():
    made = tables(garbage=False)
    before = [table.clone() for table in made]
    mixture(made=made).logits()
    assert all(torch.equal(table, old) for table, old in zip(made, before, strict=True))


def test_one_teacher_alone_is_itself_but_for_its_normaliser():
    (payload,) = MixtureTeacher(
        [Scripted(tables()[0])], [1.0], vocab_size=VOCAB, temperature=1.0, tp=GroupView()
    ).annotate([BATCH])
    expected = tables()[0][:, :VOCAB].double().log_softmax(-1)
    torch.testing.assert_close(payload.logits()[:, :VOCAB].double(), expected, rtol=0, atol=4e-6)  # fp32 at size 20


def test_what_one_teacher_forbids_the_other_may_allow():
    first, second = tables(garbage=False)
    first[:, 3], first[:, 4], second[:, 4] = -torch.inf, -torch.inf, -torch.inf
    logits = mixture(made=[first, second]).logits()
    assert logits[:, 3].isfinite().all()
    assert (logits[:, 4] == -torch.inf).all()


def test_stages_before_the_last_get_none():
    teachers = [Scripted(table, is_last_stage=False) for table in tables()]
    options = {"vocab_size": VOCAB, "temperature": 1.0, "tp": GroupView()}
    assert MixtureTeacher(teachers, WEIGHTS, **options).annotate([BATCH, BATCH]) == [None, None]


def test_likely_tokens_cannot_be_mixed():
    class Likely(Scripted):
        def annotate(self, batches):
            return [TopKPayload(torch.zeros(1, 1), torch.zeros(1, 1)) for _ in batches]

    options = {"vocab_size": VOCAB, "temperature": 1.0, "tp": GroupView()}
    with pytest.raises(ConfigError, match="left a TopKPayload: a mixture needs the whole distribution"):
        MixtureTeacher([Likely(tables()[0])], [1.0], **options).annotate([BATCH])
