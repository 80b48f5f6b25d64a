"""The architecture of a Llama-shaped model as Hugging Face's config.json and as Megatron's arguments, both ways.

    llama, SmolLM2's among them    the plain shape; also with Llama 3.1's rotary scaling
    mistral                        the same function while its sliding window holds every position
    qwen2                          biases on q, k and v                         --add-qkv-bias
    qwen3                          RMSNorm over each head's q and k             --qk-layernorm

On the way back a model is written as the first of these that computes it, so a Mistral comes back as a Llama, bit for
bit the same tensors. Plain values in, plain values out; whatever the other side cannot express is refused, never
dropped. Needs no torch.
"""

from collections.abc import Mapping
from typing import Any

from megatron_hybrid.checkpoint.llama_arguments import LLAMA3_ROPE, refuse_what_config_json_lacks
from megatron_hybrid.errors import DataError

_FAMILIES = {  # model_type: class, what it adds in Megatron's names
    "llama": ("LlamaForCausalLM", {"add_qkv_bias": False, "qk_layernorm": False}),
    "mistral": ("MistralForCausalLM", {"add_qkv_bias": False, "qk_layernorm": False}),
    "qwen2": ("Qwen2ForCausalLM", {"add_qkv_bias": True, "qk_layernorm": False}),
    "qwen3": ("Qwen3ForCausalLM", {"add_qkv_bias": False, "qk_layernorm": True}),
}
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
    # A head may have more rows than the tokenizer has tokens (Qwen's): these keep them, and take them back.
    "vocab_size",
    "padded_vocab_size",
)

_SWITCHES = ("add_qkv_bias", "qk_layernorm", "use_rope_scaling", "untie_embeddings_and_output_weights")


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
        "use_rope_scaling": _rope(config)["rope_type"] == "llama3",
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "normalization": "RMSNorm",
        "norm_epsilon": epsilon,
        "layernorm_epsilon": epsilon,  # the same flag, --norm-epsilon, lands in this name since 0.19
        "swiglu": True,
        "add_bias_linear": False,
        **_FAMILIES[config["model_type"]][1],
        "attention_dropout": float(config.get("attention_dropout", 0.0)),
        "hidden_dropout": 0.0,
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "make_vocab_size_divisible_by": 128 if padded % 128 == 0 else padded,
        "vocab_size": vocab,
        "padded_vocab_size": padded,
    }


def megatron_args_to_hf_config(args: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model saved with these Megatron arguments. Ids of special tokens are the tokenizer's."""
    refuse_what_config_json_lacks(args)
    rows, vocab = args.get("padded_vocab_size"), args["vocab_size"]
    if rows is not None and vocab is not None and rows < vocab:
        raise DataError(
            f"the embedding has {rows} rows and vocab_size is {vocab}: rows of the model that it was made from are "
            "gone, and whoever has loaded that one refuses these weights. Give the --padded-vocab-size that "
            "tools/convert_checkpoint.py hf-to-megatron prints; or no --vocab-size, for as many rows as the tokenizer "
            "has tokens."
        )
    family, architecture = _family(args)
    theta = float(args["rotary_base"])
    rope = LLAMA3_ROPE if args.get("use_rope_scaling") else {"rope_type": "default"}
    epsilon = args.get("layernorm_epsilon", args.get("norm_epsilon"))
    return {
        "architectures": [architecture],
        "model_type": family,
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
        "rope_parameters": {"rope_theta": theta, **rope},
        # Where transformers looked before version 5.
        "rope_theta": theta,
        "rope_scaling": rope if rope is LLAMA3_ROPE else None,
        "rms_norm_eps": epsilon,
        "tie_word_embeddings": not args["untie_embeddings_and_output_weights"],
        "vocab_size": args["vocab_size"],
    }


def megatron_flags(args: Mapping[str, Any]) -> list[str]:
    """The command line that builds the same model.

    --use-checkpoint-args of Megatron 0.19.2 restores most of it, but neither the epsilon of norms nor the norms of
    heads nor the scaling of rotary positions.
    """
    flags = ["--disable-bias-linear", "--swiglu"]
    flags += [f"--{name.replace('_', '-')}" for name in _SWITCHES if args.get(name)]
    if args["group_query_attention"]:
        flags += ["--group-query-attention", "--num-query-groups", str(args["num_query_groups"])]
    for name in _VALUED_FLAGS:
        flags += [f"--{name.replace('_', '-')}", str(args[name])]
    return flags


def _family(args: Mapping[str, Any]) -> tuple[str, str]:
    """model_type and class of the first family that computes what these arguments compute."""
    for family, (architecture, extras) in _FAMILIES.items():
        if all(bool(args.get(name)) == value for name, value in extras.items()):
            return family, architecture
    raise DataError(
        "the checkpoint has biases on q, k and v (add_qkv_bias) and norms of heads (qk_layernorm): Qwen2 has the one, "
        "Qwen3 the other, no model of Hugging Face that is known here has both."
    )


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings, which moved from the top level into `rope_parameters` in transformers 5; before 4.45 their kind
    was called `type`."""
    said = (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    kind = said.get("rope_type", said.get("type", "default"))
    return {"rope_theta": config.get("rope_theta", 10000.0)} | said | {"rope_type": kind}


def _refuse_what_llama_lacks(config: Mapping[str, Any]) -> None:
    """Settings that change the computation and that this mapping would silently lose."""
    wanted: dict[str, tuple[Any, ...]] = {
        "model_type": tuple(_FAMILIES),
        "hidden_act": ("silu",),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "quantization_config": (None,),
    }
    for name, allowed in wanted.items():
        value = config.get(name)
        if value not in allowed:
            raise DataError(
                f"config.json has {name}={value!r}, this conversion knows {', '.join(map(repr, allowed))}: "
                "another model would be computed. Convert such a model with Megatron-Bridge."
            )
    _refuse_windows(config)
    _refuse_rotations(_rope(config))


def _refuse_windows(config: Mapping[str, Any]) -> None:
    """A window as wide as the positions never acts. Mistral has one unless told otherwise, Qwen only if told so."""
    if config["model_type"] == "mistral":
        window = config.get("sliding_window", 4096)
    else:
        window = config.get("sliding_window") if config.get("use_sliding_window") else None
    if window is not None and window < config["max_position_embeddings"]:
        raise DataError(
            f"config.json has a sliding window of {window} tokens and {config['max_position_embeddings']} positions: "
            "the converted model would look further back than this one. For sequences up to the window they are the "
            f"same: set max_position_embeddings to {window} in config.json, and --seq-length to no more."
        )


def _refuse_rotations(rope: Mapping[str, Any]) -> None:
    kind = rope["rope_type"]
    wanted = LLAMA3_ROPE if kind == "llama3" else {"rope_type": "default"}
    different = {name: rope.get(name) for name, value in wanted.items() if rope.get(name) != value}
    if different:
        raise DataError(
            f"config.json scales rotary positions ({kind!r}) with {different}, Megatron can rotate plainly or by Llama "
            f"3.1's {LLAMA3_ROPE}: every position would be turned otherwise. Convert such a model with "
            "Megatron-Bridge, and give Megatron a model provider that passes its numbers on."
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or rope["rope_theta"] != int(rope["rope_theta"]):
        raise DataError(
            f"config.json has rope_theta={rope['rope_theta']} and partial_rotary_factor="
            f"{rope.get('partial_rotary_factor', 1.0)}: whole heads and a whole number (--rotary-base) were expected, "
            "the rest would be lost. Convert such a model with Megatron-Bridge."
        )
