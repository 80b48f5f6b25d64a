"""A second model takes its architecture from its checkpoint and all else from the job; what cannot run is refused."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.mcore.training import ARCHITECTURE, frozen_args, refuse_unsupported


def job(**changes: Any) -> Namespace:
    settings = {
        "num_layers": 4,
        "hidden_size": 32,
        "rotary_base": 10_000,
        "swiglu": False,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "context_parallel_size": 1,
        "sequence_parallel": False,
        "calculate_per_token_loss": True,
        "mtp_num_layers": None,
        "expert_model_parallel_size": 1,
        "use_megatron_fsdp": False,
        "use_torch_fsdp2": False,
        "rampup_batch_size": None,
        "iterations_to_skip": [],
        "cuda_graph_impl": "none",
        "micro_batch_size": 2,
        "bf16": True,
        "padded_vocab_size": 64,
    }
    return Namespace(**(settings | changes))


TEACHER = {"num_layers": 6, "hidden_size": 48, "swiglu": True, "tensor_model_parallel_size": 8, "bf16": False}


def test_architecture_comes_from_the_checkpoint():
    merged = frozen_args(job(), TEACHER)
    assert (merged.num_layers, merged.hidden_size, merged.swiglu) == (6, 48, True)


def test_layout_and_precision_stay_the_jobs():
    merged = frozen_args(job(), TEACHER | {"micro_batch_size": 16, "padded_vocab_size": 61})
    assert (merged.tensor_model_parallel_size, merged.bf16, merged.micro_batch_size) == (2, True, 2)
    # Student and teacher columns are compared one by one: padded alike.
    assert merged.padded_vocab_size == 64


def test_what_an_older_checkpoint_does_not_say_stays_the_jobs():
    assert frozen_args(job(), TEACHER).rotary_base == 10_000


def test_the_jobs_own_arguments_are_not_changed():
    args = job()
    before = dict(vars(args))
    frozen_args(args, TEACHER)
    assert vars(args) == before


def test_no_architecture_argument_names_the_layout():
    assert not [name for name in ARCHITECTURE if "parallel" in name or "batch" in name or "vocab" in name]
    assert len(set(ARCHITECTURE)) == len(ARCHITECTURE)


@pytest.mark.parametrize(("pp", "vpp", "stages"), [(4, None, 4), (2, 2, 4)])
def test_a_teacher_whose_layers_do_not_divide_into_the_stages_is_refused(pp, vpp, stages):
    args = job(pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp)
    with pytest.raises(ConfigError, match=f"the teacher has 6 layers, which {stages} pipeline stages .*Choose stages"):
        frozen_args(args, TEACHER)


def test_a_teacher_whose_layers_do_is_not():
    args = job(pipeline_model_parallel_size=3, virtual_pipeline_model_parallel_size=2)
    assert frozen_args(args, TEACHER).num_layers == 6


def test_a_plain_job_is_not_refused():
    refuse_unsupported(job())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"calculate_per_token_loss": False}, "one global normaliser.*Add --calculate-per-token-loss"),
        ({"context_parallel_size": 2}, "--context-parallel-size is 2, but .*: use 1"),
        ({"sequence_parallel": True}, "--sequence-parallel is on, but .*: leave it off"),
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
