"""What cannot run is refused before a model is built, with what to do."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.mcore.training import refuse_unsupported


def job(**changes: Any) -> Namespace:
    settings = {
        "num_experts": None,
        "moe_aux_loss_coeff": 0.0,
        "moe_z_loss_coeff": None,
        "calculate_per_token_loss": True,
        "mtp_num_layers": None,
        "expert_model_parallel_size": 1,
        "use_megatron_fsdp": False,
        "use_torch_fsdp2": False,
        "rampup_batch_size": None,
        "iterations_to_skip": [],
        "cuda_graph_impl": "none",
    }
    return Namespace(**(settings | changes))


def test_a_plain_job_is_not_refused():
    refuse_unsupported(job())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"calculate_per_token_loss": False}, "one global normaliser.*Add --calculate-per-token-loss"),
        ({"num_experts": 4, "moe_aux_loss_coeff": 0.01}, "--moe-aux-loss-coeff is 0.01: .*Set it to 0"),
        ({"num_experts": 4, "moe_aux_loss_coeff": [0.0, 0.1]}, "--moe-aux-loss-coeff is .*Set it to 0"),
        ({"num_experts": 4, "moe_z_loss_coeff": 0.001}, "--moe-z-loss-coeff is 0.001: .*Set it to 0"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers: .*train without them"),
        ({"expert_model_parallel_size": 2}, "--expert-model-parallel-size above 1 is not supported.*train without"),
        ({"use_megatron_fsdp": True}, "--use-megatron-fsdp is not supported"),
        ({"use_torch_fsdp2": True}, "--use-torch-fsdp2 is not supported"),
        ({"rampup_batch_size": [8, 8, 100]}, "--rampup-batch-size is not supported"),
        ({"iterations_to_skip": [3]}, "--iterations-to-skip is not supported"),
        ({"cuda_graph_impl": "full_iteration"}, "full-iteration CUDA graphs is not supported"),
    ],
)
def test_a_setting_the_hybrid_path_cannot_honour_is_refused_with_what_to_do(setting, message):
    with pytest.raises(ConfigError, match=message):
        refuse_unsupported(job(**setting))
