"""The architecture of a Llama-shaped model as Hugging Face's config.json and as Megatron's arguments, both ways.

Plain values in, plain values out; whatever the other side cannot express is refused, never dropped. Needs no torch.
"""

from collections.abc import Mapping
from typing import Any

from megatron_hybrid.errors import DataError

_VALUED_FLAGS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "max_position_embeddings",
    "position_embedding_type",
    "rotary_base",
    "normalization",
    "norm_epsilon",
    "attention_dropout",
    "hidden_dropout",
    "make_vocab_size_divisible_by",
)


def hf_config_to_megatron_args(config: Mapping[str, Any], *, pad_vocab_to: int | None = None) -> dict[str, Any]:
    """The Megatron arguments that a model of this config.json needs, under the names Megatron's `args` uses.

    config        Hugging Face configuration of a Llama-shaped model, as plain values
    pad_vocab_to  rows of the embedding; None: the vocabulary rounded up to 128, as Megatron does at tp = 1
    """
    _refuse_what_llama_lacks(config)
    heads, hidden, vocab = config["num_attention_heads"], config["hidden_size"], config["vocab_size"]
    groups = config.get("num_key_value_heads") or heads
    padded = -(-vocab // 128) * 128 if pad_vocab_to is None else pad_vocab_to
    if padded < vocab:
        raise DataError(
            f"--pad-vocab-to {padded} is below the vocabulary of {vocab}: rows would be lost. Use {vocab} or more."
        )
    epsilon = config["rms_norm_eps"]
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": hidden,
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "kv_channels": config.get("head_dim") or hidden // heads,
        "max_position_embeddings": config["max_position_embeddings"],
        "position_embedding_type": "rope",
        "rotary_base": int(_rope(config)["rope_theta"]),
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "normalization": "RMSNorm",
        "norm_epsilon": epsilon,
        "layernorm_epsilon": epsilon,  # the same flag, --norm-epsilon, lands in this name since 0.19
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "attention_dropout": float(config.get("attention_dropout", 0.0)),
        "hidden_dropout": 0.0,
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "make_vocab_size_divisible_by": 128 if padded % 128 == 0 else padded,
        "vocab_size": vocab,
        "padded_vocab_size": padded,
    }


def megatron_args_to_hf_config(args: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model saved with these Megatron arguments. Ids of special tokens are the tokenizer's."""
    expected = {"position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False}
    for name, value in expected.items():
        if args.get(name) != value:
            raise DataError(
                f"a Llama-shaped model has {name}={value!r}, this checkpoint has {args.get(name)!r}: "
                "it cannot be written as a Hugging Face Llama."
            )
    epsilon = args.get("layernorm_epsilon", args.get("norm_epsilon"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": args["num_layers"],
        "hidden_size": args["hidden_size"],
        "intermediate_size": args["ffn_hidden_size"],
        "num_attention_heads": args["num_attention_heads"],
        "num_key_value_heads": args["num_query_groups"]
        if args["group_query_attention"]
        else args["num_attention_heads"],
        "head_dim": args["kv_channels"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": args.get("attention_dropout", 0.0),
        "max_position_embeddings": args["max_position_embeddings"],
        "rope_parameters": {"rope_theta": float(args["rotary_base"]), "rope_type": "default"},
        "rope_theta": float(args["rotary_base"]),  # where transformers looked before version 5
        "rms_norm_eps": epsilon,
        "tie_word_embeddings": not args["untie_embeddings_and_output_weights"],
        "vocab_size": args["vocab_size"],
    }


def megatron_flags(args: Mapping[str, Any]) -> list[str]:
    """The command line that builds the same model where --use-checkpoint-args is not wanted."""
    flags = ["--disable-bias-linear", "--swiglu"]
    if args["group_query_attention"]:
        flags += ["--group-query-attention", "--num-query-groups", str(args["num_query_groups"])]
    if args["untie_embeddings_and_output_weights"]:
        flags.append("--untie-embeddings-and-output-weights")
    for name in _VALUED_FLAGS:
        flags += [f"--{name.replace('_', '-')}", str(args[name])]
    return flags


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings, which moved from the top level into `rope_parameters` in transformers 5."""
    inside = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    return {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": "default", **scaling, **inside}


def _refuse_what_llama_lacks(config: Mapping[str, Any]) -> None:
    """Settings that change the computation and that this mapping would silently lose."""
    wanted: dict[str, tuple[Any, ...]] = {
        "model_type": ("llama",),
        "hidden_act": ("silu",),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "quantization_config": (None,),
    }
    for name, allowed in wanted.items():
        value = config.get(name)
        if value not in allowed:
            raise DataError(
                f"config.json has {name}={value!r}, this conversion knows {allowed[0]!r} only: another model "
                "would be computed. Convert such a model with Megatron-Bridge."
            )
    rope = _rope(config)
    if rope["rope_type"] != "default":
        raise DataError(
            f"config.json scales rotary positions ({rope['rope_type']!r}), this conversion knows plain ones only: "
            "long contexts would differ. Convert such a model with Megatron-Bridge."
        )
