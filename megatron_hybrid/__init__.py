"""Hybrid online imitation and reinforcement learning for Megatron-LM (arXiv 2512.23097).

The public names below are loaded on first use: `import megatron_hybrid` imports neither torch nor Megatron, and no
import of this package ever changes either of them. What changes them is called (`cpu.enable`, `pretrain_hybrid`),
and undone again.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from megatron_hybrid import errors as errors
    from megatron_hybrid.cli.arguments import add_hybrid_args as add_hybrid_args
    from megatron_hybrid.cli.arguments import hybrid_config_from_args as hybrid_config_from_args
    from megatron_hybrid.config import HybridConfig as HybridConfig
    from megatron_hybrid.online_config import OnlineConfig as OnlineConfig
    from megatron_hybrid.ops.api import HybridLoss as HybridLoss
    from megatron_hybrid.ops.api import vocab_parallel_hybrid_loss as vocab_parallel_hybrid_loss
    from megatron_hybrid.ops.lm_head import linear_hybrid_loss as linear_hybrid_loss
    from megatron_hybrid.ops.topk import vocab_parallel_topk_hybrid_loss as vocab_parallel_topk_hybrid_loss
    from megatron_hybrid.returns.returns_to_go import cost_to_go as cost_to_go
    from megatron_hybrid.runtime import cpu as cpu
    from megatron_hybrid.schedule.forward_step import HybridForwardStep as HybridForwardStep
    from megatron_hybrid.train.pretrain import pretrain_hybrid as pretrain_hybrid

_HOMES = {
    "HybridConfig": "config",
    "HybridForwardStep": "schedule.forward_step",
    "HybridLoss": "ops.api",
    "OnlineConfig": "online_config",
    "add_hybrid_args": "cli.arguments",
    "cost_to_go": "returns.returns_to_go",
    "cpu": "runtime.cpu",
    "errors": "errors",
    "hybrid_config_from_args": "cli.arguments",
    "linear_hybrid_loss": "ops.lm_head",
    "pretrain_hybrid": "train.pretrain",
    "vocab_parallel_hybrid_loss": "ops.api",
    "vocab_parallel_topk_hybrid_loss": "ops.topk",
}
"""Public name to the module below this package that holds it, or that it is (`cpu`, `errors`)."""

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    """Loads a public name on its first use and keeps it (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    home = _HOMES[name]
    try:
        module = import_module(f"{__name__}.{home}")
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "megatron":
            raise
        from megatron_hybrid.mcore.symbols import mismatch

        raise mismatch(error.name or "megatron", error) from error
    value = module if home.rpartition(".")[2] == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
