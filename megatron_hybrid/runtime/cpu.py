"""Real Megatron on a machine without a GPU: stand-ins for the few torch.cuda calls it makes, explicit and reversible.

Megatron names CUDA in four ways, and each has one answer here: factories asked for `device='cuda'` give CPU tensors;
streams, events and memory calls do nothing; the CUDA random state *is* the CPU's, so dropout and initialisation are as
independent of the layout as on GPUs; type checks for `torch.cuda.FloatTensor` see it. `torch.cuda.is_available` answers
True only while Megatron initialises: DataLoader and the optimizers of a CUDA build of torch misbehave otherwise.
Megatron's jit fusers run uncompiled (they would compile for minutes what takes seconds); torch.compile stays usable.
Sequence and context parallelism and packed sequences, for which Megatron wants Transformer Engine, run on torch layers
(`cpu_layers.py`), and so do HybridModel (`cpu_hybrid.py`) and attention to a KV cache (`cpu_decoding.py`).

Collectives need gloo: pass `--distributed-backend gloo`. With a GPU present `enable()` does nothing at all.
Not here: anything about the hybrid method.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from megatron_hybrid.runtime import cpu_decoding, cpu_hybrid, cpu_layers

logger = logging.getLogger(__name__)

_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like", "rand",
    "rand_like", "randint", "randn", "randn_like", "randperm", "tensor", "zeros", "zeros_like",
)  # fmt: skip

_patches: list[tuple[Any, str, Any]] = []
_MISSING = object()


class _Stream:
    """A stream or event of a device that does everything in order at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    wait_stream = wait_event = synchronize = record = wait = _nothing

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with every device argument that names CUDA replaced by the CPU, and nothing pinned."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and _is_cuda(device):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):  # pinned for a copy to the device that is not there
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return call


def _to_cpu(method: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.to` or `Module.to` whose CUDA targets are the CPU."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple("cpu" if _is_cuda(a) else a for a in args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return method(self, *args, **kwargs)

    return call


def _put(owner: Any, name: str, value: Any) -> None:
    # A method that a class inherits is taken away again, not pinned on the class.
    original = vars(owner).get(name, _MISSING) if isinstance(owner, type) else getattr(owner, name, _MISSING)
    _patches.append((owner, name, original))
    setattr(owner, name, value)


def _patch_torch() -> None:
    for name in _FACTORIES:
        _put(torch, name, _on_cpu(getattr(torch, name)))
    _put(torch, "load", _cpu_load(torch.load))
    _put(torch.Tensor, "to", _to_cpu(torch.Tensor.to))
    _put(torch.nn.Module, "to", _to_cpu(torch.nn.Module.to))
    _put(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    _put(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self)
    for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"):
        _put(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))

    tensor_type = torch.Tensor.type

    @functools.wraps(tensor_type)
    def type_as_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return tensor_type(self, *args, **kwargs)
        return tensor_type(self).replace("torch.", "torch.cuda.", 1)

    _put(torch.Tensor, "type", type_as_on_cuda)

    cpu = torch.device("cpu")
    for name in ("set_device", "synchronize", "empty_cache", "ipc_collect", "reset_peak_memory_stats", "set_stream"):
        _put(torch.cuda, name, lambda *args, **kwargs: None)
    for name, value in {
        "current_device": lambda: cpu,
        "current_stream": lambda *args, **kwargs: _Stream(),
        "default_stream": lambda *args, **kwargs: _Stream(),
        "stream": lambda *args, **kwargs: contextlib.nullcontext(),
        "Stream": _Stream,
        "Event": _Stream,
        "manual_seed": torch.default_generator.manual_seed,
        "manual_seed_all": lambda seed: None,  # torch.manual_seed calls it after it has seeded the CPU
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "device_memory_used": lambda *args, **kwargs: 0,
        # Newest architecture: older ones make Megatron ask for environment variables that only matter on a GPU.
        "get_device_properties": lambda *args, **kwargs: SimpleNamespace(name="cpu", major=10, minor=0, total_memory=0),
        "get_device_capability": lambda *args, **kwargs: (10, 0),
    }.items():
        _put(torch.cuda, name, value)
    _put(torch.cuda.random, "get_rng_state", torch.cuda.get_rng_state)
    _put(torch.cuda.random, "set_rng_state", torch.cuda.set_rng_state)


def _cpu_load(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("map_location")):
            kwargs["map_location"] = "cpu"
        return load(*args, **kwargs)

    return call


def _run_fusers_uncompiled() -> None:
    """Replaces what Megatron's `jit_fuser` has compiled by the functions themselves, in every module that has them."""
    jit = importlib.import_module("megatron.core.jit")
    _put(jit, "jit_fuser", jit.noop_decorator)
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("megatron.core") and m is not None]
    classes = {c for m in modules for c in vars(m).values() if isinstance(c, type) and c.__module__ == m.__name__}
    for owner in [*modules, *classes]:
        for name, value in list(vars(owner).items()):
            original = getattr(value, "_torchdynamo_orig_callable", None) if callable(value) else None
            if original is not None:
                _put(owner, name, original)


def _patch_megatron() -> None:
    training = importlib.import_module("megatron.training.training")
    _run_fusers_uncompiled()
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    _put(random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    _put(random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))
    # The tracker warns whenever the CPU state moves inside a fork; here that is the point.
    tracker_logger = logging.getLogger(random.__name__)
    _put(tracker_logger, "disabled", True)

    for room in (cpu_layers, cpu_hybrid, cpu_decoding):  # each wraps what it finds
        for owner, name, value in room.stand_ins():
            _put(owner, name, value)

    _put(training, "initialize_megatron", _with_visible_gpu(training.initialize_megatron))
    _put(training, "set_jit_fusion_options", lambda *args, **kwargs: None)

    # The wheel ships the compiled dataset helper but not the Makefile that would build it.
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        _put(importlib.import_module("megatron.core.datasets.utils"), "compile_helpers", lambda: None)


def _with_visible_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's initialisation asks for a GPU and skips its process groups and seeds without one."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        available, count = torch.cuda.is_available, torch.cuda.device_count
        torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
        try:
            return function(*args, **kwargs)
        finally:
            torch.cuda.is_available, torch.cuda.device_count = available, count

    return call


def is_enabled() -> bool:
    """Whether the stand-ins are in place."""
    return bool(_patches)


def enable() -> bool:
    """Puts the stand-ins in place; idempotent. Call before `megatron.training.pretrain`.

    Returns True where the stand-ins are active, False on a machine with a GPU, where nothing is touched.
    """
    if is_enabled():
        return True
    if torch.cuda.is_available():
        return False
    # Loaded while torch is still itself: Megatron brings in torch._dynamo, which would keep the stand-ins for ever.
    importlib.import_module("megatron.training.training")
    try:
        _patch_torch()
        _patch_megatron()
    except BaseException:
        disable()
        raise
    logger.info("no GPU found: CUDA stand-ins are active, collectives need --distributed-backend gloo")
    return True


def disable() -> None:
    """Puts every original back, newest first; harmless when nothing is enabled."""
    while _patches:
        owner, name, original = _patches.pop()
        if original is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


@contextlib.contextmanager
def enabled() -> Iterator[bool]:
    """`enable()` for the length of a block; leaves things as they were on exit."""
    before = is_enabled()
    active = enable()
    try:
        yield active
    finally:
        if not before:
            disable()
