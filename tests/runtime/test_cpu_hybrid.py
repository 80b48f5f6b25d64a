"""HybridModel without Transformer Engine: the architecture and the checkpoint names of Megatron's own stack."""

from __future__ import annotations

from typing import Any

import pytest

from tests.recorded_jobs import refused


def names(pattern: str) -> tuple[list[str], list[str]]:
    """Class of each layer, and the names the model's tensors have in a checkpoint."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from tests.tiny import megatron, start

    with megatron(hybrid_layer_pattern=pattern, num_layers=None) as args:
        (model,) = start(args)
        state = model.sharded_state_dict()
        keys = [value.key for value in nested_values(state) if isinstance(value, ShardedTensor)]
        return [type(layer).__name__ for layer in model.decoder.layers], keys


def test_layers_and_checkpoint_names_are_those_of_transformer_engines_stack(rank_pool: Any):
    layers, keys = rank_pool(1, init=False).run(names, "*-")[0]
    assert layers == ["TransformerLayer", "MLPLayer"]
    assert {
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.1.mlp.linear_fc1.layer_norm_weight",
        "decoder.final_norm.weight",
    } <= set(keys)
    assert not [key for key in keys if "input_layernorm" in key or "pre_mlp_layernorm" in key]


@pytest.mark.parametrize("pattern", ["M-", "G-"])
def test_layers_that_need_a_gpu_are_refused(rank_pool: Any, pattern: str):
    said = rank_pool(1, init=False).run(refused, names, pattern)[0]
    assert said.startswith("ConfigError") and "names a Mamba, gated delta net or latent attention layer" in said
