"""The small worlds' models: Llama-shaped, trained by cross-entropy on demonstrations, written as Megatron checkpoints.

    endless (tokens [b, s], labels [b, s]) ─► transformers, AdamW, one cycle ─► FOLDER/teacher, FOLDER/student

Some half a minute on a core for a model of 600 steps. Not here: what a model is shown, which is its world's.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 128
"""Demonstrations of a step."""
IGNORED = -100
"""Label of what is not learnt: all but the response."""
LONGEST = 64

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": LONGEST,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}

Demonstrations = Callable[[str], "Iterator[tuple[Tensor, Tensor]]"]
"""`teacher` or `student` to endless batches of (tokens [b, s], labels [b, s])."""


def is_made(folder: Path) -> bool:
    """Whether a world is whole: the student is the last that is written."""
    return _is_written(folder / "student")


def _is_written(checkpoint: Path) -> bool:
    from megatron_hybrid.mcore.checkpoint_io import TRACKER

    return (checkpoint / TRACKER).exists()


def train_models(
    folder: Path,
    *,
    vocab_size: int,
    steps: int,
    demonstrations: Demonstrations,
    peak_lr: float = 2e-3,
    damage: float = 0.0,
) -> None:
    """`teacher` and `student` in `folder`, which has their `tokenizer`.

    damage    what is done to the student afterwards: noise on every matrix, in standard deviations of its own
    """
    for who in ("teacher", "student"):
        if not _is_written(folder / who):
            model = _trained(folder / who, vocab_size, steps, demonstrations(who), peak_lr)
            if who == "student" and damage:
                _damage(model, damage)
            _save(model, folder / who, vocab_size)


def _trained(
    folder: Path, vocab_size: int, steps: int, batches: "Iterator[tuple[Tensor, Tensor]]", peak_lr: float
) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0 if folder.name == "teacher" else 1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(vocab_size=vocab_size, **SHAPE))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peak_lr, total_steps=steps)
    for step, (tokens, labels) in zip(range(steps), batches, strict=False):
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step + 1 == steps:
            print(f"making {folder}, step {step + 1}/{steps}, loss {loss.item():.3f}", flush=True)
    return model


def _damage(model: Any, damage: float) -> None:
    import torch

    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for matrix in (weight for weight in model.parameters() if weight.dim() > 1):
            matrix += damage * matrix.std() * torch.randn(matrix.shape, generator=draw)


def _save(model: Any, folder: Path, vocab_size: int) -> None:
    from megatron_hybrid.checkpoint.convert import hf_to_megatron
    from megatron_hybrid.checkpoint.hf_config import hf_config_to_megatron_args
    from megatron_hybrid.mcore.checkpoint_io import save_megatron_checkpoint

    args = hf_config_to_megatron_args(model.config.to_dict(), pad_vocab_to=vocab_size)
    args |= {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(folder.parent / "tokenizer")}
    save_megatron_checkpoint(folder, hf_to_megatron(model.state_dict(), args), args)
