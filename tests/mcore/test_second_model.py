"""A second model takes its architecture from its checkpoint and all else from the job; what cannot run is refused."""

from __future__ import annotations

import argparse
import dataclasses
from argparse import Namespace
from typing import Any

import pytest
from megatron.core.transformer import MLATransformerConfig
from megatron.training.arguments import add_megatron_arguments

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.mcore.architecture import ARCHITECTURE, THE_JOBS
from megatron_hybrid.mcore.second_model import frozen_args


def job(**changes: Any) -> Namespace:
    settings = {
        "num_layers": 4,
        "hidden_size": 32,
        "rotary_base": 10_000,
        "swiglu": False,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "micro_batch_size": 2,
        "seq_length": 32,
        "bf16": True,
        "padded_vocab_size": 64,
        "spec": None,
    }
    return Namespace(**(settings | changes))


TEACHER = {
    "num_layers": 6,
    "hidden_size": 48,
    "swiglu": True,
    "position_embedding_type": "rope",
    "tensor_model_parallel_size": 8,
    "bf16": False,
}


def test_architecture_comes_from_the_checkpoint():
    merged = frozen_args(job(), TEACHER)
    assert (merged.num_layers, merged.hidden_size, merged.swiglu) == (6, 48, True)


def test_layout_and_precision_stay_the_jobs():
    merged = frozen_args(job(), TEACHER | {"micro_batch_size": 16, "padded_vocab_size": 61})
    assert (merged.tensor_model_parallel_size, merged.bf16, merged.micro_batch_size) == (2, True, 2)
    # Student and teacher columns are compared one by one: padded alike.
    assert merged.padded_vocab_size == 64


def test_what_a_checkpoint_does_not_say_is_megatrons_default_and_not_the_jobs():
    merged = frozen_args(job(rotary_base=50_000, qk_layernorm=True, hybrid_layer_pattern="*-"), TEACHER)
    assert (merged.rotary_base, merged.qk_layernorm, merged.hybrid_layer_pattern) == (10_000, False, None)


def test_older_names_are_understood():
    merged = frozen_args(job(), TEACHER | {"norm_epsilon": 1e-6, "apply_layernorm_1p": True})
    assert (merged.layernorm_epsilon, merged.layernorm_zero_centered_gamma) == (1e-6, True)
    merged = frozen_args(job(), TEACHER | {"norm_epsilon": 1e-6, "layernorm_epsilon": 1e-5})
    assert merged.layernorm_epsilon == 1e-5, "the newer name counts"


def test_the_jobs_own_arguments_are_not_changed():
    args = job()
    before = dict(vars(args))
    frozen_args(args, TEACHER)
    assert vars(args) == before


def megatrons() -> set[str]:
    """Names of all arguments of Megatron's command line."""
    parser = argparse.ArgumentParser()
    add_megatron_arguments(parser)
    return {action.dest for action in parser._actions}


def test_every_argument_that_is_sorted_is_one_of_megatrons():
    assert not {*ARCHITECTURE, *THE_JOBS} - megatrons()


def test_every_argument_that_shapes_a_model_is_sorted_to_checkpoint_or_job():
    """A name in this list is new in the installed Megatron: does it change what given weights compute in eval mode?"""
    fields = {field.name for field in dataclasses.fields(MLATransformerConfig)}  # those of TransformerConfig, too
    assert sorted((fields & megatrons()) - {*ARCHITECTURE, *THE_JOBS}) == []


def test_an_argument_is_sorted_once():
    assert len({*ARCHITECTURE, *THE_JOBS}) == len(ARCHITECTURE) + len(THE_JOBS)


def test_no_architecture_argument_names_the_layout():
    assert not [name for name in ARCHITECTURE if "parallel" in name or "batch" in name or "vocab" in name]


def test_how_a_teacher_chooses_its_experts_is_the_checkpoints():
    balancing = {"moe_router_load_balancing_type": "sinkhorn", "moe_expert_capacity_factor": 1.5}
    merged = frozen_args(job(moe_router_load_balancing_type="none"), TEACHER | balancing)
    assert (merged.moe_router_load_balancing_type, merged.moe_expert_capacity_factor) == ("sinkhorn", 1.5)


@pytest.mark.parametrize(("pp", "vpp", "stages"), [(5, None, 5), (2, 5, 10), (8, None, 8)])
def test_a_teacher_whose_layers_do_not_divide_into_the_stages_is_refused(pp, vpp, stages):
    args = job(pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp)
    with pytest.raises(ConfigError, match=f"the teacher has 6 layers, which {stages} pipeline stages .*Choose stages"):
        frozen_args(args, TEACHER)


def test_a_teacher_whose_layers_do_is_not():
    args = job(pipeline_model_parallel_size=3, virtual_pipeline_model_parallel_size=2)
    assert frozen_args(args, TEACHER).num_layers == 6


@pytest.mark.parametrize(("pp", "vpp"), [(4, None), (2, 2)])
def test_embedding_and_loss_count_as_layers_where_only_that_divides(pp, vpp):
    args = job(pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp)
    merged = frozen_args(args, TEACHER)
    assert merged.account_for_embedding_in_pipeline_split and merged.account_for_loss_in_pipeline_split
    with pytest.raises(ConfigError, match="6 layers"):  # a pattern's stages are written into it
        frozen_args(args, TEACHER | {"hybrid_layer_pattern": "*-*-*-"})


def test_stages_cut_by_hand_are_the_students_and_serve_a_teacher_of_its_depth_only():
    by_hand = {"decoder_first_pipeline_num_layers": 1, "account_for_loss_in_pipeline_split": True}
    args = job(pipeline_model_parallel_size=3, **by_hand)
    same, other = frozen_args(args, TEACHER | {"num_layers": 4}), frozen_args(args, TEACHER)
    assert (same.decoder_first_pipeline_num_layers, same.account_for_loss_in_pipeline_split) == (1, True)
    assert (other.decoder_first_pipeline_num_layers, other.account_for_loss_in_pipeline_split) == (None, False)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (
            {"position_embedding_type": "learned_absolute", "max_position_embeddings": 16},
            "learned 16 positions.* is 32",
        ),
        ({"heterogeneous_layers_config_path": "x.json"}, "differ by a configuration file.*Use another"),
        ({"heterogeneous_layers_config_encoded_json": "{}"}, "differ by a configuration file"),
        ({"spec": ["subprocess", "getoutput"]}, "names code to import and run, and neither Megatron's nor"),
        ({"spec": "subprocess"}, "names code to import and run"),
    ],
)
def test_a_teacher_that_cannot_be_built_beside_the_student_is_refused(checkpoint, message):
    with pytest.raises(ConfigError, match=message):
        frozen_args(job(), TEACHER | checkpoint)


def test_a_layer_spec_of_megatron_or_of_this_job_is_taken():
    ours, megatrons = ["my_layers", "spec"], ["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"]
    assert frozen_args(job(spec=ours), TEACHER | {"spec": ours}).spec == ours
    assert frozen_args(job(), TEACHER | {"spec": megatrons}).spec == megatrons


@pytest.mark.parametrize("pattern", ["*-*-*-", "*|-*-*-", "*-*-*-/*-"])
def test_the_pattern_of_a_hybrid_teacher_is_cut_for_this_jobs_stages(pattern):
    teacher = TEACHER | {"hybrid_layer_pattern": pattern}
    assert frozen_args(job(), teacher).hybrid_layer_pattern == "*-*-*-"
    assert frozen_args(job(pipeline_model_parallel_size=3), teacher).hybrid_layer_pattern == "*-|*-|*-"
    assert frozen_args(job(num_layers=6, pipeline_model_parallel_size=2), teacher).hybrid_layer_pattern == "*-*|-*-"
