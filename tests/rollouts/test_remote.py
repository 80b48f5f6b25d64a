"""One rank of a replica asks the server; every rank has the same rollouts, or the same error."""

from __future__ import annotations

import json
from math import inf
from typing import Any

import pytest
import torch

from megatron_hybrid.errors import ServerError
from megatron_hybrid.parallel import GroupView, ParallelContext
from megatron_hybrid.records import Prompt, RolloutBatch
from megatron_hybrid.rollouts.remote import RemoteSampler
from megatron_hybrid.schedule.microbatch import microbatches
from megatron_hybrid.servers.vllm import VllmEngine
from tests.checkpoint.tiny_llama import VOCAB, make_folder
from tests.engine_server import serve_model
from tests.http_server import closes, half, serve, slow

PROMPTS = [Prompt(4, (5, 9, 20), "", "t"), Prompt(9, (7,), "", "t")]


def sampler(url: str, **changes: Any) -> RemoteSampler:
    settings: dict[str, Any] = {
        "engine": VllmEngine(url, "the rollout server", at_once=4, timeout_s=30, retries=0),
        "parallel": ParallelContext(),
        "device": torch.device("cpu"),
        "vocab_size": VOCAB,
        "stop_ids": frozenset({1}),
        "decode": lambda ids: " ".join(map(str, ids)),
        "max_response_length": 5,
        "version": 3,
    }
    return RemoteSampler(**settings | changes)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollouts")
    make_folder(folder, num_layers=2)
    with serve_model(folder) as found:
        yield found


def test_a_batch_holds_prompts_responses_log_probs_and_the_version_of_the_weights(served):
    server, url = served
    batch = sampler(url).sample([], PROMPTS, 3, step=7, seed=1)
    assert (batch.policy_version, batch.temperature, batch.seed) == (3, 1.0, 1)
    assert batch.group_id.tolist() == [0, 0, 0, 1, 1, 1]
    assert [prompt.prompt_id for prompt in batch.prompts] == [4, 4, 4, 9, 9, 9]
    for row, prompt in enumerate(batch.prompts):
        mask = batch.response_mask[row]
        border, end = len(prompt.token_ids), len(prompt.token_ids) + int(mask.sum())
        ids = batch.tokens[row, :end].tolist()
        assert ids[:border] == list(prompt.token_ids) and mask[border:end].all()
        assert batch.responses[row] == " ".join(map(str, ids[border:]))
        assert batch.truncated[row] is (ids[-1] != 1) and (end - border == 5 or ids[-1] == 1)
        expected = server.log_probs(ids)[range(border - 1, end - 1), ids[border:]]
        torch.testing.assert_close(batch.sampled_logprobs[row, border:end], expected, rtol=1e-5, atol=1e-5)  # fp32 sums
        assert not batch.sampled_logprobs[row, ~mask].any()


def test_step_seed_and_prompt_decide_what_is_drawn(served):
    _, url = served

    def tokens(**changes):
        return sampler(url).sample([], PROMPTS, 3, **{"step": 7, "seed": 1} | changes).responses

    assert tokens() == tokens()
    assert tokens() != tokens(step=8) != tokens(seed=2)


def test_another_tokenizer_shows_by_its_ids(served):
    with pytest.raises(ServerError, match=r"prompt \d with \d tokens, ids .* ids below 2, the tokenizer's size"):
        sampler(served[1], vocab_size=2).sample([], PROMPTS, 3, step=7, seed=1)


class Nobody:
    """The engine of a rank that has no business to ask."""

    def complete(self, *args: Any) -> Any:
        raise AssertionError("a second rank of the replica asked the server")


def sampled_on_rank(url: str, axis: str) -> Any:
    group = GroupView.of(torch.distributed.group.WORLD)
    engine = {} if group.rank == 0 else {"engine": Nobody()}
    found = sampler(url, parallel=ParallelContext(**{axis: group}), **engine)
    try:
        batch = found.sample([], PROMPTS, 3, step=7, seed=1)
    except ServerError as error:
        return str(error)
    return batch.tokens.tolist(), batch.sampled_logprobs.tolist(), batch.responses


@pytest.mark.parametrize("axis", ["tp", "pp", "cp"])
def test_one_rank_asks_and_all_have_the_answer(rank_pool, served, axis):
    first, second = rank_pool(2).run(sampled_on_rank, served[1], axis)
    assert first == second and len(first[0]) == 6


def test_the_error_of_the_one_who_asks_reaches_all(rank_pool):
    with serve(lambda path, body: (400, "this model's maximum context length is 3")) as url:
        first, second = rank_pool(2).run(sampled_on_rank, url, "tp")
    assert first == second and "refuses with status 400. It answered: this model's maximum context" in first


WHOLE = {"index": 0, "finish_reason": "stop", "token_ids": [4, 1], "logprobs": {"token_logprobs": [-1, -2]}}
GOOD = {"choices": [WHOLE]}


def _choice(**changes: Any) -> dict[str, Any]:
    return {"choices": [WHOLE | changes]}


FAULTS: dict[str, tuple[int, Any]] = {
    "slow": (200, slow(5)),
    "500": (500, "out of memory"),
    "closes": (200, closes),
    "half": (200, half(json.dumps(GOOD))),
    "half a JSON": (200, json.dumps(GOOD)[:40]),
    "no JSON": (200, "<html>"),
    "another JSON": (200, {"error": "no"}),
    "too few log-probs": (200, _choice(token_ids=[4, 5, 1])),
    "too many responses": (200, {"choices": [WHOLE] * 2}),
    "too many tokens": (200, _choice(token_ids=[4] * 6, logprobs={"token_logprobs": [-1] * 6})),
    "log-prob above 0": (200, _choice(logprobs={"token_logprobs": [-1, 0.5]})),
    "log-prob NaN": (200, _choice(logprobs={"token_logprobs": [-1, float("nan")]})),
    "tokens in words": (200, _choice(token_ids=["4", "1"])),
}


def faulty(fault: str, asked: list[Any], *, times: float) -> Any:
    """The second prompt's requests meet the fault so many times, and are answered then."""

    def answer(path: str, body: Any) -> tuple[int, Any]:
        asked.append(body["prompt"])
        broken = body["prompt"] == list(PROMPTS[1].token_ids) and asked.count(body["prompt"]) <= times
        return FAULTS[fault] if broken else (200, GOOD)

    return answer


def sampled(url: str, fault: str, retries: int, **changes: Any) -> RolloutBatch:
    timeout_s = 1 if fault == "slow" else 30
    engine = VllmEngine(url, "the rollout server", at_once=4, timeout_s=timeout_s, retries=retries, pause_s=0.001)
    return sampler(url, engine=engine, **changes).sample([], PROMPTS, 1, step=0, seed=1)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_costs_nothing_but_time(fault):
    asked: list[Any] = []
    with serve(faulty(fault, asked, times=2)) as url:
        batch = sampled(url, fault, retries=2)
    assert asked.count(list(PROMPTS[1].token_ids)) == 3
    assert batch.unanswered == (False, False) and batch.responses == ("4 1", "4 1")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_leaves_rows_without_a_response(fault):
    told: list[Any] = []
    with serve(faulty(fault, [], times=inf)) as url:
        batch = sampled(url, fault, retries=1, on_failed=told.extend)
        with pytest.raises(ServerError, match="the rollout server at"):
            sampled(url, fault, retries=0)
    ((prompt, error),) = told
    assert prompt.prompt_id == 9 and isinstance(error, ServerError)
    assert batch.unanswered == (False, True) and batch.responses == ("4 1", "")
    assert batch.response_mask.sum(dim=1).tolist() == [2, 0]
    assert not batch.sampled_logprobs[1].any() and batch.tokens[1].tolist() == [7, 0, 0, 0, 0]


def test_of_nothing_but_unanswered_prompts_micro_batches_can_be_made():
    with serve(lambda path, body: (500, "down")) as url:
        batch = sampled(url, "500", retries=0, on_failed=lambda failed: None)
    (one,) = microbatches(batch, micro_batch_size=2, aggregation="token-mean")
    assert batch.unanswered == (True, True) and len(one.targets) == 0 and one.count == 0


def told_on_rank(url: str) -> tuple[list[int], tuple[bool, ...]]:
    told: list[Any] = []
    group = GroupView.of(torch.distributed.group.WORLD)
    engine = {} if group.rank == 0 else {"engine": Nobody()}
    found = sampler(url, parallel=ParallelContext(pp=group), on_failed=told.extend, **engine)
    batch = found.sample([], PROMPTS, 1, step=0, seed=1)
    return [prompt.prompt_id for prompt, _ in told], batch.unanswered


def test_every_rank_of_a_replica_is_told_of_the_same_prompts(rank_pool):
    with serve(faulty("another JSON", [], times=inf)) as url:
        assert rank_pool(2).run(told_on_rank, url) == [([9], (False, True))] * 2
