"""The small world of the studies: four tasks on digits, a teacher that is right on two, a student that half knows all.

    copy 3 1 2 ?      3 1 2 </s>      the teacher's answer: 3 1 2
    sort 3 1 2 ?      1 2 3 </s>                            1 2 3
    reverse 3 1 2 ?   2 1 3 </s>                            3 1 2, wrong: it copies
    next 3 1 2 ?      4 2 3 </s>                            3 1 2, wrong: it copies

Each digit of the teacher is what it believes with probability `SURE`, else any: so imitation alone cannot win, and no
right answer is impossible. The student starts right in `HALF` of the digits. The reward is the share of places that are
right. A question has 2 to 16 digits, so a response 3 to 17 tokens.

Both models are Llama-shaped, trained here by cross-entropy on demonstrations (transformers, AdamW), then written as
Megatron checkpoints with a tokenizer of 13 words: some two minutes on a core, once for a folder. Used as a module by
the trainer too: its rewards are `study_world:share_right` and `all_right`.
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

TASKS = ("copy", "sort", "reverse", "next")
WRONG = ("reverse", "next")
"""What the teacher does not know."""
DIGITS = "012345"
WORDS = ["</s>", "<unk>", "?", *TASKS, *DIGITS]
LENGTHS = (2, 3, 4, 8, 16)
SURE, HALF = 0.7, 0.4
STEPS, BATCH = 1500, 128

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": len(WORDS),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}


def right(task: str, digits: list[str]) -> list[str]:
    """The answer to a question."""
    if task == "sort":
        return sorted(digits)
    if task == "reverse":
        return digits[::-1]
    return [DIGITS[(DIGITS.index(d) + 1) % len(DIGITS)] for d in digits] if task == "next" else digits


def share_right(question: str, response: str, answer: str | None, record: dict[str, Any]) -> float:
    """The reward: places of the answer that the response has right, over the longer of the two."""
    said, expected = response.split(), (answer or "").split()
    return sum(a == b for a, b in zip(said, expected, strict=False)) / max(len(said), len(expected))


def all_right(question: str, response: str, answer: str | None, record: dict[str, Any]) -> float:
    """A harder reward: 1 for the whole answer, else 0."""
    return float(share_right(question, response, answer, record) == 1)


def questions(num_digits: int, count: int, seed: int) -> list[dict[str, Any]]:
    """Different questions of this length, tasks in turn."""
    draw, asked = random.Random(seed), {}
    while len(asked) < count:
        task, digits = TASKS[len(asked) % len(TASKS)], draw.choices(DIGITS, k=num_digits)
        prompt = " ".join([task, *digits])
        asked.setdefault(prompt, {"prompt": prompt, "answer": " ".join(right(task, digits)), "task": task})
    return list(asked.values())


def make_world(folder: Path, *, steps: int = STEPS, lengths: Sequence[int] = LENGTHS, knows: float = HALF) -> Path:
    """Tokenizer, questions of each length, `teacher` and `student` in `folder`, which is returned; made once.

    steps    training steps of each model
    lengths  digits of a question
    knows    chance that the student knows a digit; else it says any
    """
    if (folder / "student" / "latest_checkpointed_iteration.txt").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _make_tokenizer(folder / "tokenizer")
    for num_digits in lengths:
        # 36 numbers of two digits are few: then each task has but some of its questions here, and the rest held out.
        every = questions(num_digits, 96 if num_digits == 2 else 768, seed=num_digits)
        held_out = len(every) // 3
        for name, part in (("held_out", every[:held_out]), ("prompts", every[held_out:])):
            lines = "".join(json.dumps(question) + "\n" for question in part)
            (folder / f"{name}-{num_digits}.jsonl").write_text(lines, encoding="utf-8")
    for name in ("teacher", "student"):  # the student last: it says that all is there
        _train(folder / name, name, steps, demonstrations(name, lengths, knows))
    return folder


def _make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}?"
    tokenizer.save_pretrained(str(folder))


def demonstrations(who: str, lengths: Sequence[int], knows: float) -> "Iterator[tuple[Tensor, Tensor]]":
    """Endless batches of (tokens [b, s], labels [b, s]), labels -100 but on the response; one length in a batch."""
    import torch

    draw = random.Random(1)
    while True:
        num_digits, rows = draw.choice(lengths), []
        for _ in range(BATCH):
            task, digits = draw.choice(TASKS), draw.choices(DIGITS, k=num_digits)
            believed = digits if who == "teacher" and task in WRONG else right(task, digits)
            certain = SURE if who == "teacher" else knows
            said = [d if draw.random() < certain else draw.choice(DIGITS) for d in believed]
            rows.append([WORDS.index(word) for word in (task, *digits, "?", *said, "</s>")])
        tokens = torch.tensor(rows)
        labels = tokens.clone()
        labels[:, : num_digits + 2] = -100  # the task, its digits and the question mark
        yield tokens, labels


def _train(folder: Path, who: str, steps: int, batches: "Iterator[tuple[Tensor, Tensor]]") -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_hybrid.checkpoint.convert import hf_to_megatron
    from megatron_hybrid.checkpoint.hf_config import hf_config_to_megatron_args
    from megatron_hybrid.mcore.checkpoint_io import save_megatron_checkpoint

    torch.manual_seed(0 if who == "teacher" else 1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPE))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for step, (tokens, labels) in zip(range(steps), batches, strict=False):
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step + 1 == steps:
            print(f"making the small world: {who}, step {step + 1}/{steps}, loss {loss.item():.3f}", flush=True)
    args = hf_config_to_megatron_args(model.config.to_dict(), pad_vocab_to=len(WORDS))
    args |= {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(folder.parent / "tokenizer")}
    save_megatron_checkpoint(folder, hf_to_megatron(model.state_dict(), args), args)
