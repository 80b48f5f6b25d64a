"""1 if the response equals the expected answer as mathematics (math-verify), else 0: 1/2, 0.5 and \\frac{1}{2} agree.

math-verify bounds its own time with SIGALRM, so this reward works in the main thread only.
"""

import importlib
from functools import lru_cache
from typing import Any

from megatron_hybrid.errors import ConfigError, DataError
from megatron_hybrid.records import Prompt
from megatron_hybrid.rewards.base import extract_answer


class MathAnswerReward:
    name = "math_answer"
    main_thread_only = True

    def __init__(self) -> None:
        try:
            self._library = importlib.import_module("math_verify")
        except ModuleNotFoundError as error:
            raise ConfigError(
                "the math_answer reward needs the math-verify package, which is not installed: "
                "pip install 'megatron-hybrid[rewards]', or use exact_match."
            ) from error
        self._parse_expected = lru_cache(maxsize=4096)(self._expected)  # a group asks for the same answer many times

    def score(self, prompt: Prompt, response: str) -> float:
        expected = self._parse_expected(prompt.answer)
        if not expected:
            raise DataError(
                f"math-verify finds no mathematics in the answer {prompt.answer!r} of prompt {prompt.prompt_id} (task "
                f"{prompt.task!r}): every response would score 0. Mend the answer, or use exact_match."
            )
        return float(self._library.verify(expected, self._library.parse(extract_answer(response))))

    def _expected(self, answer: str | None) -> list[Any]:
        if not answer:
            return []
        # math-verify reads an expression between dollars or in \boxed only; else it takes the first number it sees.
        is_marked = "$" in answer or "\\boxed" in answer
        return self._library.parse(answer if is_marked else f"${answer}$")
