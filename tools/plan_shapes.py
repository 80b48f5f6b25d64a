"""Shapes of models, by name or from Megatron's own arguments. No torch.

One dense GPT each: Llama- or Qwen-shaped, gated or plain MLP, grouped queries. Not here: experts, latent attention,
state space layers, biases of all linear layers: refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_hybrid.errors import ConfigError


@dataclass(frozen=True)
class Shape:
    """One model."""

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    """Heads of keys and values."""
    head_dim: int
    vocab: int
    """True vocabulary, the tokenizer's."""
    tied: bool = False
    """Embedding and output layer are one weight."""
    gated: bool = True
    """Three matrices in an MLP (SwiGLU), not two."""
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_size: int = 1
    """Numbers per channel of a norm: 1 RMSNorm, 2 LayerNorm."""

    @classmethod
    def of_args(cls, name: str, args: Mapping[str, Any]) -> "Shape":
        """From Megatron's own arguments, as a checkpoint stores them.

        Raises:
            ConfigError: the model is none that a plan knows.
        """
        for key in ("num_experts", "multi_latent_attention", "hybrid_layer_pattern", "add_bias_linear"):
            if args.get(key):
                raise ConfigError(
                    f"{name} was saved with {key}={args[key]!r}: the plan counts dense GPTs without biases in their "
                    "linear layers only, and other numbers would be wrong. Plan with --layers, --hidden and so on of a "
                    "dense model of that size."
                )
        heads = int(args["num_attention_heads"])
        return cls(
            name,
            layers=int(args["num_layers"]),
            hidden=int(args["hidden_size"]),
            ffn=int(args["ffn_hidden_size"]),
            heads=heads,
            groups=int(args["num_query_groups"]) if args.get("group_query_attention") else heads,
            head_dim=int(args["kv_channels"]),
            vocab=int(args.get("vocab_size") or args["padded_vocab_size"]),
            tied=not args["untie_embeddings_and_output_weights"],
            gated=bool(args["swiglu"]),
            qkv_bias=bool(args.get("add_qkv_bias")),
            qk_norm=bool(args.get("qk_layernorm")),
            norm_size=1 if args["normalization"] == "RMSNorm" else 2,
        )


PRESETS = {
    shape.name: shape
    for shape in (
        Shape("llama-1b", 16, 2048, 8192, 32, 8, 64, 128256, tied=True),
        Shape("llama-8b", 32, 4096, 14336, 32, 8, 128, 128256),
        Shape("llama-70b", 80, 8192, 28672, 64, 8, 128, 128256),
        Shape("llama-405b", 126, 16384, 53248, 128, 8, 128, 128256),
        Shape("qwen3-8b", 36, 4096, 12288, 32, 8, 128, 151936, qk_norm=True),
        Shape("qwen3-32b", 64, 5120, 25600, 64, 8, 128, 151936, qk_norm=True),
    )
}
"""Shapes by name, from the models' own config.json."""
