"""Llama-shaped models between Hugging Face and Megatron: names and layouts. Pure tensor work, bit-exact.

Megatron names are those of its checkpoints on disk (Transformer Engine's; both layer specs write them), per layer i:

    decoder.layers.i.self_attention.linear_qkv.layer_norm_weight   [h]                input_layernorm
    decoder.layers.i.self_attention.linear_qkv.weight   [g * (n/g + 2) * d, h]        per group: its q heads, k, v
    decoder.layers.i.self_attention.linear_qkv.bias     [g * (n/g + 2) * d]           the same rows (Qwen2 only)
    decoder.layers.i.self_attention.{q,k}_layernorm.weight   [d]                      q_norm, k_norm (Qwen3 only)
    decoder.layers.i.self_attention.linear_proj.weight  [h, n * d]                    o_proj
    decoder.layers.i.mlp.linear_fc1.layer_norm_weight   [h]                           post_attention_layernorm
    decoder.layers.i.mlp.linear_fc1.weight              [2 * ffn, h]                  gate over up
    decoder.layers.i.mlp.linear_fc2.weight              [h, ffn]                      down_proj
    embedding.word_embeddings.weight, output_layer.weight (untied only)  [v_padded, h],   decoder.final_layernorm.weight

Letters: h hidden, n query heads, g key-value groups, d head size, v vocabulary. Rotary halves need no permutation:
Hugging Face rotates halves, as Megatron does without --rotary-interleaved. Rows at or beyond v are zero padding.
Not here: the arguments (`hf_config.py`), reading or writing Megatron's files (`mcore/checkpoint_io.py`).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_hybrid.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

_EMBEDDING = "embedding.word_embeddings.weight"
_HEAD = "output_layer.weight"
_OUTER = {
    "model.embed_tokens.weight": _EMBEDDING,
    "lm_head.weight": _HEAD,
    "model.norm.weight": "decoder.final_layernorm.weight",
}
_INNER = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "post_attention_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
}
_HEAD_NORMS = {f"self_attn.{part}_norm.weight": f"self_attention.{part}_layernorm.weight" for part in "qk"}
_QKV = "self_attention.linear_qkv."
_FC1 = "mlp.linear_fc1.weight"


def hf_to_megatron(state: "Mapping[str, Tensor]", args: Mapping[str, Any]) -> "dict[str, Tensor]":
    """A Hugging Face state dict under Megatron's names and layouts; values unchanged, bit for bit.

    args  from `hf_config.hf_config_to_megatron_args`
    """
    import torch

    left = {name: value for name, value in state.items() if not name.endswith("rotary_emb.inv_freq")}
    if not args["untie_embeddings_and_output_weights"]:
        left.pop("lm_head.weight", None)  # the embedding under a second name

    def take(name: str) -> "Tensor":
        if name not in left:
            raise DataError(f"the Hugging Face checkpoint has no tensor {name!r}, which a Llama-shaped model needs.")
        return left.pop(name)

    out = {}
    for hf, megatron in _OUTER.items():
        if megatron == _HEAD and not args["untie_embeddings_and_output_weights"]:
            continue
        out[megatron] = take(hf)
        if megatron in (_EMBEDDING, _HEAD):
            out[megatron] = _pad_rows(out[megatron], rows=args["padded_vocab_size"], vocab=args["vocab_size"], name=hf)
    for layer in range(args["num_layers"]):
        source, target = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        for hf, megatron in _inner(args).items():
            out[target + megatron] = take(source + hf)
        for kind in _qkv_kinds(args):
            q, k, v = (take(f"{source}self_attn.{part}_proj.{kind}") for part in "qkv")
            out[target + _QKV + kind] = _interleave(q, k, v, groups=args["num_query_groups"])
        gate, up = (take(f"{source}mlp.{part}_proj.weight") for part in ("gate", "up"))
        out[target + _FC1] = torch.cat([gate, up])
    if left:
        raise DataError(
            f"{len(left)} tensors have no place in a Llama-shaped Megatron model, among them {sorted(left)[:3]}: "
            "the converted model would not be the same. Biases are known of Qwen2's q, k and v, norms of heads of "
            "Qwen3's q and k, and no others."
        )
    return out


def megatron_to_hf(state: "Mapping[str, Tensor]", args: Mapping[str, Any]) -> "dict[str, Tensor]":
    """The inverse of `hf_to_megatron`: contiguous tensors of their own, vocabulary padding cut off."""
    left = dict(state)

    def take(name: str) -> "Tensor":
        if name not in left:
            raise DataError(f"the Megatron checkpoint has no tensor {name!r}, which a Llama-shaped model needs.")
        return left.pop(name)

    out = {}
    for hf, megatron in _OUTER.items():
        if megatron == _HEAD and not args["untie_embeddings_and_output_weights"]:
            continue
        value = take(megatron)
        out[hf] = value[: args["vocab_size"]].clone() if megatron in (_EMBEDDING, _HEAD) else value
    for layer in range(args["num_layers"]):
        source, target = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for hf, megatron in _inner(args).items():
            out[target + hf] = take(source + megatron)
        for kind in _qkv_kinds(args):
            whole = take(source + _QKV + kind)
            parts = _separate(whole, groups=args["num_query_groups"], head_size=args["kv_channels"])
            for part, value in zip("qkv", parts, strict=True):
                out[f"{target}self_attn.{part}_proj.{kind}"] = value
        gate, up = take(source + _FC1).chunk(2)
        out[f"{target}mlp.gate_proj.weight"], out[f"{target}mlp.up_proj.weight"] = gate.clone(), up.clone()
    if left:
        raise DataError(
            f"{len(left)} tensors have no place in a Llama-shaped model of Hugging Face, among them {sorted(left)[:3]}."
        )
    return out


def _inner(args: Mapping[str, Any]) -> dict[str, str]:
    """Names within a layer of what is the same tensor on both sides."""
    return _INNER | (_HEAD_NORMS if args.get("qk_layernorm") else {})


def _qkv_kinds(args: Mapping[str, Any]) -> tuple[str, ...]:
    return ("weight", "bias") if args.get("add_qkv_bias") else ("weight",)


def _interleave(q: "Tensor", k: "Tensor", v: "Tensor", *, groups: int) -> "Tensor":
    """Rows n*d, g*d, g*d to g * (n/g + 2) * d, of [.., h] or of a bias: a tensor-parallel cut keeps whole groups."""
    import torch

    row = q.shape[1:]
    return torch.cat([part.view(groups, -1, *row) for part in (q, k, v)], dim=1).reshape(-1, *row)


def _separate(qkv: "Tensor", *, groups: int, head_size: int) -> "tuple[Tensor, ...]":
    """The inverse of `_interleave`."""
    row = qkv.shape[1:]
    grouped = qkv.view(groups, -1, *row)
    sizes = [grouped.shape[1] - 2 * head_size, head_size, head_size]
    return tuple(part.reshape(-1, *row).clone() for part in grouped.split(sizes, dim=1))


def _pad_rows(weight: "Tensor", *, rows: int, vocab: int, name: str) -> "Tensor":
    """[v, h] to [rows, h], zeros below."""
    if weight.shape[0] != vocab:
        raise DataError(f"{name} has {weight.shape[0]} rows, config.json says vocab_size {vocab}: they must agree.")
    padded = weight.new_zeros(rows, weight.shape[1])
    padded[:vocab] = weight
    return padded
