"""Megatron's HybridModel without Transformer Engine: its attention, MLP and expert layers from Megatron's torch ones.

Megatron has local layers for GPTModel only; its one stack for HybridModel names Transformer Engine's, and so does the
stack's final norm. `stand_ins` gives `cpu.enable` a stack of the same architecture, checkpoint names included.

Declined with a sentence: patterns with Mamba, gated delta net or latent attention layers, which need a GPU.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from typing import Any

from megatron_hybrid.errors import ConfigError


class _OnlyOnGPU:
    """In the place of layers that cannot be built here; left out of the stack, they would be built as nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ConfigError(
            "--hybrid-layer-pattern names a Mamba, gated delta net or latent attention layer, which needs a GPU. "
            "Without one only attention (*), MLP (-) and expert (E) layers can be built."
        )


def stand_ins() -> list[tuple[Any, str, Any]]:
    """(module, name, value) of what HybridModel is built from on the CPU; before Megatron 0.18 there is none."""
    if importlib.util.find_spec("megatron.core.models.hybrid") is None:
        return []
    return [
        (
            importlib.import_module("megatron.core.models.hybrid.hybrid_block"),
            "TENorm",
            importlib.import_module("megatron.core.transformer.torch_norm").WrappedTorchNorm,
        ),
        (importlib.import_module("megatron.training.models.hybrid"), "default_hybrid_stack_spec", _local_stack()),
    ]


def _local_stack() -> Any:
    """Attention, MLP and expert layers, each with its norm in front, as a spec that HybridModel takes."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import (
        MoETransformerLayer,
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    # Named so, the norm is the torch one, which takes LayerNorm or RMSNorm from the configuration.
    dense = get_gpt_layer_local_submodules(normalization="RMSNorm")
    experts = get_gpt_layer_local_submodules(normalization="RMSNorm", num_experts=1)  # the configuration has the number
    attention = TransformerLayerSubmodules(
        input_layernorm=dense.input_layernorm,
        self_attention=dense.self_attention,
        self_attn_bda=dense.self_attn_bda,
        # Transformer Engine holds a norm in the layer behind it: checkpoints name it so.
        sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=dense.pre_mlp_layernorm,
        mlp=dense.mlp,
        mlp_bda=dense.mlp_bda,
        sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
    )
    moe = TransformerLayerSubmodules(
        pre_mlp_layernorm=experts.pre_mlp_layernorm, mlp=experts.mlp, mlp_bda=experts.mlp_bda
    )
    names = [field.name for field in dataclasses.fields(HybridStackSubmodules)]  # they differ from version to version
    layers = {name: _OnlyOnGPU for name in names if name.endswith("_layer")} | {
        "attention_layer": ModuleSpec(module=TransformerLayer, submodules=attention),
        "mlp_layer": ModuleSpec(module=MLPLayer, submodules=mlp),
        "moe_layer": ModuleSpec(module=MoETransformerLayer, submodules=moe),
    }
    return ModuleSpec(module=HybridStack, submodules=HybridStackSubmodules(**layers))
