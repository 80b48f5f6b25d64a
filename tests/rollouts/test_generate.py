"""Decoding with Megatron's KV cache: right log-probs, the same responses on every layout, stops where it should.

Responses may depend neither on who shares a batch nor on when finished rows leave it.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from megatron_hybrid.records import Prompt

PROMPTS = ((5, 7, 9), (11, 3), (2, 4, 6, 8, 10), (1, 1, 1))
MOE = {
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
}
LAYOUTS = [
    pytest.param(1, {}, id="one rank"),
    pytest.param(2, {"tensor_model_parallel_size": 2}, id="TP 2"),
    pytest.param(2, {"pipeline_model_parallel_size": 2}, id="PP 2"),
    pytest.param(
        2, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}, id="PP 2 interleaved"
    ),
    pytest.param(2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, id="TP 2 + SP"),
    pytest.param(2, {"context_parallel_size": 2}, id="CP 2"),
    pytest.param(4, {"pipeline_model_parallel_size": 2, "context_parallel_size": 2}, id="PP 2 x CP 2"),
]
OTHER_MODELS = [
    pytest.param(
        1,
        {
            "group_query_attention": True,
            "num_query_groups": 2,
            "qk_layernorm": True,
            "apply_query_key_layer_scaling": True,
        },
        id="grouped queries, scaled by layer",
    ),
    pytest.param(1, {"position_embedding_type": "learned_absolute"}, id="learned positions"),
    pytest.param(1, {"hybrid_layer_pattern": "*-*-", "num_layers": None}, id="HybridModel"),
    pytest.param(2, MOE | {"tensor_model_parallel_size": 2, "sequence_parallel": True}, id="experts, TP 2 + SP"),
]


def job(overrides: dict[str, Any], batch_size: int = 16, stop: tuple[int, ...] = (0,)) -> dict[str, Any]:
    from megatron_hybrid.mcore.groups import parallel_context
    from megatron_hybrid.mcore.model import head_logits, pipeline_forward
    from megatron_hybrid.mcore.unsliced import unsliced
    from megatron_hybrid.rollouts.generate import Sampler
    from tests.tiny import megatron, set_weights, start

    with megatron(**overrides) as args:
        model = start(args)
        set_weights(model)
        parallel = parallel_context()
        sampler = Sampler(
            parallel=parallel,
            device=torch.device("cpu"),
            vocab_size=61,
            stop_ids=frozenset(stop),
            decode=lambda ids: " ".join(map(str, ids)),
            temperature=0.7,
            max_response_length=12,
            batch_size=batch_size,
        )
        prompts = [Prompt(i, ids, "", "task") for i, ids in enumerate(PROMPTS)]
        rollouts = sampler.sample(model, prompts, 3, step=5, seed=1)

        def all_logits(
            *, hidden_states: Any, output_layer: Any, output_weight: Any, scale_logits: Any, **_: Any
        ) -> Any:
            s, b, h = hidden_states.shape
            flat = head_logits(hidden_states.reshape(s * b, h), output_layer, output_weight, scale_logits)
            return flat.view(s, b, -1)

        tokens = rollouts.tokens
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape[0], -1)
        for chunk in model:
            chunk.eval()  # experts refuse to train with tp and no sequence parallelism
        with torch.no_grad(), unsliced(model):
            logits = pipeline_forward(model, tokens, positions, parallel=parallel, output_processor=all_logits)
        full = None
        if logits is not None:
            shards = [torch.empty_like(logits) for _ in range(parallel.tp.size)]
            if parallel.tp.size > 1:
                torch.distributed.all_gather(shards, logits.contiguous(), group=parallel.tp.group)
                logits = torch.cat(shards, dim=-1)
            log_probs = torch.log_softmax(logits[..., :61].double() / 0.7, dim=-1)
            full = torch.zeros(tokens.shape, dtype=torch.float64)
            full[:, 1:] = log_probs[:-1].transpose(0, 1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
        return {
            "tokens": tokens,
            "mask": rollouts.response_mask,
            "sampled": rollouts.sampled_logprobs,
            "full": full,
            "truncated": rollouts.truncated,
            "responses": rollouts.responses,
        }


@pytest.fixture(scope="module")
def sampled(rank_pool):
    """What each rank of a layout has from `job`, which is run once."""
    known: dict[str, list[dict[str, Any]]] = {}

    def of(size: int, overrides: dict[str, Any]) -> list[dict[str, Any]]:
        if repr(overrides) not in known:
            known[repr(overrides)] = rank_pool(size, init=False).run(job, overrides)
        return known[repr(overrides)]

    return of


@pytest.mark.parametrize(("size", "overrides"), [*LAYOUTS, *OTHER_MODELS])
def test_cached_decoding_gives_the_log_probs_of_a_full_forward(sampled, size, overrides):
    last = sampled(size, overrides)[-1]
    mask = last["mask"]
    assert mask.any(dim=1).all()
    # fp32 attention over a cache and over the whole sequence sum in another order: 1e-6 relative to logits of order 10.
    torch.testing.assert_close(last["sampled"][mask].double(), last["full"][mask], rtol=0, atol=2e-5)


def batches(how: str) -> dict[str, Any]:
    """Tokens, mask and log-probs of the prompts, and the batch sizes they were decoded with."""
    from megatron_hybrid.mcore.groups import parallel_context
    from megatron_hybrid.mcore.kv_cache import KVCache
    from megatron_hybrid.rollouts import generate
    from tests.tiny import megatron, set_weights, start

    sizes = []

    class Watched(KVCache):
        def select(self, rows: torch.Tensor) -> None:
            sizes.append(len(rows))
            super().select(rows)

    with megatron() as args:
        model = start(args)
        set_weights(model)
        sampler = generate.Sampler(
            parallel=parallel_context(),
            device=torch.device("cpu"),
            vocab_size=61,
            stop_ids=frozenset(range(0, 61, 4)),
            decode=lambda ids: " ".join(map(str, ids)),
            max_response_length=12,
        )
        prompts = [Prompt(i, ids, "", "task") for i, ids in enumerate(PROMPTS)]
        changed: dict[str, Any] = {"KVCache": Watched}
        if how == "nobody leaves":
            changed["LEAVE_AT"] = float("inf")
        if how == "everybody leaves at once":
            changed["LEAVE_AT"] = 0.0
        if how == "prompts start together":  # as where attention obeys no masks
            changed["honours_masks"] = lambda chunks, parallel: False
        with mock.patch.multiple(generate, **changed):
            if how == "prompts alone":
                parts = [sampler.sample(model, [prompt], 3, step=5, seed=1) for prompt in prompts]
            else:
                parts = [sampler.sample(model, prompts, 3, step=5, seed=1)]
        rows = [
            (part.responses[row], part.sampled_logprobs[row][part.response_mask[row]])
            for part in parts
            for row in range(len(part.responses))
        ]
        return {
            "responses": [text for text, _ in rows],
            "log_probs": torch.cat([logs for _, logs in rows]),
            "sizes": sizes,
        }


@pytest.fixture(scope="module")
def usual(rank_pool) -> dict[str, Any]:
    return rank_pool(1, init=False).run(batches, "usual")[0]


@pytest.mark.parametrize(
    "how", ["nobody leaves", "everybody leaves at once", "prompts start together", "prompts alone"]
)
def test_a_response_does_not_depend_on_the_batch_it_was_decoded_in(rank_pool, usual, how):
    other = rank_pool(1, init=False).run(batches, how)[0]
    assert usual["responses"] == other["responses"]
    # As for a full forward pass: fp32 sums in another order, logits of order 10.
    torch.testing.assert_close(usual["log_probs"], other["log_probs"], rtol=0, atol=2e-5)
    # One row a prompt becomes one a response, and then the batch shrinks with those that finish.
    assert usual["sizes"][0] == 12 and usual["sizes"][-1] == 0
    assert usual["sizes"] == sorted(usual["sizes"], reverse=True) and len(usual["sizes"]) > 3
    if how == "nobody leaves":
        assert other["sizes"] == [12]
    if how == "everybody leaves at once":
        assert len(other["sizes"]) > len(usual["sizes"])


def test_responses_are_the_same_on_every_layout_and_batch_size(rank_pool, sampled):
    (reference,) = sampled(1, {})
    waves = rank_pool(1, init=False).run(job, {}, batch_size=5)[0]
    assert torch.equal(reference["tokens"], waves["tokens"])
    for size, overrides in (p.values for p in LAYOUTS[1:]):
        for rank in sampled(size, overrides):
            assert torch.equal(reference["tokens"], rank["tokens"]), overrides


def test_a_response_ends_with_its_first_stop_token_or_at_the_limit(rank_pool):
    result = rank_pool(1, init=False).run(job, {}, stop=tuple(range(0, 61, 4)))[0]
    lengths = result["mask"].sum(dim=1)
    for row, truncated in enumerate(result["truncated"]):
        response = result["tokens"][row][result["mask"][row]].tolist()
        assert all(token % 4 for token in response[:-1])
        assert (response[-1] % 4 == 0) != truncated
        assert not truncated or lengths[row] == 12
        assert result["tokens"][row, : len(PROMPTS[row // 3])].tolist() == list(PROMPTS[row // 3])
    assert not all(result["truncated"])


def test_samples_of_a_group_differ_and_can_be_drawn_again(rank_pool, sampled):
    (first,) = sampled(1, {})
    again = rank_pool(1, init=False).run(job, {})[0]
    assert first["responses"] == again["responses"]
    assert len(set(first["responses"])) > 6
