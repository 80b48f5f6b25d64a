"""From a question to token ids; the border between prompt and response is set here.

    [system]  (example question, example answer)*  question  |  response

With a chat template each part is a message and the border is the template's generation prompt. Without one the parts
are plain paragraphs, each answer on the line after its question, and the response starts on a line of its own. A
sentencepiece tokenizer that was trained to drop line breaks leaves the question alone, and the response behind it.

A teacher may read more than the student: with a hint, its question is the question, an empty line, and the hint with
{answer} filled in.
"""

import logging
import string
from dataclasses import replace
from typing import Any

from megatron_hybrid.errors import ConfigError, DataError
from megatron_hybrid.prompts.question import Question

_log = logging.getLogger(__name__)


class PromptTemplate:
    """Turns questions into token ids with a tokenizer of `tokenizers.py`.

    system_prompt   None: whatever the chat template does by default (16 tokens more than the next in SmolLM2);
                    an empty string: an empty system message, which silences that default
    teacher_hint    what only the teacher reads behind the question; {answer} stands for the expected answer
    """

    def __init__(self, tokenizer: Any, *, system_prompt: str | None = None, teacher_hint: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._system_prompt = system_prompt
        self._teacher_hint = teacher_hint
        self._hint_needs_answer = teacher_hint is not None and _needs_answer(teacher_hint)
        self.is_chat = bool(getattr(tokenizer, "chat_template", None))
        if not self.is_chat:
            _log.warning(
                "the tokenizer has no chat template: prompts are plain text and the response starts on a new line. "
                "Right for a base model; for an instruction-tuned one, load its own tokenizer."
            )
        # Templates fail by role (some refuse system messages), not by text: one probe speaks for all prompts.
        self.encode(Question("probe", "probe", "", examples=(("probe", "probe"),)))

    def encode(self, question: Question) -> tuple[int, ...]:
        """Ids [length] of everything before the response."""
        ids = self._encode_chat(question) if self.is_chat else self._encode_plain(question)
        if not ids:
            raise DataError(f"the tokenizer gave no tokens for {question.text!r}: a response needs one to follow.")
        return tuple(ids)

    def encode_for_teacher(self, question: Question) -> tuple[int, ...] | None:
        """Ids [length] of what the teacher reads before the response; None: what the student reads."""
        if self._teacher_hint is None:
            return None
        if self._hint_needs_answer and not question.answer:
            raise DataError(
                f"teacher_hint holds {{answer}}, but the prompt {question.text!r} (task {question.task!r}) has no "
                "answer: the teacher would read a hint with a hole. Give every prompt an answer, or a hint without it."
            )
        hint = self._teacher_hint.format(answer=question.answer)
        return self.encode(replace(question, text=f"{question.text}\n\n{hint}"))

    def _encode_chat(self, question: Question) -> list[int]:
        from jinja2 import TemplateError

        messages = [] if self._system_prompt is None else [{"role": "system", "content": self._system_prompt}]
        for asked, answered in question.examples:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        messages.append({"role": "user", "content": question.text})
        try:
            encoded = self._tokenizer.apply_chat_template(
                messages, tokenize=True, add_generation_prompt=True, return_dict=True
            )
        except TemplateError as error:
            raise DataError(
                f"the tokenizer's chat template refuses roles {[m['role'] for m in messages]}: {error}. "
                "If it knows no system role, leave system_prompt unset and put the instruction into the questions."
            ) from error
        return list(encoded["input_ids"])

    def _encode_plain(self, question: Question) -> list[int]:
        parts = [self._system_prompt] if self._system_prompt else []
        parts += [f"{asked}\n{answered}" for asked, answered in question.examples]
        ids = list(self._tokenizer("\n\n".join([*parts, question.text]) + "\n")["input_ids"])
        # A tokenizer that closes every text with end-of-sequence would end the response before it starts.
        return ids[:-1] if ids and ids[-1] == self._tokenizer.eos_token_id else ids


def _needs_answer(hint: str) -> bool:
    """Whether a hint holds {answer}; ConfigError where it holds anything else, or nothing at all."""
    if not hint.strip():
        raise ConfigError("teacher_hint is empty: the teacher would read what the student reads. Leave it unset.")
    advice = "only {answer} is filled in. A brace that is meant as such is written twice, {{ or }}."
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(hint) if name is not None}
        unknown = sorted(names - {"answer"})
        if not unknown:
            hint.format(answer="")
    except (LookupError, ValueError) as error:
        raise ConfigError(f"teacher_hint {hint!r} cannot be filled in ({error}): {advice}") from error
    if unknown:
        shown = ", ".join(f"{{{name}}}" for name in unknown)
        raise ConfigError(f"teacher_hint {hint!r} has the placeholder {shown}: {advice}")
    return bool(names)
