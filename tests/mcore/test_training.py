"""What cannot run is refused before a model is built, with what to do."""

from __future__ import annotations

import inspect
from argparse import Namespace
from typing import Any

import pytest
from megatron.training import training

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.mcore.training import refuse_unsupported, started


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


# A `pretrain` that parses the command line itself.


def old_pretrain(
    train_valid_test_dataset_provider, model_provider, forward_step_func, extra_args_provider=None, store=3
):
    training.initialize_megatron(extra_args_provider=extra_args_provider, store=store)


def test_what_pretrain_would_parse_first_is_parsed_before_it_and_once(monkeypatch):
    calls: list[dict[str, Any]] = []

    def initialize(extra_args_provider=None, args_defaults=None, store=None):
        calls.append({"extra_args_provider": extra_args_provider, "args_defaults": args_defaults, "store": store})

    monkeypatch.setattr(training, "pretrain", old_pretrain)
    monkeypatch.setattr(training, "initialize_megatron", initialize)
    monkeypatch.setattr("megatron_hybrid.mcore.training.get_args", lambda: len(calls))
    call = inspect.signature(old_pretrain).bind("data", "model", "step", extra_args_provider="ours")
    with pytest.raises(ArithmeticError), started(call) as arguments:
        assert arguments == 1  # there are arguments, of one parsing
        old_pretrain(*call.args, **call.kwargs)
        raise ArithmeticError
    assert calls == [{"extra_args_provider": "ours", "args_defaults": None, "store": None}]
    assert training.initialize_megatron is initialize


def test_a_pretrain_of_today_finds_its_start_as_it_was(monkeypatch):
    monkeypatch.setattr("megatron_hybrid.mcore.training.get_args", lambda: "parsed by the script")
    before = training.initialize_megatron
    with started(inspect.signature(training.pretrain).bind_partial()) as arguments:
        assert arguments == "parsed by the script"
        assert training.initialize_megatron is before
