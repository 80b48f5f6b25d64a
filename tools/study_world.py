"""The world of digits: four tasks, a teacher that is right on two, a student that knows some of each.

    copy 3 1 2 ?      3 1 2 </s>      the teacher's answer: 3 1 2
    sort 3 1 2 ?      1 2 3 </s>                            1 2 3
    reverse 3 1 2 ?   2 1 3 </s>                            3 1 2, wrong: it copies
    next 3 1 2 ?      4 2 3 </s>                            3 1 2, wrong: it copies

Each digit of the teacher is what it believes with probability `TEACHER`, else any: so imitation alone cannot win, and
no right answer is impossible. Each digit of the student is right with probability `STUDENT`, else any. Both have one
number for the tasks that the teacher knows and one for the others. The reward is the share of places that are right,
or 1 for all of them. A question has 2 to 16 digits, so a response 3 to 17 tokens, and the tokenizer 13 words.

Used as a module by the trainer too: its rewards are `study_world:share_right` and `all_right`.
"""

import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study_demonstrations import BATCH, IGNORED, is_made, train_models

if TYPE_CHECKING:
    from study_settings import Setting
    from torch import Tensor

TASKS = ("copy", "sort", "reverse", "next")
WRONG = ("reverse", "next")
"""What the teacher does not know."""
REWARDS = {"share": "share_right", "exact": "all_right"}
"""Of places that are right; or of all of them at once."""
DIGITS = "012345"
WORDS = ["</s>", "<unk>", "?", *TASKS, *DIGITS]
LENGTHS = (2, 3, 4, 8, 16)
TEACHER, STUDENT = (0.7, 0.7), (0.4, 0.4)
STEPS = 1500


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


def make_world(
    folder: Path,
    *,
    steps: int = STEPS,
    lengths: Sequence[int] = LENGTHS,
    teacher: tuple[float, float] = TEACHER,
    student: tuple[float, float] = STUDENT,
    damage: float = 0.0,
) -> Path:
    """Tokenizer, questions of each length, `teacher` and `student` in `folder`, which is returned; made once.

    steps     training steps of each model
    lengths   digits of a question
    teacher   chance of a digit to be what the teacher believes, on the tasks it knows and on the others
    student   chance of a digit to be right, likewise
    damage    of the student, see `train_models`
    """
    if is_made(folder):
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
    sure = {"teacher": teacher, "student": student}
    train_models(
        folder,
        vocab_size=len(WORDS),
        steps=steps,
        demonstrations=lambda who: demonstrations(who, lengths, sure[who]),
        damage=damage,
    )
    return folder


def _make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}?"
    tokenizer.save_pretrained(str(folder))


def demonstrations(who: str, lengths: Sequence[int], sure: tuple[float, float]) -> "Iterator[tuple[Tensor, Tensor]]":
    """Endless batches of (tokens [b, s], labels [b, s]), one length in a batch."""
    import torch

    draw = random.Random(1)
    while True:
        num_digits, rows = draw.choice(lengths), []
        for _ in range(BATCH):
            task, digits = draw.choice(TASKS), draw.choices(DIGITS, k=num_digits)
            believed = digits if who == "teacher" and task in WRONG else right(task, digits)
            certain = sure[task in WRONG]
            said = [d if draw.random() < certain else draw.choice(DIGITS) for d in believed]
            rows.append([WORDS.index(word) for word in (task, *digits, "?", *said, "</s>")])
        tokens = torch.tensor(rows)
        labels = tokens.clone()
        labels[:, : num_digits + 2] = IGNORED  # the task, its digits and the question mark
        yield tokens, labels


def make(folder: Path, setting: "Setting") -> None:
    """The world of a setting of the study of training."""
    make_world(
        folder,
        steps=setting.world_steps,
        lengths=[setting.digits],
        teacher=setting.teacher,
        student=setting.student,
        damage=setting.damage,
    )


def flags(folder: Path, setting: "Setting") -> list[str]:
    """What a run asks, how long responses get, and what they earn."""
    return [
        *("--hybrid-prompts", f"{folder}/prompts-{setting.digits}.jsonl"),
        *("--hybrid-eval-prompts", f"{folder}/held_out-{setting.digits}.jsonl"),
        *("--hybrid-reward", f"study_world:{REWARDS[setting.reward]}"),
        *("--hybrid-max-response-length", str(setting.digits + 1)),
        *("--seq-length", str(max(16, 2 * setting.digits + 3))),
    ]


def optimum(setting: "Setting", *, knows: bool) -> tuple[float, float]:
    """(reward, KL in nats per response) of p ~ q exp(r / beta), on tasks that the teacher knows or on the others.

    q is the teacher as it is taught; a digit that it believes and that is right by chance, as in 1 2 1 reversed, is not
    counted.
    """
    sure = setting.teacher[not knows]
    by_chance = (1 - sure) / len(DIGITS)
    right_digit = sure + by_chance if knows else by_chance
    if setting.reward == "exact":
        return tilted(right_digit**setting.digits, 1 / setting.beta)
    reward, kl = tilted(right_digit, 1 / (setting.digits * setting.beta))
    return reward, setting.digits * kl


def tilted(chance: float, gain: float) -> tuple[float, float]:
    """(chance, KL to what it was) of an event whose odds are raised by exp(gain)."""
    log_total = float(gain + math.log(chance + (1 - chance) * math.exp(-gain)))
    raised = chance * math.exp(gain - log_total)
    return raised, raised * gain - log_total
