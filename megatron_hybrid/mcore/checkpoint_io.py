"""Megatron's torch_dist checkpoints as whole tensors, written and read by one process.

A checkpoint on disk is DIR/latest_checkpointed_iteration.txt ("release") and DIR/release/, whose tensors are global:
Megatron cuts them to whatever TP x PP x VPP a job has. Writing builds the real GPTModel on the CPU and lets Megatron
describe its own tensors, so names, stacking of layers and SwiGLU halves are Megatron's business, not ours. Reading
needs no model. Tensors travel as `{name on disk, layers numbered: tensor}`, the names of `checkpoint/convert.py`.

Data: fp32 or bf16 tensors on the CPU, twice in memory while writing. Writing makes a process group of one and wants
none before, reading goes without; a script that writes must guard its main module (`if __name__ == "__main__"`),
because Megatron's writer starts helpers. Not here: optimizer state, models other than Llama-shaped GPTs.
"""

import os
import re
import shutil
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_hybrid.errors import DataError, HybridError
from megatron_hybrid.mcore.plain_reading import reading, require_unaltered, write_checksums
from megatron_hybrid.mcore.save_signals import helper_of_the_writer
from megatron_hybrid.runtime import cpu

TRACKER = "latest_checkpointed_iteration.txt"
MODEL_TENSORS = ("embedding.", "decoder.", "output_layer.")
"""How the names of a model's own tensors begin on disk; the others are the optimizer's."""
_STACKED = re.compile(r"^decoder\.layers\.(?!\d)(.+)$")
# The local layer spec keeps its norms beside the linear layers; on disk they sit where Transformer Engine fuses them.
_LOCAL_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


@contextmanager
def single_rank() -> Iterator[None]:
    """A process group of one, Megatron's parallel state for it, CUDA stand-ins where no GPU is; all gone on exit."""
    if dist.is_initialized():
        raise HybridError(
            "checkpoints are converted by one process without a process group, but torch.distributed is initialised: "
            "run the conversion before training, in a process of its own."
        )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with cpu.enabled():
            parallel_state.initialize_model_parallel()
            yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def build_gpt(args: Mapping[str, Any], *, dtype: torch.dtype) -> GPTModel:
    """The whole GPTModel of a checkpoint's arguments on the CPU, weights not initialised; inside `single_rank()`."""
    config = TransformerConfig(
        num_layers=args["num_layers"],
        hidden_size=args["hidden_size"],
        ffn_hidden_size=args["ffn_hidden_size"],
        num_attention_heads=args["num_attention_heads"],
        num_query_groups=args["num_query_groups"],
        kv_channels=args["kv_channels"],
        normalization=args["normalization"],
        layernorm_epsilon=args.get("layernorm_epsilon", args.get("norm_epsilon")),
        gated_linear_unit=args["swiglu"],
        activation_func=torch.nn.functional.silu,
        add_bias_linear=args["add_bias_linear"],
        add_qkv_bias=args.get("add_qkv_bias", False),
        qk_layernorm=args.get("qk_layernorm", False),
        attention_dropout=args["attention_dropout"],
        hidden_dropout=args["hidden_dropout"],
        rotary_interleaved=args["rotary_interleaved"],
        params_dtype=dtype,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=args["normalization"], qk_layernorm=config.qk_layernorm),
        vocab_size=args["padded_vocab_size"],
        max_sequence_length=args["max_position_embeddings"],
        position_embedding_type=args["position_embedding_type"],
        rotary_base=args["rotary_base"],
        rotary_percent=args["rotary_percent"],
        rope_scaling=args.get("use_rope_scaling", False),
        share_embeddings_and_output_weights=not args["untie_embeddings_and_output_weights"],
    )
    return model.to(dtype)  # torch's norms ignore params_dtype; Megatron casts them in the same way while training


def local_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` under the module names of Megatron's local layer spec, for `load_state_dict`."""

    def rename(name: str) -> str:
        for on_disk, local in _LOCAL_NORMS.items():
            name = name.replace(on_disk, local)
        return name

    return {rename(name): value for name, value in state.items()}


def load_weights(model: GPTModel, state: Mapping[str, Tensor]) -> None:
    """Fills `model`, every parameter and nothing else."""
    named = local_names(state)
    missing, unexpected = model.load_state_dict(named, strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state")]  # fp8 scales, which no bf16 model has
    if missing or unexpected:
        raise DataError(
            f"the tensors do not fit the model of the arguments: missing {missing[:3]}, unexpected {unexpected[:3]}. "
            "Arguments and tensors must come from the same conversion."
        )


def megatron_logits(state: Mapping[str, Tensor], args: Mapping[str, Any], tokens: Tensor) -> Tensor:
    """Logits [b, s, vocab_size] fp32 of Megatron's own GPTModel with these tensors, for tokens [b, s].

    Checkpoints of training may not know their vocab_size: then the padded columns are among them.
    """
    with single_rank(), torch.no_grad():
        model_parallel_cuda_manual_seed(0)  # attention forks this state, even without dropout
        model = build_gpt(args, dtype=torch.float32).eval()
        load_weights(model, {name: value.float() for name, value in state.items()})
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return model(tokens, positions, None)[..., : args["vocab_size"]]


def save_megatron_checkpoint(folder: str | Path, state: Mapping[str, Tensor], args: Mapping[str, Any]) -> Path:
    """Writes a release checkpoint that `--load FOLDER --finetune` reads at any TP x PP x VPP; returns `folder`.

    state   whole tensors under the names on disk, one dtype
    args    arguments that rebuild the model (`hf_config_to_megatron_args`), stored with whatever else they hold; plain
            values only, because Megatron reads them back without unpickling code
    """
    folder = Path(folder)
    if (folder / TRACKER).exists() or (folder / "release").exists():
        raise DataError(
            f"{folder} already holds a checkpoint: writing another into it would mix them. Choose another folder."
        )
    stored = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "ckpt_format": "torch_dist", **args}
    unfinished = folder / f".release.{os.getpid()}"
    unfinished.mkdir(parents=True)
    try:
        with single_rank():
            model = build_gpt(args, dtype=next(iter(state.values())).dtype)
            load_weights(model, state)
            whole = {"model": model.sharded_state_dict(), "args": Namespace(**stored)}
            with helper_of_the_writer():
                dist_checkpointing.save({**whole, "checkpoint_version": 3.0, "iteration": 0}, str(unfinished))
        write_checksums(unfinished)
        unfinished.rename(folder / "release")
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    # Last, because a folder with a tracker is a finished checkpoint.
    (folder / TRACKER).write_text("release\n", encoding="utf-8")
    return folder


def _whole_tensors(inner: Path, names: set[str]) -> dict[str, Tensor]:
    """Tensors of a torch_dist folder, read by this process alone, whatever process groups there are."""
    from torch.distributed.checkpoint import FileSystemReader, load

    reader = FileSystemReader(inner)
    kept: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
    empty: dict[str, Any] = {name: torch.empty(kept[name].size, dtype=kept[name].properties.dtype) for name in names}
    load(empty, storage_reader=reader, no_dist=True)
    return empty


def load_metadata(folder: str | Path) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    """What a checkpoint stores besides tensors, and global shape and dtype of each tensor; none of them is loaded."""
    inner = checkpoint_folder(folder)
    with reading(inner):
        tensors = dist_checkpointing.load_tensors_metadata(str(inner))
        shapes = {name: (tuple(tensor.global_shape), tensor.dtype) for name, tensor in tensors.items()}
        return dist_checkpointing.load_common_state_dict(str(inner)), shapes


def load_megatron_args(folder: str | Path) -> dict[str, Any]:
    """The arguments stored in a checkpoint, without its tensors."""
    inner = checkpoint_folder(folder)
    with reading(inner):
        common = dist_checkpointing.load_common_state_dict(str(inner))
    if common.get("args") is None:
        raise DataError(
            f"{folder} holds no arguments, so the model cannot be rebuilt from it: it was not saved by training."
        )
    return dict(vars(common["args"]))


def load_megatron_state(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Whole model tensors of a torch_dist checkpoint, and its arguments; saved by training or by this module.

    folder  what --load takes, or the folder of one iteration
    Optimizer, random states and the like are left on disk.

    Raises:
        DataError: it is none, or broken; names the file.
    """
    inner = checkpoint_folder(folder)
    require_unaltered(inner, together=False)
    args = load_megatron_args(folder)
    with reading(inner):
        metadata = dist_checkpointing.load_tensors_metadata(str(inner))
        wanted = [name for name in metadata if name.startswith(MODEL_TENSORS)]
        plain = _whole_tensors(inner, set(wanted))
    state: dict[str, Tensor] = {}
    stacked: dict[str, Tensor] = {}
    for name in wanted:
        match = _STACKED.match(name)
        (stacked if match else state)[match[1] if match else name] = plain[name]
    by_layer: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, value in stacked.items():
        for layer, part in enumerate(value.unbind(0)):
            by_layer[layer][name] = part
    for layer, parts in sorted(by_layer.items()):
        state |= {f"decoder.layers.{layer}.{name}": part for name, part in parts.items()}
    return state, args


def checkpoint_folder(folder: str | Path) -> Path:
    """The folder with the tensors: `folder` itself, or the one its tracker file names."""
    folder = Path(folder)
    inner, tracker = folder, folder / TRACKER
    if tracker.exists():
        word = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if word != "release" and not re.fullmatch("[0-9]{1,12}", word):
            raise DataError(
                f"{tracker} should say which iteration is the newest, a number or 'release', but says {word[:40]!r}: "
                "it was cut off or altered. Write the number there, or give the folder of the iteration itself."
            )
        inner = folder / (word if word == "release" else f"iter_{int(word):07d}")
    with reading(inner):
        is_one = dist_checkpointing.check_is_distributed_checkpoint(str(inner))
    if not is_one:
        raise DataError(
            f"{inner} is no torch_dist checkpoint: a folder with {TRACKER}, or one iteration inside it, was expected. "
            "Save with --ckpt-format torch_dist, or convert with tools/convert_checkpoint.py."
        )
    return inner
