"""What the package borrows from `megatron.training`: arguments, writers, tokenizer; and what it refuses of a job.

`started` hands out the job's arguments before `pretrain` is called, also where it parses them itself.

Not here: the second model beside the student (`second_model.py`).
"""

from __future__ import annotations

import importlib
import inspect
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.training import get_args
from megatron.training.global_vars import get_tensorboard_writer, get_tokenizer, get_wandb_writer

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.mcore.symbols import PARSES_INSIDE, generation

__all__ = [
    "get_args",
    "get_forward_backward_func",
    "get_tensorboard_writer",
    "get_wandb_writer",
    "refuse_unsupported",
    "started",
    "true_vocab_size",
]


@contextmanager
def started(call: inspect.BoundArguments) -> Iterator[Namespace]:
    """The job's arguments; call `pretrain` inside.

    A `pretrain` that takes an `extra_args_provider` parses the command line as the first thing it does. What it would
    call for that is called here with the arguments it would give, and while inside its own call finds it done.

    call  of `pretrain`, before it happens
    """
    if generation() != PARSES_INSIDE:
        yield get_args()
        return
    training: Any = importlib.import_module("megatron.training.training")
    initialize = training.initialize_megatron
    known = inspect.signature(initialize).parameters
    initialize(**{name: value for name, value in call.arguments.items() if name in known})
    training.initialize_megatron = lambda **_: None
    try:
        yield get_args()
    finally:
        training.initialize_megatron = initialize


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
    for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
        value = getattr(args, name, None)
        if args.num_experts and value and (not isinstance(value, list) or any(value)):
            raise ConfigError(
                f"--{name.replace('_', '-')} is {value}: Megatron scales a router's own loss for a gradient that is "
                "divided by tokens, the hybrid one is divided by what its aggregation counts. Set it to 0; "
                "--moe-router-enable-expert-bias balances without a loss."
            )
    if getattr(args, "mtp_num_layers", None):
        raise ConfigError("--mtp-num-layers: multi-token prediction heads have no hybrid loss; train without them.")
