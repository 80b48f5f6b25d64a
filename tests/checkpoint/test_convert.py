import pytest
import torch

from megatron_hybrid.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megatron_hybrid.checkpoint.hf_config import hf_config_to_megatron_args
from megatron_hybrid.errors import DataError
from tests.checkpoint.tiny_llama import RELATIVES, VOCAB, make_model


def converted(**settings):
    model = make_model(**settings)
    args = hf_config_to_megatron_args(model.config.to_dict())
    return model, args, hf_to_megatron(model.state_dict(), args)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("relative", RELATIVES)
def test_the_round_trip_is_bit_exact(relative, tied):
    model, args, state = converted(tied=tied, **RELATIVES[relative])
    back = megatron_to_hf(state, args)
    expected = dict(model.state_dict())
    if tied:
        del expected["lm_head.weight"]  # the embedding's second name
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], expected[name]) for name in expected)


def test_each_group_has_its_query_heads_then_key_then_value():
    # 4 heads of size 1 in 2 groups, hidden 1: the rows are their own names.
    args = {"num_layers": 1, "num_query_groups": 2, "kv_channels": 1, "vocab_size": 1, "padded_vocab_size": 1}
    args["untie_embeddings_and_output_weights"] = False
    layer = "model.layers.0."
    state = {
        f"{layer}self_attn.{part}_proj.weight": rows
        for part, rows in (
            ("q", torch.tensor([[1.0], [2.0], [3.0], [4.0]])),
            ("k", torch.tensor([[10.0], [20.0]])),
            ("v", torch.tensor([[100.0], [200.0]])),
            ("o", torch.zeros(1, 4)),
        )
    }
    state |= {
        f"{layer}mlp.{part}_proj.weight": torch.full((2, 1), value) for part, value in (("gate", 5.0), ("up", 6.0))
    }
    state |= {f"{layer}mlp.down_proj.weight": torch.zeros(1, 2), "model.embed_tokens.weight": torch.zeros(1, 1)}
    state |= {
        name: torch.ones(1)
        for name in (f"{layer}input_layernorm.weight", f"{layer}post_attention_layernorm.weight", "model.norm.weight")
    }
    out = hf_to_megatron(state, args)
    qkv = out["decoder.layers.0.self_attention.linear_qkv.weight"].flatten().tolist()
    assert qkv == [1.0, 2.0, 10.0, 100.0, 3.0, 4.0, 20.0, 200.0]
    assert out["decoder.layers.0.mlp.linear_fc1.weight"].flatten().tolist() == [5.0, 5.0, 6.0, 6.0]


def test_biases_go_where_the_rows_of_their_weights_go():
    model, args, state = converted(model_type="qwen2")
    with torch.no_grad():  # each bias becomes the first column of its weight
        for name, bias in model.named_parameters():
            if name.endswith("bias"):
                model.get_parameter(name.replace("bias", "weight"))[:, 0] = bias
    state = hf_to_megatron(model.state_dict(), args)
    qkv = "decoder.layers.1.self_attention.linear_qkv."
    assert torch.equal(state[f"{qkv}bias"], state[f"{qkv}weight"][:, 0])


def test_vocabulary_padding_is_zero_and_leaves_again():
    model, args, state = converted(tied=False)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert state[name].shape == (128, 32)
        assert state[name][VOCAB:].count_nonzero() == 0
    assert megatron_to_hf(state, args)["lm_head.weight"].shape == (VOCAB, 32)


def test_a_tied_model_has_no_head_of_its_own():
    _, _, state = converted(tied=True)
    assert "output_layer.weight" not in state


def test_exported_tensors_share_no_storage():
    # safetensors refuses tensors that overlap, and an export should not hold the padded embedding alive
    _, args, state = converted(tied=False)
    pointers = [value.untyped_storage().data_ptr() for value in megatron_to_hf(state, args).values()]
    assert len(set(pointers)) == len(pointers)


def test_a_missing_tensor_is_named():
    model = make_model()
    args = hf_config_to_megatron_args(model.config.to_dict())
    state = dict(model.state_dict())
    del state["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(DataError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        hf_to_megatron(state, args)


def test_a_tensor_without_a_place_is_refused():
    model = make_model()
    args = hf_config_to_megatron_args(model.config.to_dict())
    state = {**model.state_dict(), "model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}
    with pytest.raises(DataError, match="q_proj.bias"):
        hf_to_megatron(state, args)
    _, args, state = converted()
    with pytest.raises(DataError, match="linear_fc1.bias"):
        megatron_to_hf({**state, "decoder.layers.0.mlp.linear_fc1.bias": torch.zeros(2)}, args)
