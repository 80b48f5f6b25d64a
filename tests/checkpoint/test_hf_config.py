import argparse

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_hybrid.checkpoint.hf_config import hf_config_to_megatron_args, megatron_args_to_hf_config, megatron_flags
from megatron_hybrid.checkpoint.llama_arguments import NEEDED, PLAIN, SAID, WITHOUT_EFFECT
from megatron_hybrid.errors import DataError
from megatron_hybrid.mcore.architecture import ARCHITECTURE
from tests.checkpoint.tiny_llama import LLAMA3_ROPE, RELATIVES, make_model

CONFIG = make_model().config.to_dict()


def test_smollm2_numbers_arrive_under_megatron_names():
    args = hf_config_to_megatron_args(
        {
            "model_type": "llama",
            "num_hidden_layers": 30,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rope_theta": 100000,  # as transformers 4 wrote it
            "rms_norm_eps": 1e-05,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "vocab_size": 49152,
        }
    )
    assert args["rotary_base"] == 100000
    assert args["kv_channels"] == 64
    assert (args["num_query_groups"], args["group_query_attention"]) == (3, True)
    assert (args["vocab_size"], args["padded_vocab_size"], args["make_vocab_size_divisible_by"]) == (49152, 49152, 128)
    assert args["untie_embeddings_and_output_weights"] is False
    assert args["hidden_dropout"] == args["attention_dropout"] == 0.0  # Megatron's own default is 0.1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("relative", RELATIVES)
def test_the_architecture_survives_the_round_trip(relative, tied):
    config = make_model(tied=tied, **RELATIVES[relative]).config.to_dict()
    back = megatron_args_to_hf_config(hf_config_to_megatron_args(config))
    if relative == "mistral":  # without a window the same function
        assert back.pop("model_type") == "llama"
    for name in (back.keys() & config.keys()) - {"architectures"}:  # transformers fills that in while saving
        assert back[name] == config[name], name


def test_padding_can_be_chosen_and_never_cuts():
    args = hf_config_to_megatron_args(CONFIG, pad_vocab_to=66)
    assert (args["vocab_size"], args["padded_vocab_size"], args["make_vocab_size_divisible_by"]) == (63, 66, 66)
    with pytest.raises(DataError, match="below the vocabulary of 63"):
        hf_config_to_megatron_args(CONFIG, pad_vocab_to=60)


def test_a_head_keeps_the_rows_beyond_its_tokenizer_by_its_flags_or_misses_them_aloud():
    args = hf_config_to_megatron_args(CONFIG)
    flags = megatron_flags(args)
    for name, rows in (("--vocab-size", "63"), ("--padded-vocab-size", "128")):
        assert flags[flags.index(name) + 1] == rows
    # Megatron's own padding, of a tokenizer that has fewer tokens than the model had rows.
    with pytest.raises(DataError, match=r"has 62 rows and vocab_size is 63: .*Give the --padded-vocab-size"):
        megatron_args_to_hf_config(args | {"padded_vocab_size": 62})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"model_type": "gemma2"}, "gemma2"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {**LLAMA3_ROPE, "factor": 32.0}}, r"'llama3'.*'factor': 32\.0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.5}}, r"10000\.5"),
        ({"model_type": "mistral", "max_position_embeddings": 8192}, "sliding window of 4096"),
        ({"model_type": "mistral", "sliding_window": 63}, "max_position_embeddings to 63"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32}, "sliding window of 32"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "linear"),
        # The older key.
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn'"),
    ],
)
def test_what_would_compute_something_else_is_refused(setting, message):
    with pytest.raises(DataError, match=message):
        hf_config_to_megatron_args({**CONFIG, **setting})


def test_a_window_that_never_acts_is_no_obstacle():
    for window in ({"model_type": "mistral", "sliding_window": 64}, {"model_type": "qwen2", "sliding_window": 4}):
        hf_config_to_megatron_args({**CONFIG, **window})


def test_both_keys_of_the_kind_of_rotation_mean_the_same():
    scaling = {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_type"}
    for key in ("type", "rope_type"):
        config = {**CONFIG, "rope_parameters": None, "rope_scaling": {**scaling, key: "llama3"}}
        assert hf_config_to_megatron_args(config)["use_rope_scaling"] is True


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"normalization": "LayerNorm"}, "normalization"),
        ({"window_size": (15, 0)}, "window_size"),
        ({"rotary_percent": 0.5}, "rotary_percent"),
        ({"add_qkv_bias": True, "qk_layernorm": True}, "add_qkv_bias"),
        ({"no_rope_freq": [0, 0, 0, 1]}, "no_rope_freq"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        ({"use_mup": True}, "use_mup"),
        ({"activation_func_clamp_value": 7.0}, "activation_func_clamp_value"),
        ({"glu_linear_offset": 1.0}, "glu_linear_offset"),
        ({"apply_layernorm_1p": True}, "layernorm_zero_centered_gamma"),  # as older versions called it
    ],
)
def test_a_model_that_is_no_llama_is_not_exported_as_one(setting, named):
    with pytest.raises(DataError, match=named):
        megatron_args_to_hf_config({**hf_config_to_megatron_args(CONFIG), **setting})


def test_every_argument_of_an_architecture_is_sorted_once():
    for name in ARCHITECTURE:
        kinds = [name in SAID, name in NEEDED, name in PLAIN, name.startswith(WITHOUT_EFFECT)]
        assert kinds.count(True) == 1, name
    assert {*SAID, *NEEDED, *PLAIN} <= {*ARCHITECTURE}


def test_what_a_checkpoint_need_not_say_is_megatrons_default():
    parser = argparse.ArgumentParser()
    add_megatron_arguments(parser)
    assert {name: parser.get_default(name) for name in PLAIN} == PLAIN


def test_arguments_as_megatron_saves_them_are_a_llamas():
    parser = argparse.ArgumentParser()
    add_megatron_arguments(parser)
    args = hf_config_to_megatron_args(CONFIG)
    everything = {name: parser.get_default(name) for name in ARCHITECTURE} | args
    assert megatron_args_to_hf_config(everything) == megatron_args_to_hf_config(args)


@pytest.mark.parametrize("relative", RELATIVES)
def test_the_flags_say_the_same_as_the_arguments(relative):
    args = hf_config_to_megatron_args(make_model(tied=False, **RELATIVES[relative]).config.to_dict())
    flags = megatron_flags(args)
    parser = argparse.ArgumentParser()
    for flag in (
        "disable-bias-linear",
        "swiglu",
        "group-query-attention",
        "untie-embeddings-and-output-weights",
        "add-qkv-bias",
        "qk-layernorm",
        "use-rope-scaling",
    ):
        parser.add_argument(f"--{flag}", action="store_true")
    for flag in (name for name in flags if name.startswith("--")):
        if flag not in parser._option_string_actions:
            parser.add_argument(flag)
    parsed = vars(parser.parse_args(flags))
    assert parsed.pop("disable_bias_linear") is not args["add_bias_linear"]
    for name, value in parsed.items():
        assert str(value) == str(args[name]), name
