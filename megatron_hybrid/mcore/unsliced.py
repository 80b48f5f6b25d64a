"""A live model on whole sequences: sequence and context parallelism switched off for the length of a block.

Generation decodes one token at a time, which nobody can share out: every tensor-parallel rank then holds all positions
of its heads, and every context-parallel rank runs the same sequences and finds the same numbers. Weights, gradients and
checkpoints know nothing of it. No collective.

Not here: layers whose weights themselves are shared out over context-parallel ranks (Mamba): refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from megatron_hybrid.errors import ConfigError

SLICING = ("sequence_parallel", "reduce_scatter_embeddings")
"""Switches of Megatron's and Transformer Engine's layers that are on under sequence parallelism."""


class _Alone:
    """A context-parallel group of one, asked for its size and rank only."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


@contextlib.contextmanager
def unsliced(chunks: list[torch.nn.Module]) -> Iterator[None]:
    """While inside, the model takes and gives whole sequences [s, b, h]; afterwards it is as it was.

    chunks  the model as Megatron holds it on this rank, wrappers removed or not

    Raises:
        ConfigError: a layer shares its weights out over context-parallel ranks.
    """
    modules = [module for chunk in unwrap_model(list(chunks)) for module in chunk.modules()]
    changes = _changes(modules)
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    te_groups = [
        (module, (module.cp_group, module.cp_global_ranks, module.cp_stream, module.cp_comm_type))
        for module in modules
        if hasattr(module, "set_context_parallel_group") and getattr(module, "cp_group", None) is not None
    ]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        for module, (*_, comm_type) in te_groups:
            module.set_context_parallel_group(None, None, None, comm_type)
        _forget_rotary(modules)
        yield
    finally:
        for owner, name, value in reversed(originals):
            setattr(owner, name, value)
        for module, group in te_groups:
            module.set_context_parallel_group(*group)
        _forget_rotary(modules)


def _changes(modules: list[torch.nn.Module]) -> list[tuple[Any, str, Any]]:
    """(owner, attribute, value while unsliced) of what is on; nothing where the job slices no sequences."""
    changes: dict[tuple[int, str], tuple[Any, str, Any]] = {}  # modules share their configurations and groups

    def change(owner: Any, name: str, value: Any) -> None:
        changes[id(owner), name] = (owner, name, value)

    for module in modules:
        for name in SLICING:
            if getattr(module, name, False):
                change(module, name, False)
        config, groups = getattr(module, "config", None), getattr(module, "pg_collection", None)
        if getattr(config, "sequence_parallel", False):
            change(config, "sequence_parallel", False)
        if getattr(config, "context_parallel_size", 1) > 1:
            change(config, "context_parallel_size", 1)
        if _size(groups, "cp") > 1:
            change(groups, "cp", _Alone())
        if _size(module, "cp_group") > 1 and not hasattr(module, "set_context_parallel_group"):
            change(module, "cp_group", _Alone())
        if getattr(getattr(module, "cp", None), "cp_size", 1) > 1:
            raise ConfigError(
                f"{type(module).__name__} shares its weights out over context-parallel ranks, so the live model cannot "
                "decode whole sequences: use --context-parallel-size 1."
            )
    return list(changes.values())


def _size(owner: Any, name: str) -> int:
    group = getattr(owner, name, None)
    return 1 if group is None else int(group.size())


def _forget_rotary(modules: list[torch.nn.Module]) -> None:
    """Rotary embeddings keep what they computed under their length alone, which now means other positions."""
    for module in modules:
        if hasattr(module.forward, "cache_clear"):
            module.forward.cache_clear()
