"""What a model folder says of itself, read from metadata alone: no tensor is loaded, however large the model is.

    Megatron folder (torch_dist)   its index of tensors, its arguments, its iteration
    Hugging Face folder            the headers of its *.safetensors, config.json

Tensors are named and shaped as on disk: Megatron stacks its layers along the first axis. Collectives: none.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from megatron_hybrid.checkpoint.folders import read_hf_config
from megatron_hybrid.errors import DataError

_LAYOUT = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "VPP": "virtual_pipeline_model_parallel_size",
    "CP": "context_parallel_size",
    "EP": "expert_model_parallel_size",
    "DP": "data_parallel_size",
}
_WIDTHS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint, unread."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As torch names it, without `torch.`."""
    trained: bool
    """A parameter of the model; else optimizer or random state."""

    @property
    def num_values(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Inspection:
    """A folder's account of itself."""

    kind: str
    facts: tuple[tuple[str, str], ...]
    """Name and value, in the order in which they are to be read."""
    tensors: tuple[TensorEntry, ...]


def inspect_folder(folder: str | Path) -> Inspection:
    """What `folder` holds: a Hugging Face model, a Megatron checkpoint, or one iteration of it.

    Raises:
        DataError: neither is there, or its files cannot be read.
    """
    folder = Path(folder)
    return _inspect_hf(folder) if (folder / "config.json").exists() else _inspect_megatron(folder)


def _inspect_megatron(folder: Path) -> Inspection:
    from megatron_hybrid.mcore.checkpoint_io import MODEL_TENSORS, checkpoint_folder, load_metadata

    common, tensors = load_metadata(folder)
    args = dict(vars(common["args"])) if common.get("args") is not None else {}
    entries = tuple(
        TensorEntry(name, shape, str(dtype).removeprefix("torch."), name.startswith(MODEL_TENSORS))
        for name, (shape, dtype) in sorted(tensors.items())
    )
    facts = [("folder", str(checkpoint_folder(folder))), *_training(common, args)]
    if args:
        facts += [
            ("saved with", " x ".join(f"{short} {args.get(name) or 1}" for short, name in _LAYOUT.items())),
            ("architecture", ", ".join(f"{name} {args[name]}" for name in _WIDTHS if args.get(name) is not None)),
            ("vocabulary", _vocabulary(args, entries)),
            ("tokenizer", f"{args.get('tokenizer_type')} {args.get('tokenizer_model')}"),
        ]
    return Inspection("Megatron checkpoint (torch_dist)", (*facts, *_sizes(entries)), entries)


def _training(common: Mapping[str, Any], args: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """How far training had come. A run's policy version is its number of optimizer steps, which is the iteration."""
    yield "iteration", str(common.get("iteration", "not stored"))
    if args.get("hybrid"):
        yield "policy version", f"{common.get('iteration')} (optimizer steps of the hybrid run)"
        yield "hybrid state", json.dumps(args.get("hybrid_state") or {})
    if args.get("consumed_train_samples"):
        yield "consumed samples", f"{args['consumed_train_samples']:,}"


def _inspect_hf(folder: Path) -> Inspection:
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(
            f"{folder} has a config.json but no *.safetensors: its weights are missing, or pickled (*.bin), which is "
            "not read. Save the model again with save_pretrained(), which writes safetensors."
        )
    entries = []
    for file in files:
        try:
            with safe_open(file, framework="np") as opened:
                for name in opened.keys():  # noqa: SIM118  it is no dictionary
                    header = opened.get_slice(name)
                    entries.append(TensorEntry(name, tuple(header.get_shape()), _dtype(header.get_dtype()), True))
        except SafetensorError as error:
            raise DataError(f"{file} is no whole safetensors file ({error}): copy or convert it again.") from error
    config = read_hf_config(folder)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    facts = [
        ("folder", str(folder)),
        ("model", f"{config.get('model_type')} {', '.join(config.get('architectures') or [])}"),
        ("positions", f"{config.get('max_position_embeddings')}, rotary {rope.get('rope_type', 'default')}"),
        ("vocabulary", str(config.get("vocab_size"))),
    ]
    return Inspection("Hugging Face model", (*facts, *_sizes(entries)), tuple(sorted(entries, key=lambda e: e.name)))


def _dtype(code: str) -> str:
    """safetensors' BF16 as torch's bfloat16."""
    whole = {"BF16": "bfloat16", "BOOL": "bool"}
    kinds = {"F": "float", "I": "int", "U": "uint"}
    return whole.get(code, kinds.get(code[0], code[0]) + code[1:].lower())


def _vocabulary(args: Mapping[str, Any], entries: Sequence[TensorEntry]) -> str:
    """Tokens that mean something, and rows of the embedding, which Megatron pads."""
    true = args.get("vocab_size")
    rows = next((entry.shape[0] for entry in entries if entry.name == _EMBEDDING), args.get("padded_vocab_size"))
    return f"{'not stored (the tokenizer knows)' if true is None else f'{true} true'}, {rows} padded"


def _sizes(entries: Sequence[TensorEntry]) -> Iterator[tuple[str, str]]:
    model = [entry for entry in entries if entry.trained]
    others = [entry for entry in entries if not entry.trained]
    yield "parameters", f"{sum(e.num_values for e in model):,} in {', '.join(sorted({e.dtype for e in model}))}"
    if others:
        yield "other state", f"{len(others)} tensors of {sum(e.num_values for e in others):,} values (optimizer)"
