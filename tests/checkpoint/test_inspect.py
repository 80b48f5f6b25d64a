"""What a folder says of itself, from metadata alone."""

import json
import struct

import pytest

from megatron_hybrid.checkpoint.folders import hf_folder_to_megatron
from megatron_hybrid.checkpoint.inspect import TensorEntry, inspect_folder
from megatron_hybrid.errors import DataError
from tests.checkpoint.tiny_llama import make_folder

H, LAYERS = 32, 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_folder(folder / "hf", num_layers=LAYERS, tied=False, model_type="qwen3")
    hf_folder_to_megatron(folder / "hf", folder / "megatron", dtype="bfloat16")
    return folder


def test_a_hugging_face_folder_names_its_tensors(folders):
    found = inspect_folder(folders / "hf")
    facts = dict(found.facts)
    assert found.kind == "Hugging Face model"
    assert facts["model"] == "qwen3 Qwen3ForCausalLM"
    assert facts["vocabulary"] == "63"
    assert TensorEntry("model.layers.1.self_attn.q_norm.weight", (8,), "float32", True) in found.tensors


def test_a_megatron_checkpoint_names_tensors_layout_and_vocabulary(folders, monkeypatch):
    from megatron.core import dist_checkpointing

    def load(*args, **options):
        raise AssertionError("tensors are not to be loaded")

    monkeypatch.setattr(dist_checkpointing, "load", load)
    found = inspect_folder(folders / "megatron")
    facts = dict(found.facts)
    assert facts["vocabulary"] == "63 true, 128 padded"
    assert facts["saved with"] == "TP 1 x PP 1 x VPP 1 x CP 1 x EP 1 x DP 1"
    assert facts["iteration"] == "0"
    assert facts["tokenizer"] == f"HuggingFaceTokenizer {folders / 'hf'}"
    assert "num_layers 2, hidden_size 32" in facts["architecture"]
    # Layers are stacked on disk.
    name = "decoder.layers.self_attention.q_layernorm.weight"
    assert TensorEntry(name, (LAYERS, 8), "bfloat16", True) in found.tensors
    per_layer = 3 * 48 * H + (32 + 16 + 16) * H + H * 32 + 2 * H + 2 * 8
    assert facts["parameters"] == f"{LAYERS * per_layer + H + 2 * 128 * H:,} in bfloat16"


def test_a_model_larger_than_memory_is_described_by_its_header(tmp_path):
    # 4 TB that no disk holds: the file is a header and a hole.
    size = 4 * 10**12
    entry = {"model.embed_tokens.weight": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}
    header = json.dumps(entry).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    (tmp_path / "config.json").write_text("{}")
    (tensor,) = inspect_folder(tmp_path).tensors
    assert (tensor.shape, tensor.dtype) == ((size // 2,), "bfloat16")


def test_pickled_and_broken_weights_are_refused_with_a_reason(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(DataError, match="pickled"):
        inspect_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(DataError, match="no whole safetensors file"):
        inspect_folder(tmp_path)
