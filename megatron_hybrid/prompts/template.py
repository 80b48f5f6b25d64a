"""From a question to token ids; the border between prompt and response is set here.

    [system]  (example question, example answer)*  question  |  response

With a chat template each part is a message and the border is the template's generation prompt. Without one the parts
are plain paragraphs, each answer on the line after its question, and the response starts on a line of its own.
"""

import logging
from typing import Any

from megatron_hybrid.errors import DataError
from megatron_hybrid.prompts.question import Question

_log = logging.getLogger(__name__)


class PromptTemplate:
    """Turns questions into token ids with a transformers tokenizer.

    system_prompt   None: whatever the chat template does by default (16 tokens more than the next in SmolLM2);
                    an empty string: an empty system message, which silences that default
    """

    def __init__(self, tokenizer: Any, *, system_prompt: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._system_prompt = system_prompt
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
