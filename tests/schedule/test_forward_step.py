"""What the forward step takes of a script's own batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.errors import ConfigError
from megatron_hybrid.schedule.forward_step import HybridForwardStep

FIVE = tuple(torch.zeros(1, 2) for _ in range(5))


def model(*args: Any, **kwargs: Any) -> str:
    return "output"


def test_a_batch_may_end_in_packing_parameters_of_none():
    step = HybridForwardStep(base_loss_func=lambda mask, output: None)
    assert step(iter([(*FIVE, None)]), model)[0] == "output"


@pytest.mark.parametrize("config", [None, HybridConfig()], ids=["hybrid off", "demonstrations"])
def test_packing_parameters_are_not_dropped_in_silence(config):
    step = HybridForwardStep(config, base_loss_func=None if config else lambda mask, output: None)
    with pytest.raises(ConfigError, match="get_batch returned 6 values, .*object would be silently dropped"):
        step(iter([(*FIVE, object())]), model)
