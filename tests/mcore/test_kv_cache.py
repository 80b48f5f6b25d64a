"""Rows of Megatron's KV cache that branch and leave go on as if they had been alone from the start."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.recorded_jobs import refused

PROMPTS = torch.tensor([[5, 7, 9], [11, 3, 8], [2, 4, 6]])
ROWS = [2, 0, 0]
NEXT = torch.tensor([[1], [20], [30]])


def branches(overrides: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, ...]]]:
    """Logits of NEXT behind rows ROWS of the prompts: with the cache and from the beginning; shapes in the cache."""
    from megatron_hybrid.mcore.groups import parallel_context
    from megatron_hybrid.mcore.kv_cache import KVCache
    from megatron_hybrid.mcore.model import last_position_logits, pipeline_forward
    from tests.tiny import megatron, set_weights, start

    with megatron(**overrides) as args:
        chunks = start(args)
        set_weights(chunks)

        def logits(tokens: torch.Tensor, first: int, cache: Any = None) -> torch.Tensor:
            positions = torch.arange(first, first + tokens.shape[1]).expand_as(tokens)
            options = {"parallel": parallel_context(), "output_processor": last_position_logits}
            return pipeline_forward(chunks, tokens, positions, inference_context=cache, **options)

        chunks[0].eval()
        with torch.no_grad():
            cache = KVCache(chunks, 3, 6)
            logits(PROMPTS, 0, cache)
            cache.sequence_len_offset += 3
            cache.select(torch.tensor(ROWS))
            cached = logits(NEXT, 3, cache)
            whole = logits(torch.cat([PROMPTS[ROWS], NEXT], dim=1), 0)
        return cached, whole, [tuple(tensor.shape) for pair in cache.key_value_memory_dict.values() for tensor in pair]


@pytest.mark.parametrize("overrides", [{}, {"group_query_attention": True, "num_query_groups": 2}])
def test_selected_rows_go_on_from_their_own_past(rank_pool, overrides):
    cached, whole, shapes = rank_pool(1, init=False).run(branches, overrides)[0]
    # fp32 attention over a cache and over the whole sequence sum in another order: logits of order 10.
    torch.testing.assert_close(cached, whole, rtol=0, atol=2e-5)
    assert set(shapes) == {(6, 3, overrides.get("num_query_groups", 4), 8)}


def test_recurrent_states_are_selected_by_their_first_dimension():
    from megatron_hybrid.mcore.kv_cache import KVCache

    cache = KVCache([], 3, 6)  # no layer of it is attention
    states = torch.randn(3, 5, 4), torch.randn(3, 2)
    cache.key_value_memory_dict[1] = states
    cache.select(torch.tensor([2, 0]))
    for selected, state in zip(cache.key_value_memory_dict[1], states, strict=True):
        assert torch.equal(selected, state[[2, 0]])
    assert cache.max_batch_size == 2


def masks_honoured(change: str) -> bool:
    from megatron_hybrid.mcore.groups import parallel_context
    from megatron_hybrid.mcore.kv_cache import honours_masks
    from tests.tiny import megatron, start

    with megatron() as args:
        chunks = start(args)
        attention = chunks[0].module if hasattr(chunks[0], "module") else chunks[0]
        attention = attention.decoder.layers[2].self_attention
        if change == "window":
            attention.core_attention.scale_mask_softmax.window_size = (4, 0)
        if change == "another attention":  # as Transformer Engine's is
            attention.core_attention = torch.nn.Identity()
        if change == "limited experts":
            attention.config.moe_expert_capacity_factor = 1.0
        if change == "flash decode":
            attention.config.flash_decode = True
        return honours_masks(chunks, parallel_context())


def test_masks_are_trusted_to_megatrons_own_full_attention_alone(rank_pool):
    pool = rank_pool(1, init=False)
    assert pool.run(masks_honoured, "nothing") == [True]
    assert pool.run(masks_honoured, "window") == [False]
    assert pool.run(masks_honoured, "another attention") == [False]


def test_padding_is_not_put_where_experts_of_limited_capacity_would_take_it_for_tokens(rank_pool):
    assert rank_pool(1, init=False).run(masks_honoured, "limited experts") == [False]


def test_flash_decode_is_refused_because_it_would_drop_the_rotary_embedding(rank_pool):
    said = rank_pool(1, init=False).run(refused, masks_honoured, "flash decode")[0]
    assert said.startswith("ConfigError") and "rotary" in said
