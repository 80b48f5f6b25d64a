"""A teacher on a server: a real model's likeliest tokens at each response token, whatever the micro-batch's form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_hybrid.errors import ServerError
from megatron_hybrid.parallel import GroupView, ParallelContext
from megatron_hybrid.records import Prompt, RolloutBatch
from megatron_hybrid.rollouts.assemble import Sample, assemble
from megatron_hybrid.schedule.layout import SequenceLayout
from megatron_hybrid.schedule.microbatch import microbatches
from megatron_hybrid.servers.sglang import SglangEngine
from megatron_hybrid.servers.vllm import VllmEngine
from megatron_hybrid.teachers.remote import RemoteTeacher
from tests.checkpoint.tiny_llama import VOCAB, make_folder
from tests.engine_server import serve_model
from tests.http_server import serve

K = 7
HINTS = (None, (40, 41, 5, 9, 20), None, (7, 50))
PROMPTS = [(5, 9, 20), (5, 9, 20), (7,), (7,)]
RESPONSES = [(30, 31, 1), (8,), (60, 61, 62, 3), (12, 1)]


def rollouts(*, hinted: bool) -> RolloutBatch:
    prompts = [
        Prompt(row // 2, ids, "", "t", teacher_token_ids=hint if hinted else None)
        for row, (ids, hint) in enumerate(zip(PROMPTS, HINTS, strict=True))
    ]
    samples = [Sample(ids, torch.zeros(len(ids)), False) for ids in RESPONSES]
    return assemble(
        prompts,
        samples,
        group_id=[0, 0, 1, 1],
        decode=str,
        device=torch.device("cpu"),
        temperature=1.0,
        policy_version=0,
        seed=0,
    )


def teacher(url: str, *, api=VllmEngine, vocab_size: int = VOCAB, parallel: ParallelContext | None = None):
    engine = api(url, "the teacher server", at_once=4, timeout_s=30, retries=0)
    return RemoteTeacher(engine, K, vocab_size, parallel or ParallelContext())


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    make_folder(folder, num_layers=2)
    with serve_model(folder) as found:
        yield found


@pytest.mark.parametrize("api", [VllmEngine, SglangEngine])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("hinted", [False, True])
def test_every_response_token_has_the_teachers_likeliest(served, api, packed, hinted):
    server, url = served
    layout = SequenceLayout(packed=packed)
    batches = microbatches(rollouts(hinted=hinted), micro_batch_size=2, aggregation="token-mean", layout=layout)
    payloads = teacher(url, api=api).annotate(batches)
    checked = 0
    for number, (batch, payload) in enumerate(zip(batches, payloads, strict=True)):
        assert payload.ids.shape == payload.log_probs.shape == (len(batch.targets), K)
        assert (payload.ids.dtype, payload.log_probs.dtype) == (torch.int64, torch.float32)
        for token, (sequence, position) in enumerate(
            zip(batch.sequence_of_token.tolist(), batch.position_of_token.tolist(), strict=True)
        ):
            row = 2 * number + sequence
            before = position - len(PROMPTS[row])  # response tokens in front of this one
            front = (HINTS[row] if hinted else None) or PROMPTS[row]
            expected = server.log_probs([*front, *RESPONSES[row][:before]])[-1].topk(K)
            assert payload.ids[token].tolist() == expected.indices.tolist()
            # The server read the whole sequence, this its beginning: fp32 sums of another order.
            torch.testing.assert_close(payload.log_probs[token], expected.values, rtol=1e-5, atol=1e-5)
            checked += 1
    assert checked == sum(map(len, RESPONSES))


def test_a_teacher_of_some_tokens_answers_those_alone(served):
    """As `TaskTeachers` asks: sequences stay whole, tokens of the others are gone."""
    _, url = served
    (batch,) = microbatches(rollouts(hinted=False), micro_batch_size=4, aggregation="token-mean")
    (whole,) = teacher(url).annotate([batch])
    kept = (batch.sequence_of_token % 2 == 1).nonzero().squeeze(1)
    reads = replace(batch.student, token_rows=batch.student.token_rows[kept])
    part = replace(
        batch,
        student=reads,
        teacher_input=reads,
        sequence_of_token=batch.sequence_of_token[kept],
        targets=batch.targets[kept],
    )
    (found,) = teacher(url).annotate([part])
    assert torch.equal(found.ids, whole.ids[kept]) and torch.equal(found.log_probs, whole.log_probs[kept])


def test_other_stages_ask_nothing():
    parallel = ParallelContext(pp=GroupView(None, 0, 2))
    (batch,) = microbatches(rollouts(hinted=False), micro_batch_size=4, aggregation="token-mean")
    assert teacher("http://127.0.0.1:9", parallel=parallel).annotate([batch]) == [None]


def test_another_tokenizer_shows_by_its_ids(served):
    batches = microbatches(rollouts(hinted=False), micro_batch_size=4, aggregation="token-mean")
    with pytest.raises(ServerError, match="named tokens .* and the tokenizer has 9: its ids mean other tokens"):
        teacher(served[1], vocab_size=9).annotate(batches)


def test_what_the_server_says_against_too_many_log_probs_is_shown():
    batches = microbatches(rollouts(hinted=False), micro_batch_size=4, aggregation="token-mean")
    said = {"error": {"message": "Requested prompt logprobs of 64, which is greater than max allowed: 20"}}
    with serve(lambda path, body: (400, said)) as url, pytest.raises(ServerError, match="greater than max allowed: 20"):
        teacher(url).annotate(batches)


def annotated_on_rank(url: str) -> tuple[list[list[int]], list[list[float]]]:
    tp = GroupView.of(torch.distributed.group.WORLD)
    asks = teacher(url if tp.rank == 0 else "http://127.0.0.1:9", parallel=ParallelContext(tp=tp))
    (payload,) = asks.annotate(microbatches(rollouts(hinted=False), micro_batch_size=4, aggregation="token-mean"))
    return payload.ids.tolist(), payload.log_probs.tolist()


def test_tensor_parallel_ranks_share_what_one_of_them_asked(rank_pool, served):
    first, second = rank_pool(2).run(annotated_on_rank, served[1])
    assert first == second
