"""The world of reasoning-gym: four of its tasks with its own questions, answers and scores, small enough to be learnt.

    gcd         ...(GCD) of these numbers: 4, 6. Give only...    2      the teacher's answer: 2
    lcm         ...(LCM) of these numbers: 4, 6                  12                           12
    products    ...multiplication: 4 * 6. Give only...           24                           10, wrong: it adds
    chain_sum   ...arithmetic problem: 4 - 6 =                   -2                           10, wrong: it swaps signs

A model says what it believes with the probability of its setting, else what is right for another question of the task:
an answer of the right form, so no right answer is impossible. Models have seen every question, held out or not, as
there are few (100 products): held-out ones are those on which no response was rewarded.

Tokens are characters, and whole phrases where all questions of a task begin or end alike.
"""

import functools
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study_demonstrations import BATCH, IGNORED, is_made, train_models
from study_world import tilted

if TYPE_CHECKING:
    from study_settings import Setting
    from torch import Tensor

    from megatron_hybrid.prompts.question import Question

SOURCE = {
    "gcd": "max_value=9",
    "lcm": "max_value=9",
    "products": "max_digits=1",
    "chain_sum": "min_terms=2, max_terms=2, min_digits=1, max_digits=1",
}
"""Tasks, and what they are set to."""
TASKS = tuple(SOURCE)
WRONG = ("products", "chain_sum")
"""What the teacher does not know."""
REWARDS = {"exact": "reasoning_gym"}
"""reasoning-gym's own, which gives a part for parts of an answer too."""
LOOKED_AT = 8000
"""Questions that are drawn for the models, held-out ones first: enough to meet all that there are."""
LONGEST_RESPONSE = 4
"""Two digits, or one and a sign; the end; and one more, so that too long is possible."""
LONGEST = 24
_END, _UNKNOWN, _BORDER = "</s>", "<unk>", "\n"


def spec() -> str:
    """The tasks as the product takes them."""
    return "reasoning_gym:" + ",".join(f"{task}({parameters})" for task, parameters in SOURCE.items())


@functools.cache
def questions() -> dict[str, list["Question"]]:
    """By task: every question that is found, in the order of its text."""
    from megatron_hybrid.prompts.sources import open_source

    found: dict[str, dict[str, Question]] = {task: {} for task in TASKS}
    for held_out in (False, True):
        for question in open_source(spec(), held_out=held_out).probe(LOOKED_AT // 2):
            found[question.task][question.text] = question
    return {task: [of_task[text] for text in sorted(of_task)] for task, of_task in found.items()}


def believed(who: str, question: "Question") -> str:
    """What one takes to be the answer."""
    assert question.answer is not None
    if who == "student" or question.task not in WRONG:
        return question.answer
    a, sign, b = question.entry["record"]["metadata"]["expression"].split()
    return str(int(a) - int(b) if sign == "+" else int(a) + int(b))


def phrases(texts: Sequence[str]) -> list[str]:
    """What all of a task's questions begin with, and what they end with; numbers and words are between."""
    first = os.path.commonprefix(texts)
    last = os.path.commonprefix([text[len(first) :][::-1] for text in texts])[::-1]
    return [phrase for phrase in (first, last) if phrase]


def make(folder: Path, setting: "Setting") -> None:
    """Tokenizer, `teacher` and `student` in `folder`; made once."""
    if is_made(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    asked = questions()
    tokenizer = _make_tokenizer(folder / "tokenizer", asked)
    sure = {"teacher": setting.teacher, "student": setting.student}
    train_models(
        folder,
        vocab_size=len(tokenizer),
        steps=setting.world_steps,
        demonstrations=lambda who: _demonstrations(who, asked, sure[who], tokenizer),
        peak_lr=5e-3,
        damage=setting.damage,
    )


def _make_tokenizer(folder: Path, asked: dict[str, list["Question"]]) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = {task: [question.text for question in of_task] for task, of_task in asked.items()}
    whole = [phrase for of_task in texts.values() for phrase in phrases(of_task)]
    answers = [str(question.answer) for of_task in asked.values() for question in of_task]
    characters = sorted(set("".join([_BORDER, *answers, *(text for of_task in texts.values() for text in of_task)])))
    words = [_END, _UNKNOWN, *characters]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=_UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_tokens([AddedToken(phrase, normalized=False) for phrase in whole])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=_END, unk_token=_UNKNOWN, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}\n"
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def _demonstrations(
    who: str, asked: dict[str, list["Question"]], sure: tuple[float, float], tokenizer: Any
) -> "Iterator[tuple[Tensor, Tensor]]":
    """Endless batches of (tokens [b, s], labels [b, s]), padded on the right, where no causal model looks."""
    import torch

    from megatron_hybrid.prompts.template import PromptTemplate

    template, draw = PromptTemplate(tokenizer), random.Random(1)
    every = [question for of_task in asked.values() for question in of_task]
    prompts = {question.text: list(template.encode(question)) for question in every}
    answers = {text for question in every for text in (str(question.answer), believed(who, question))}
    responses = {text: [*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in sorted(answers)}
    while True:
        pairs = []
        for _ in range(BATCH):
            task = draw.choice(TASKS)
            question = draw.choice(asked[task])
            certain = draw.random() < sure[task in WRONG]
            said = believed(who, question) if certain else str(draw.choice(asked[task]).answer)
            pairs.append((prompts[question.text], responses[said]))
        shape = (BATCH, max(len(prompt) + len(response) for prompt, response in pairs))
        tokens, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
        for row, (prompt, response) in enumerate(pairs):
            end = len(prompt) + len(response)
            tokens[row, :end] = torch.tensor([*prompt, *response])
            labels[row, len(prompt) : end] = torch.tensor(response)
        yield tokens, labels


def flags(folder: Path, setting: "Setting") -> list[str]:
    """What a run asks, how long responses get, and what they earn."""
    return [
        *("--hybrid-prompts", spec()),
        *("--hybrid-reward", REWARDS[setting.reward]),
        *("--hybrid-max-response-length", str(LONGEST_RESPONSE)),
        *("--seq-length", str(LONGEST)),
    ]


def optimum(setting: "Setting", *, knows: bool) -> tuple[float, float]:
    """(reward, KL in nats per response) of p ~ q exp(r / beta), on tasks that the teacher knows or on the others.

    q is the teacher as it is taught; what reasoning-gym gives for parts of an answer is not counted.
    """
    import numpy as np

    values, weights = [], []
    for task, of_task in questions().items():
        if (task in WRONG) == knows:
            continue
        sure, number = setting.teacher[task in WRONG], Counter(question.answer for question in of_task)
        for question in of_task:
            chance = (1 - sure) * number[question.answer] / len(of_task)
            chance += sure * (believed("teacher", question) == question.answer)
            values.append(tilted(chance, 1 / setting.beta))
            weights.append(1 / len(of_task))
    reward, kl = np.average(values, axis=0, weights=weights)
    return float(reward), float(kl)
