"""A random Llama of 60 thousand parameters, or a relative, as a Hugging Face folder, with a tokenizer of 63 words."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 63
"""Odd on purpose: Megatron pads it to 128, or 64."""
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
RELATIVES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama 3.1": {"rope_parameters": LLAMA3_ROPE},
    "wide heads": {"head_dim": 12},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 12},
}
"""Settings of `make_model` for each kind of model that is converted."""


def make_model(*, tied: bool = True, num_layers: int = 4, **settings: Any) -> PreTrainedModel:
    """4 heads in 2 groups of head size 8, weights large enough for logits of order 10, no two norms alike."""
    default = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
    }
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**default, **settings})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model


def make_tokenizer(words: int = VOCAB) -> PreTrainedTokenizerFast:
    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, words)}
    model = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def make_folder(folder: Path, **settings: Any) -> PreTrainedModel:
    """Saves model and tokenizer as transformers does; returns the model."""
    model = make_model(**settings)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model
