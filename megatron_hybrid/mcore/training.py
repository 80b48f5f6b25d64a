"""What the package borrows from `megatron.training`: arguments, writers, tokenizer, a second model beside the student.

A second model (the teacher) is built by Megatron from the job's own arguments with the architecture of its checkpoint
in their place, on the job's own process groups: same TP, PP and VPP, another depth or width. It has no optimizer, no
gradient buffers, and its checkpoint loads at any layout.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from megatron.training import get_args
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.global_vars import get_tensorboard_writer, get_tokenizer, get_wandb_writer

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.mcore.checkpoint_io import checkpoint_folder

__all__ = [
    "build_frozen_model",
    "get_args",
    "get_forward_backward_func",
    "get_tensorboard_writer",
    "get_wandb_writer",
    "refuse_unsupported",
    "true_vocab_size",
]

# What a checkpoint's arguments say about the model itself; everything else (layout, precision, kernels) is the job's.
ARCHITECTURE = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "group_query_attention",
    "kv_channels", "max_position_embeddings", "position_embedding_type", "rotary_base", "rotary_percent",
    "rotary_interleaved", "rotary_seq_len_interpolation_factor", "use_rope_scaling", "rope_scaling_factor",
    "add_bias_linear", "add_qkv_bias", "squared_relu", "swiglu", "quick_geglu", "untie_embeddings_and_output_weights",
    "apply_layernorm_1p", "normalization", "norm_epsilon", "layernorm_epsilon", "qk_layernorm",
    "apply_query_key_layer_scaling", "softmax_type", "num_experts", "moe_layer_freq", "moe_ffn_hidden_size",
    "moe_router_topk", "moe_router_pre_softmax", "moe_shared_expert_intermediate_size", "moe_router_score_function",
    "moe_router_enable_expert_bias", "moe_router_topk_scaling_factor",
)  # fmt: skip


def true_vocab_size() -> int:
    """Tokens the tokenizer knows; Megatron's own count of columns is padded beyond it."""
    return int(get_tokenizer().vocab_size)


def refuse_unsupported(args: Namespace) -> None:
    """Raises ConfigError for settings of the job that the hybrid path cannot honour yet, before a model is built."""
    if not args.calculate_per_token_loss:
        raise ConfigError(
            "the hybrid gradient has one global normaliser, which Megatron applies under --calculate-per-token-loss; "
            "without it a mean of micro-batch means would be trained. Add --calculate-per-token-loss (--hybrid on the "
            "command line sets it)."
        )
    if args.context_parallel_size > 1:
        raise ConfigError(
            f"--context-parallel-size is {args.context_parallel_size}, but the cost-to-go of a response does not cross "
            "context-parallel ranks yet: use 1."
        )
    if args.sequence_parallel:
        raise ConfigError(
            "--sequence-parallel is on, but response rows are not gathered over tensor-parallel ranks yet: leave it "
            "off."
        )
    for reason, on in (
        # Replicas decode different numbers of tokens: a collective over them inside a forward pass would hang.
        ("--expert-model-parallel-size above 1", args.expert_model_parallel_size > 1),
        ("--use-megatron-fsdp", args.use_megatron_fsdp),
        ("--use-torch-fsdp2", args.use_torch_fsdp2),
        # These change or replay the batch that the loop has counted, or the call that it wraps.
        ("--rampup-batch-size", args.rampup_batch_size is not None),
        ("--iterations-to-skip", bool(args.iterations_to_skip)),
        ("full-iteration CUDA graphs", args.cuda_graph_impl == "full_iteration"),
    ):
        if on:
            raise ConfigError(f"{reason} is not supported with --hybrid yet: train without it.")
    if getattr(args, "mtp_num_layers", None):
        raise ConfigError("--mtp-num-layers: multi-token prediction heads have no hybrid loss; train without them.")


def frozen_args(args: Namespace, checkpoint_args: Mapping[str, Any]) -> Namespace:
    """The job's arguments with the architecture of a checkpoint in their place."""
    merged = copy.copy(args)
    for name in ARCHITECTURE:
        if name in checkpoint_args:
            setattr(merged, name, checkpoint_args[name])
    stages = args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1)
    if merged.num_layers % stages:
        raise ConfigError(
            f"the teacher has {merged.num_layers} layers, which {stages} pipeline stages (PP x VPP) cannot share "
            "evenly. Choose stages that divide the layers of student and teacher."
        )
    return merged


def build_frozen_model(checkpoint: str, checkpoint_args: Mapping[str, Any]) -> list[torch.nn.Module]:
    """The chunks of this rank, weights loaded, in eval mode, without gradients.

    checkpoint       torch_dist folder, as `--load` takes it
    checkpoint_args  its stored arguments
    """
    args = frozen_args(get_args(), checkpoint_args)
    model_config = gpt_config_from_args(args)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    # No mixed-precision wrapper: it would return fp32 copies of the hidden states.
    chunks = model_config.get_builder_cls()(model_config).build_distributed_models(
        groups, wrap_with_ddp=False, data_parallel_random_init=False, mixed_precision_wrapper=None
    )
    for chunk in chunks:
        chunk.to(args.params_dtype).eval().requires_grad_(False)
    bare = unwrap_model(chunks)
    keys = ["model"] if len(bare) == 1 else [f"model{i}" for i in range(len(bare))]
    wanted = {key: chunk.sharded_state_dict() for key, chunk in zip(keys, bare, strict=True)}
    loaded = dist_checkpointing.load(wanted, str(checkpoint_folder(checkpoint)))
    for key, chunk in zip(keys, bare, strict=True):
        chunk.load_state_dict(loaded[key], strict=True)
    return list(chunks)
