"""A tiny real Megatron GPT on local gloo ranks: its command line, start-up and model. Used by jobs of a RankPool."""

from __future__ import annotations

import contextlib
import io
import sys
import zlib
from argparse import Namespace
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

TINY = {
    "num-layers": 4,
    "hidden-size": 32,
    "num-attention-heads": 4,
    "seq-length": 32,
    "max-position-embeddings": 64,
    "micro-batch-size": 2,
    "global-batch-size": 8,
    "train-iters": 4,
    "lr": 1e-3,
    "min-lr": 1e-3,
    "eval-iters": 0,
    "eval-interval": 1000,
    "log-interval": 1,
    "distributed-backend": "gloo",
    "tokenizer-type": "NullTokenizer",
    "vocab-size": 61,
    "make-vocab-size-divisible-by": 1,
    "transformer-impl": "local",
    "position-embedding-type": "rope",
    "normalization": "RMSNorm",
    "attention-dropout": 0,
    "hidden-dropout": 0,
    "init-method-std": 0.2,
    "num-workers": 0,
    "ckpt-format": "torch_dist",
    "swiglu": True,
    "disable-bias-linear": True,
    "calculate-per-token-loss": True,
    "no-persist-layer-norm": True,
    "no-gradient-accumulation-fusion": True,
    "no-masked-softmax-fusion": True,
    "no-bias-swiglu-fusion": True,
    "no-rope-fusion": True,
}
"""A model of a few thousand parameters: flags of Megatron's command line, True for a switch. A wide initialisation
makes its distributions differ visibly from uniform."""


def command_line(**overrides: Any) -> list[str]:
    """The flags as argv; `name_with_underscores=None` leaves one out."""
    flags = dict(TINY)
    for name, value in overrides.items():
        flags[name.replace("_", "-")] = value
    argv = ["tiny"]
    for name, value in flags.items():
        if value is None or value is False:
            continue
        argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return argv


@contextlib.contextmanager
def megatron(quiet: bool = True, **overrides: Any) -> Iterator[Namespace]:
    """Parsed arguments of a job on this rank, CUDA stand-ins in place; Megatron starts in `start()` or `pretrain`."""
    from megatron_hybrid.runtime import cpu

    argv = command_line(**overrides)
    sink: contextlib.AbstractContextManager[Any] = (
        contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext()
    )
    with cpu.enabled(), sink, mock.patch.object(sys, "argv", argv):
        from megatron.training.arguments import parse_and_validate_args

        from megatron_hybrid.cli.arguments import add_hybrid_args

        yield parse_and_validate_args(add_hybrid_args)


def start(args: Namespace, *, ddp: bool = False) -> list[Any]:
    """Megatron initialised and the model's chunks of this rank, without optimizer."""
    from megatron.training import training

    training.initialize_megatron()
    return build(args, ddp=ddp)


def build(args: Namespace, *, ddp: bool = False) -> list[Any]:
    """A model of the job's arguments: HybridModel under `hybrid_layer_pattern="*-*-"` (with `num_layers=None`; "|"
    between pipeline stages), GPTModel else. Megatron must have started."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args
    from megatron.training.training import get_megatron_ddp_config

    config = hybrid_config_from_args(args) if args.hybrid_layer_pattern else gpt_config_from_args(args)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    settings = {"ddp_config": get_megatron_ddp_config(args)} if ddp else {}
    return list(config.get_builder_cls()(config).build_distributed_models(groups, wrap_with_ddp=ddp, **settings))


def set_weights(model: list[Any], name: str = "") -> None:
    """The same network on every layout: each tensor is cut from a whole one drawn from `name` and its global name."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.core.utils import unwrap_model

    for chunk in unwrap_model(list(model)):
        state = chunk.sharded_state_dict()
        apply_factories(state)  # SwiGLU halves become views of their own
        for tensor in nested_values(state):
            if isinstance(tensor, ShardedTensor) and tensor.data is not None:
                _fill(tensor, name)


def _fill(tensor: Any, name: str) -> None:
    generator = torch.Generator().manual_seed(zlib.crc32((name + tensor.key).encode()))
    shape = list(tensor.global_shape)
    if "word_embeddings" in tensor.key or "output_layer" in tensor.key:
        shape[0] = 256  # whatever the vocabulary is padded to
    whole = torch.randn(shape, generator=generator) * 0.3
    if "norm" in tensor.key:
        whole = 1 + 0.1 * whole
    sizes = (*[1] * tensor.prepend_axis_num, *tensor.local_shape)
    index = tuple(slice(o, o + n) for o, n in zip(tensor.global_offset, sizes, strict=True))
    with torch.no_grad():
        tensor.data.copy_(whole[index].reshape(tensor.data.shape))
