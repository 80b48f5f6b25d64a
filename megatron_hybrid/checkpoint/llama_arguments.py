"""Megatron's arguments of an architecture as a Llama-shaped model has them: those that config.json says, and the value
of each other one. Every name of `mcore/architecture.py` is one or the other, and none is passed over. Needs no torch.
"""

from collections.abc import Mapping
from typing import Any

from megatron_hybrid.errors import DataError
from megatron_hybrid.mcore.architecture import ARCHITECTURE, OLDER_NAMES

# Llama 3.1's, the only numbers that Megatron's --use-rope-scaling has: 0.19.2 reads --rope-scaling-factor and drops it.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SAID = frozenset({
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "group_query_attention",
    "kv_channels", "max_position_embeddings", "untie_embeddings_and_output_weights", "rotary_base", "use_rope_scaling",
    "layernorm_epsilon", "add_qkv_bias", "qk_layernorm",
})  # fmt: skip
"""What config.json has a place for."""
NEEDED = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
}
"""Not Megatron's defaults: a checkpoint has to say them."""
PLAIN: dict[str, Any] = {
    "spec": None,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "rope_scaling_factor": LLAMA3_ROPE["factor"],
    "no_rope_freq": None,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "squared_relu": False,
    "quick_geglu": False,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "use_mup": False,
    "qk_l2_norm": False,
    "softmax_type": "vanilla",
    "attention_output_gate": False,
    "window_size": None,
    "multi_latent_attention": False,
    "experimental_attention_variant": None,
    "hybrid_layer_pattern": None,
    "is_hybrid_model": False,
    "num_experts": None,
}
"""Megatron's defaults, which hold where a checkpoint says nothing."""
WITHOUT_EFFECT = (
    "bias_gelu_fusion",  # beside swiglu
    "apply_query_key_layer_scaling",  # divides by a number and multiplies with it
    "rope_type", "rotary_scaling_factor", "mscale", "yarn_", "mrope_section",  # of other kinds of positions
    "mup_",  # of use_mup
    "window_attn_skip_freq",  # of window_size
    "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim",  # of multi_latent_attention
    "dsa_indexer_", "linear_",  # of experimental_attention_variant
    "mamba_",  # of hybrid_layer_pattern
    "moe_",  # of num_experts
)  # fmt: skip
"""Beginnings of names that do nothing while the settings above are a Llama's."""


def refuse_what_config_json_lacks(args: Mapping[str, Any]) -> None:
    """Raises DataError where a model's arguments say another function than config.json could."""
    for name in ARCHITECTURE:
        if name in SAID or name.startswith(WITHOUT_EFFECT):
            continue
        wanted = (NEEDED | PLAIN)[name]
        keys = [key for key in (name, OLDER_NAMES.get(name, name)) if key in args]
        given = args[keys[0]] if keys else PLAIN.get(name)
        if given != wanted:
            raise DataError(
                f"a Llama-shaped model has {name}={wanted!r}, this one has {given!r}: it cannot be written as one for "
                "Hugging Face."
            )
