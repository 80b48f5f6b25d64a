"""Models from Megatron's arguments, by what the installed version builds them with: the one place where they differ.

    0.19   a configuration knows its builder; `pretrain` takes it inside its first argument
    0.18   a HybridModel's does; a GPTModel comes from a `model_provider`, which `pretrain` takes as well
    0.17   a `model_provider`, and no HybridModel

`symbols.generation` says which it is. Collectives: those of Megatron's builders. Not here: weights.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.mcore.symbols import (
    SEEN_VERSIONS,
    TAKES_CONFIG,
    TAKES_PROVIDER,
    borrow,
    generation,
    megatron_version,
)

ModelProvider = Callable[..., torch.nn.Module]
"""Called by Megatron with pre_process, post_process and, by name, vp_stage, config and pg_collection."""

_NOT_FOLLOWED = (
    "hybrid_layer_pattern",
    "spec",
    "experimental_attention_variant",
    "rotary_seq_len_interpolation_factor",
    "moe_mlp_glu_interleave_size",
    "moe_shared_expert_glu_interleave_size",
)
"""Arguments that ask for another model than `gpt_provider` builds."""


def pretrain_arguments(args: Namespace) -> dict[str, Any]:
    """What `pretrain` of 0.18 and later is told of a model that is made from arguments alone, by keyword."""
    container = borrow("megatron.training.argument_utils", "pretrain_cfg_container_from_args")
    if generation() == TAKES_CONFIG:
        return {"cfg_container": container(args, _config(args))}
    return {"cfg_container": container(args), "model_provider": gpt_provider(args)}


def build_chunks(args: Namespace) -> list[torch.nn.Module]:
    """The model that `args` describe on the job's own groups: one module per virtual stage, without DDP.

    No mixed-precision wrapper either: it would return fp32 copies of the hidden states.

    Raises:
        ConfigError: the installed version has no such model.
    """
    groups, kind = ProcessGroupCollection.use_mpu_process_groups(), generation()
    if kind == TAKES_CONFIG or (kind == TAKES_PROVIDER and args.hybrid_layer_pattern is not None):
        config = _config(args)
        builder = config.get_builder_cls()(config)
        chunks = builder.build_distributed_models(
            groups, wrap_with_ddp=False, data_parallel_random_init=False, mixed_precision_wrapper=None
        )
    else:
        get_model = borrow("megatron.training.training", "get_model")
        provider = gpt_provider(args)
        chunks = get_model(provider, ModelType.encoder_or_decoder, wrap_with_ddp=False, pg_collection=groups)
    return list(unwrap_model(chunks))


def _config(args: Namespace) -> Any:
    if args.hybrid_layer_pattern is None:
        return borrow("megatron.training.argument_utils", "gpt_config_from_args")(args)
    return borrow("megatron.training.argument_utils", "hybrid_config_from_args")(args)


def gpt_provider(args: Namespace) -> ModelProvider:
    """A `model_provider` of the GPTModel that Megatron's own pretrain_gpt.py of 0.18 and 0.17 builds from `args`.

    That script's own provider reads the job's arguments: it knows the student alone.

    Raises:
        ConfigError: the arguments ask for another model.
    """
    asked = [(name, getattr(args, name, None)) for name in _NOT_FOLLOWED]
    if args.position_embedding_type == "yarn":
        asked.append(("position_embedding_type", "yarn"))
    for name, value in asked:
        if value is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {value}: with megatron-core {megatron_version()} nothing but a plain "
                "GPTModel is built from arguments, for a teacher or a copy of the student. Use another model, or "
                f"megatron-core {SEEN_VERSIONS}."
            )
    config = borrow("megatron.training.arguments", "core_transformer_config_from_args")(args)
    block_spec = borrow("megatron.core.models.gpt.gpt_layer_specs", "get_gpt_decoder_block_spec")

    def provide(
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        *,
        pg_collection: Any,
        **_: Any,
    ) -> torch.nn.Module:
        spec = block_spec(
            config,
            use_transformer_engine=args.transformer_impl == "transformer_engine",
            normalization=args.normalization,
            qk_l2_norm=args.qk_l2_norm,
            vp_stage=vp_stage,
        )
        model: torch.nn.Module = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type=args.position_embedding_type,
            rotary_percent=args.rotary_percent,
            rotary_base=args.rotary_base,
            rope_scaling=args.use_rope_scaling,
            vp_stage=vp_stage,
            pg_collection=pg_collection,
        )
        return model

    return provide
