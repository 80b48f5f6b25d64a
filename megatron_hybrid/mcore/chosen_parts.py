"""Whose layers and optimizer Megatron has picked, and why: Transformer Engine's, Apex's, its own or torch's.

    the model's chunks, --transformer-impl, what is installed  ->  one line for each part, for the log and config.json

Megatron picks by itself; nothing is chosen, replaced or required here. No collective.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch
from megatron.core.optimizer import Adam

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.mcore.symbols import check_apex


def chosen_parts(model: Sequence[torch.nn.Module], args: Any) -> dict[str, str]:
    """Part to "classes (why)", in words: attention, linear layers, norms, optimizer.

    model  the student's chunks on this rank
    args   Megatron's: `transformer_impl`, `optimizer`, `persist_layer_norm`
    """
    installed = _installed()
    modules = [module for chunk in model for module in chunk.modules()]
    layers = f"--transformer-impl {args.transformer_impl}; {installed}"
    fused = "Megatron takes Transformer Engine's, else Apex's, else torch's"
    optimizer = _name(Adam) if args.optimizer == "adam" else args.optimizer
    return {
        "attention": f"{_classes(modules, ('core_attention',))} ({layers})",
        "linear layers": f"{_classes(modules, ('linear_qkv', 'linear_proj', 'linear_fc1', 'linear_fc2'))} ({layers})",
        "norms": f"{_classes(modules, ('input_layernorm', 'pre_mlp_layernorm', 'final_layernorm'))} ({layers})",
        "optimizer": f"{optimizer} ({fused}; {installed})",
    }


def _classes(modules: Sequence[torch.nn.Module], attributes: tuple[str, ...]) -> str:
    """The classes of these children, each once; a norm that its linear layer computes is an IdentityOp."""
    children = (getattr(module, name, None) for module in modules for name in attributes)
    names = sorted({_name(type(child)) for child in children if isinstance(child, torch.nn.Module)})
    return ", ".join(names) or "none on this rank"


def _name(kind: Any) -> str:
    return f"{kind.__module__.partition('.')[0]} {kind.__qualname__}"


def _installed() -> str:
    """What of the two libraries can be imported."""
    try:
        engine = f"transformer-engine {metadata.version('transformer-engine')}"
    except metadata.PackageNotFoundError:
        engine = "transformer-engine is not installed"
    try:
        check_apex()
        apex = "Apex is" if importlib.util.find_spec("apex") else "Apex is not"
    except ConfigError:
        apex = "NVIDIA's Apex is not"
    return f"{engine}, {apex} installed"
