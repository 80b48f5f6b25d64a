"""Megatron's optimizer, kept from a step whose gradient is not finite.

`ChainedOptimizer.step` makes the norm of the whole gradient, over all ranks that hold a part of it, clips by it and
steps. Inside `finite_steps_only` it does not step where that norm is NaN or infinite, and says so to Megatron as it
does for the overflows of fp16's loss scaler: weights, moments and counts stay, Megatron counts a skipped iteration and
leaves the learning rate's schedule where it was. Every rank reads the same norm, data-parallel replicas that of equal
gradients, so all skip alike, without a collective of their own. Where every tensor-parallel rank has a copy of a
parameter, the norm counts the first rank's: what is not finite in another rank's copy alone is not seen.

Cost: none on a CPU and where clipping reads the norm anyway; where Transformer Engine or Apex clips on the device, the
host waits for the norm before the optimizer's kernels rather than right after them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.utils import unwrap_model


@contextmanager
def finite_steps_only(
    model: Sequence[torch.nn.Module], optimizer: Any, found: Callable[[float], None]
) -> Iterator[None]:
    """Around one of Megatron's steps: it is skipped where the gradient is not finite.

    found  is then called with the norm, on every rank, while gradients are as they were reduced: before clipping

    DDP's own check of each rank's gradient before it is reduced is off inside: it would end that rank, and leave the
    others waiting for it.
    """
    norm_of, step = optimizer.get_grad_norm, optimizer.step_with_ready_grads
    finite = True

    def get_grad_norm() -> Any:
        nonlocal finite
        norm = norm_of()
        finite = math.isfinite(norm)
        if not finite:
            found(float(norm))
        return norm

    def step_with_ready_grads() -> bool:
        return bool(step()) if finite else False

    configs: list[Any] = [chunk.ddp_config for chunk in model]
    checks = [(config, config.check_for_nan_in_grad) for config in configs]
    for config, _ in checks:
        config.check_for_nan_in_grad = False
    optimizer.get_grad_norm, optimizer.step_with_ready_grads = get_grad_norm, step_with_ready_grads
    try:
        yield
    finally:
        del optimizer.get_grad_norm, optimizer.step_with_ready_grads  # the class's own again
        for config, check in checks:
            config.check_for_nan_in_grad = check


@torch.no_grad()
def nonfinite_parameters(model: Sequence[torch.nn.Module]) -> list[str]:
    """Names of this rank's parameters whose reduced gradient is not finite, layers counted over all pipeline stages.

    Under the distributed optimizer a rank has the reduced gradient of its own shard and its own part of the others'.
    """
    names = []
    for chunk in unwrap_model(list(model)):
        layers = {
            f"{name}.": f"{name.rpartition('.')[0]}.{module.layer_number - 1}."
            for name, module in chunk.named_modules()
            if name.rpartition(".")[2].isdigit() and hasattr(module, "layer_number")
        }
        for name, parameter in chunk.named_parameters():
            grad = getattr(parameter, "main_grad", None)
            if grad is None or bool(grad.isfinite().all()):
                continue
            local = next((prefix for prefix in layers if name.startswith(prefix)), "")
            names.append(layers.get(local, "") + name.removeprefix(local))
    return names
