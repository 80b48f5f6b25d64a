"""A second model beside the student: a teacher of any architecture from its checkpoint, or a copy of the student.

    the job's arguments + the architecture in a checkpoint's -> `builder.py` -> chunks of this rank -> weights

The second model lies on the job's own process groups: same TP, PP and VPP, another depth, width, head, vocabulary
padding or kind (GPT, HybridModel). It has no optimizer, no gradient buffers and no mixed-precision wrapper, and its
checkpoints are torch_dist: saved at one layout, loaded at any other. Its vocabulary is padded as the student's, so that
a column is the same token on the same rank; rows that a checkpoint does not have are 0, and lie beyond the true
vocabulary, where nobody reads.

Collectives: those of saving and loading, and of `settle_weights` where gathers of parameters overlap.
Not here: expert parallelism, layers that differ from one another by a configuration file.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import unwrap_model
from megatron.training import get_args
from megatron.training.arguments import add_megatron_arguments
from torch import Tensor

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.mcore.architecture import ARCHITECTURE, OLDER_NAMES
from megatron_hybrid.mcore.builder import build_chunks
from megatron_hybrid.mcore.checkpoint_io import checkpoint_folder
from megatron_hybrid.mcore.plain_reading import reading, require_unaltered, write_checksums
from megatron_hybrid.mcore.save_signals import helper_of_the_writer

Chunks = list[torch.nn.Module]
"""A model as one rank of a pipeline holds it: one module per virtual stage."""

# How the job cuts its own depth into stages by hand: of no use to another depth.
_STAGES_BY_HAND = {
    "pipeline_model_parallel_layout": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
}
_ENDS = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")


def frozen_args(args: Namespace, checkpoint_args: Mapping[str, Any]) -> Namespace:
    """The job's arguments with the architecture of a checkpoint in their place.

    What a checkpoint does not say it was saved without knowing of: then Megatron's own default holds, not the job's.

    Raises:
        ConfigError: the job cannot build such a model: layers from a configuration file, too few learned positions,
            layers that the stages cannot share evenly, a layer spec of somebody's own.
    """
    parser = argparse.ArgumentParser()
    add_megatron_arguments(parser)
    merged = copy.copy(args)
    for name in ARCHITECTURE:
        known = [key for key in (name, OLDER_NAMES.get(name, name)) if key in checkpoint_args]
        setattr(merged, name, checkpoint_args[known[0]] if known else parser.get_default(name))
    merged.bias_gelu_fusion &= merged.add_bias_linear  # as Megatron does when it parses them
    if any(checkpoint_args.get(f"heterogeneous_layers_config_{kind}") for kind in ("path", "encoded_json")):
        raise ConfigError(
            "the layers of the teacher differ by a configuration file (--heterogeneous-layers-config-path), which is "
            "the job's in Megatron, not the model's: such a teacher cannot be built beside a student. Use another one."
        )
    _check_spec(merged.spec, args.spec)
    _check_positions(merged)
    _cut_into_stages(merged, args.num_layers)
    return merged


def _check_spec(theirs: Any, ours: Any) -> None:
    """A layer spec names a module to import and a function of it to call: not on the word of a checkpoint."""
    module = theirs[0] if isinstance(theirs, list | tuple) and theirs else theirs
    if theirs not in (None, ours) and not str(module).startswith("megatron."):
        raise ConfigError(
            f"the teacher's checkpoint was made with --spec {theirs}, which names code to import and run, and neither "
            "Megatron's nor this job's: it is not taken from a checkpoint. Give this job the same --spec where you "
            "trust it, or use another teacher."
        )


def _check_positions(merged: Namespace) -> None:
    if merged.position_embedding_type == "learned_absolute" and merged.max_position_embeddings < merged.seq_length:
        raise ConfigError(
            f"the teacher has learned {merged.max_position_embeddings} positions, but --seq-length is "
            f"{merged.seq_length}: it could not read to the end. Lower --seq-length, or use another teacher."
        )


def _cut_into_stages(merged: Namespace, student_layers: int) -> None:
    """The teacher's layers on the job's stages: cut as the student where they are as many, else evenly, if need be with
    embedding and loss counted as a layer each (the 126 of a Llama 405B on 8 stages)."""
    pattern = merged.hybrid_layer_pattern
    if merged.num_layers == student_layers and pattern is None:
        return
    for name, off in _STAGES_BY_HAND.items():
        setattr(merged, name, off)
    stages = merged.pipeline_model_parallel_size * (merged.virtual_pipeline_model_parallel_size or 1)
    per_stage, rest = divmod(merged.num_layers, stages)
    if rest and pattern is None and (merged.num_layers + len(_ENDS)) % stages == 0 and per_stage > 0:
        for name in _ENDS:
            setattr(merged, name, True)
        return
    if rest:
        raise ConfigError(
            f"the teacher has {merged.num_layers} layers, which {stages} pipeline stages (PP x VPP) cannot share "
            "evenly, nor with embedding and loss counted as a layer each. Choose stages that divide the layers of "
            "student and teacher."
        )
    if pattern is not None:  # its "|" are stages of the job that saved it; behind "/" are layers of MTP heads
        layers = pattern.partition("/")[0].replace("|", "")
        assert len(layers) == merged.num_layers, (pattern, merged.num_layers)
        merged.hybrid_layer_pattern = "|".join(layers[i : i + per_stage] for i in range(0, len(layers), per_stage))


def build_frozen_model(checkpoint: str, checkpoint_args: Mapping[str, Any]) -> Chunks:
    """The chunks of this rank, weights loaded, in eval mode, without gradients.

    checkpoint       torch_dist folder, as `--load` takes it
    checkpoint_args  its stored arguments

    Raises:
        ConfigError: the job cannot build such a model, see `frozen_args`, or not on its layout.
        DataError: the folder is no torch_dist checkpoint.
    """
    args = frozen_args(get_args(), checkpoint_args)
    try:
        chunks = _build(args)
    except (AssertionError, ValueError) as error:
        raise ConfigError(
            f"the teacher in {checkpoint} cannot be built on this job's layout (TP {args.tensor_model_parallel_size}, "
            f"PP {args.pipeline_model_parallel_size}): {error}. Change the layout, or use another teacher."
        ) from error
    load_weights(chunks, checkpoint)
    return chunks


def build_copy(student: Sequence[torch.nn.Module]) -> Chunks:
    """A model like the student with its weights as they are now, in eval mode, without gradients.

    student  the job's own chunks on this rank, wrapped or not

    Raises:
        ConfigError: the student is not what Megatron builds from the job's arguments.
    """
    chunks = _build(get_args())
    ours, theirs = list(named_tensors(chunks)), list(named_tensors(student))
    for (name, own), (other, tensor) in itertools.zip_longest(ours, theirs, fillvalue=("nothing", torch.empty(0))):
        if name != other or own.shape != tensor.shape:
            raise ConfigError(
                f"a copy of the student has {name} {list(own.shape)} where the student has {other} "
                f"{list(tensor.shape)}: the script's own model is not what Megatron builds from the arguments. Save a "
                "checkpoint of it and use that as teacher."
            )
    settle_weights(student)
    with torch.no_grad():
        for (_, own), (_, tensor) in zip(ours, theirs, strict=True):
            own.data = own.data.to(tensor.dtype)  # routers keep their expert biases in fp32 in a model of bf16
            own.copy_(tensor)
    return chunks


def _build(args: Namespace) -> Chunks:
    args = copy.copy(args)
    args.perform_initialization = False  # every weight is loaded or copied, and the student's random state stays
    args.moe_input_jitter_eps = None  # noise for training that Megatron also adds in eval mode
    chunks = build_chunks(args)
    for chunk in chunks:
        chunk.to(args.params_dtype).eval().requires_grad_(False)
    return chunks


def named_tensors(model: Sequence[torch.nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of all chunks in order, wrappers removed, each once; a name begins with its chunk."""
    for number, chunk in enumerate(unwrap_model(list(model))):
        for name, tensor in itertools.chain(chunk.named_parameters(), chunk.named_buffers()):
            yield f"{number}.{name}", tensor


def settle_weights(model: Sequence[torch.nn.Module]) -> None:
    """Waits for what an optimizer step left under way: under --overlap-param-gather weights arrive in the next forward
    pass. As Megatron does before it saves."""
    with torch.no_grad():
        for chunk in model:
            if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)


def save_weights(model: Chunks, folder: str | Path) -> None:
    """Writes weights and the job's arguments as a torch_dist checkpoint, which can be a teacher of another run.

    Under Megatron's --verify-integrity with checksums.

    folder  made where it does not exist; on a file system that all ranks share
    """
    if dist.get_rank() == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
    dist.barrier()
    state = _sharded(model) | {"args": get_args(), "checkpoint_version": 3.0}
    with helper_of_the_writer():  # it may be the run's first save
        # Arguments differ from rank to rank (the rank itself), which is no fault of the checkpoint.
        dist_checkpointing.save(state, str(folder), preprocess_common_before_consistancy_check=lambda common: {})
    if dist.get_rank() == 0 and getattr(get_args(), "verify_integrity", False):
        write_checksums(Path(folder))


def load_weights(model: Chunks, folder: str | Path) -> None:
    """Fills every parameter from a torch_dist checkpoint, saved at any layout and vocabulary padding.

    Raises:
        DataError: it is broken; names the file.
    """
    inner = checkpoint_folder(folder)
    require_unaltered(inner, together=True)
    with reading(inner):
        loaded = dist_checkpointing.load(_sharded(model), str(inner))
    for key, chunk in zip(_keys(model), model, strict=True):
        chunk.load_state_dict(loaded[key], strict=True)


def _keys(model: Chunks) -> list[str]:
    """Megatron's names for the chunks in a checkpoint's state."""
    return ["model"] if len(model) == 1 else [f"model{number}" for number in range(len(model))]


def _sharded(model: Chunks) -> dict[str, Any]:
    """Megatron's description of its own tensors."""
    return {key: chunk.sharded_state_dict() for key, chunk in zip(_keys(model), unwrap_model(model), strict=True)}
