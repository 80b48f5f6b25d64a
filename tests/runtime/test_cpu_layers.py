"""Sequence parallelism, context parallelism and packed sequences on the CPU give the numbers of one padded rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_hybrid.errors import ConfigError, ShapeError
from tests.distributed.gradient import assert_same, shards, whole
from tests.model_step import one_step

LENGTHS = (7, 3, 12)
WIDTH = 16
VOCAB = 61
MODEL = {
    "untie_embeddings_and_output_weights": True,
    "group_query_attention": True,
    "num_query_groups": 2,
    "qk_layernorm": True,
    "apply_query_key_layer_scaling": True,
}
SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
CP = {"context_parallel_size": 2}


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, VOCAB, (length,), generator=generator) for length in LENGTHS]


def weights(width: int) -> torch.Tensor:
    """[sequences, WIDTH, width]: the loss is the sum of all logits by these; 0 on the vocabulary's padding."""
    whole_vocabulary = torch.randn(len(LENGTHS), WIDTH, VOCAB, generator=torch.Generator().manual_seed(6))
    return torch.nn.functional.pad(whole_vocabulary, (0, width - VOCAB))


def share(length: int, rank: int, size: int) -> torch.Tensor:
    """Positions of a sequence that Megatron's zig-zag gives to a rank, written out."""
    if size == 1:
        return torch.arange(length)
    chunks = torch.arange(length).chunk(2 * size)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))


def inputs(packed: bool, rank: int, size: int) -> dict[str, Any]:
    """Tokens, positions and mask [b, s/cp] of this rank, which sequence each belongs to, and the packing."""
    from megatron_hybrid.mcore.model import packed_sequences

    multiple = 2 * size if size > 1 else 1
    padded = [-(-n // multiple) * multiple for n in LENGTHS] if packed else [WIDTH] * len(LENGTHS)
    fields: dict[str, list[torch.Tensor]] = {"tokens": [], "positions": [], "sequence": []}
    for number, (ids, length) in enumerate(zip(sequences(), padded, strict=True)):
        row = torch.zeros(length, dtype=torch.long)
        row[: len(ids)] = ids
        here = share(length, rank, size)
        for name, values in (("tokens", row[here]), ("positions", here), ("sequence", torch.full_like(here, number))):
            fields[name].append(values)
    found: dict[str, Any] = {
        name: torch.cat(rows).unsqueeze(0) if packed else torch.stack(rows) for name, rows in fields.items()
    }
    found["mask"] = found["positions"] < torch.tensor(LENGTHS)[found["sequence"]]
    found["packing"] = packed_sequences(torch.tensor([0, *padded]).cumsum(0)) if packed else None
    return found


def sliced_step(overrides: dict[str, Any], packed: bool = False) -> dict[str, Any]:
    """Logits [n, v/tp] of this rank's positions, and its shards of the finalized gradient of their weighted sum."""
    from megatron_hybrid.mcore.groups import parallel_context
    from tests.tiny import megatron, set_weights, start

    with megatron(**MODEL | overrides, no_check_for_nan_in_loss_and_grad=True) as args:
        model = start(args, ddp=True)
        set_weights(model)
        parallel = parallel_context()
        given = inputs(packed, parallel.cp.rank, parallel.cp.size)
        mask = given["mask"]
        sequence, position = given["sequence"][mask], given["positions"][mask]

        found: list[torch.Tensor] = []

        def forward(iterator: Any, chunk: Any) -> Any:
            logits = chunk(given["tokens"], given["positions"], None, packed_seq_params=given["packing"])

            def loss(output: torch.Tensor) -> Any:
                found.append(output.detach()[mask])
                mine = weights(output.shape[-1] * parallel.tp.size)[sequence, position].chunk(parallel.tp.size, dim=-1)
                total = (output[mask] * mine[parallel.tp.rank]).sum()
                return total, mask.sum().int(), {"loss": total.detach()}

            return logits, loss

        one_step(
            model,
            forward,
            seq_length=given["tokens"].shape[1] * parallel.cp.size,
            micro_batch_size=given["tokens"].shape[0],
        )
        return {
            "shards": shards(model),
            "tp": parallel.tp.rank,
            "logits": found[0],
            "sequence": sequence,
            "positions": position,
        }


def placed_logits(ranks: list[dict[str, Any]]) -> torch.Tensor:
    """[sequences, WIDTH, VOCAB]: what all ranks found, NaN where nobody did."""
    found = torch.full((len(LENGTHS), WIDTH, 64), torch.nan)
    for rank in ranks:
        width = rank["logits"].shape[-1]
        found[rank["sequence"], rank["positions"], rank["tp"] * width : (rank["tp"] + 1) * width] = rank["logits"]
    return found[..., :VOCAB]


@pytest.fixture(scope="module")
def one_rank(rank_pool):
    ranks = rank_pool(1, init=False).run(sliced_step, {})
    return placed_logits(ranks), whole(ranks)


@pytest.mark.parametrize(
    ("size", "overrides", "packed"),
    [
        pytest.param(1, {}, True, id="packed"),
        pytest.param(2, SP, False, id="TP 2 + SP"),
        pytest.param(2, SP, True, id="TP 2 + SP, packed"),
        pytest.param(2, CP, False, id="CP 2"),
        pytest.param(2, CP, True, id="CP 2, packed"),
        pytest.param(4, SP | CP, True, id="TP 2 + SP x CP 2, packed"),
        pytest.param(4, {"context_parallel_size": 4}, False, id="CP 4"),
    ],
)
def test_logits_and_gradients_are_those_of_one_padded_rank(rank_pool, one_rank, size, overrides, packed):
    ranks = rank_pool(size, init=False).run(sliced_step, overrides, packed)
    logits, gradients = one_rank
    # fp32 sums in another order, logits of order 10: a few roundings.
    torch.testing.assert_close(placed_logits(ranks), logits, rtol=0, atol=2e-5, equal_nan=True)
    assert_same(whole(ranks), gradients)


# One attention layer.


@pytest.fixture
def layer():
    """`layer(**settings of its configuration)`: Megatron's own attention, stand-ins in place."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_hybrid.runtime import cpu

    def build(**settings: Any) -> DotProductAttention:
        config = TransformerConfig(
            **{"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "attention_dropout": 0.0} | settings
        )
        groups = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1, rank=lambda: 0))
        return DotProductAttention(
            config=config,
            layer_number=1,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            pg_collection=groups,
        )

    with cpu.enabled():
        random.model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0)
        parallel_state._set_global_memory_buffer()
        yield build
    parallel_state.destroy_global_memory_buffer()
    random.initialize_rng_tracker(force_reset=True)


def qkv(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return list(torch.randn(3, 8, 1, 2, 8).to(dtype).unbind(0))


def packing(*starts: int, **fields: Any) -> Any:
    return SimpleNamespace(
        **{"qkv_format": "thd", "cu_seqlens_q": torch.tensor(starts, dtype=torch.int32), "cu_seqlens_q_padded": None}
        | fields
    )


def test_plain_attention_runs_the_original_code(layer):
    attention, tensors = layer(), qkv()
    original = type(attention).forward.__wrapped__
    assert torch.equal(attention(*tensors, None), original(attention, *tensors, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_sequences_attend_as_if_each_were_alone(layer, dtype):
    attention = layer(bf16=dtype == torch.bfloat16)
    q, k, v = qkv(dtype)
    packed = attention(q.squeeze(1), k.squeeze(1), v.squeeze(1), None, packed_seq_params=packing(0, 3, 8))
    for part in (slice(0, 3), slice(3, 8)):
        alone = attention(q[part], k[part], v[part], None)
        # Same products and softmax over the same numbers; masked ones add exact zeros. One rounding of either dtype.
        torch.testing.assert_close(packed[part], alone, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_padding_between_packed_sequences_is_where_the_padded_borders_say(layer):
    attention, (q, k, v) = layer(), qkv()
    borders = packing(0, 2, 6, cu_seqlens_q_padded=torch.tensor([0, 4, 8]))
    packed = attention(q.squeeze(1), k.squeeze(1), v.squeeze(1), None, packed_seq_params=borders)
    torch.testing.assert_close(packed[4:], attention(q[4:], k[4:], v[4:], None), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"attention_dropout": 0.1}, "attention dropout 0.1"),
        ({"window_size": (2, 0)}, "sliding-window"),
        ({"softmax_type": "learnable"}, "softmax offset"),
    ],
)
def test_what_it_cannot_do_is_refused(layer, settings, named):
    q, k, v = qkv()
    with pytest.raises(ConfigError, match=f"{named}.* does not go with packed sequences"):
        layer(**settings)(q.squeeze(1), k.squeeze(1), v.squeeze(1), None, packed_seq_params=packing(0, 8))
    with pytest.raises(ConfigError, match=f"{named}.* does not go with --context-parallel-size above 1"):
        layer(**settings, context_parallel_size=2)


def test_masks_that_are_not_causal_and_biases_are_refused(layer):
    from megatron.core.transformer.enums import AttnMaskType

    q, k, v = (x.squeeze(1) for x in qkv())
    with pytest.raises(ConfigError, match="attention mask type 'no_mask'"):
        layer()(q, k, v, None, attn_mask_type=AttnMaskType.no_mask, packed_seq_params=packing(0, 8))
    with pytest.raises(ConfigError, match="an attention bias"):
        layer()(q, k, v, None, attention_bias=torch.zeros(1), packed_seq_params=packing(0, 8))


def test_borders_that_leave_positions_to_nobody_are_refused(layer):
    q, k, v = (x.squeeze(1) for x in qkv())
    with pytest.raises(ShapeError, match="end at 6, but the row has 8 positions"):
        layer()(q, k, v, None, packed_seq_params=packing(0, 6))
    with pytest.raises(ConfigError, match="layout 'sbhd'"):
        layer()(q, k, v, None, packed_seq_params=packing(0, 8, qkv_format="sbhd"))


def test_packed_sequences_that_context_parallel_ranks_cannot_share_are_refused(layer):
    q, k, v = (x.squeeze(1)[:4] for x in qkv())  # this rank's half
    attention = layer(context_parallel_size=2)
    attention.pg_collection.cp = None  # not reached
    with pytest.raises(ShapeError, match=r"lengths \[3, 5\].* 2 context-parallel ranks .*multiple of 4"):
        attention(q, k, v, None, packed_seq_params=packing(0, 3, 8))


def test_a_norm_is_marked_under_sequence_parallelism_only(layer):
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2, normalization="RMSNorm")
    plain = WrappedTorchNorm(config=config, hidden_size=16, eps=1e-5)
    config.sequence_parallel = True
    marked = WrappedTorchNorm(config=config, hidden_size=16, eps=1e-5)
    assert type(plain) is type(marked) is torch.nn.RMSNorm
    assert marked.weight.sequence_parallel and not hasattr(plain.weight, "sequence_parallel")
    assert config.sequence_parallel
