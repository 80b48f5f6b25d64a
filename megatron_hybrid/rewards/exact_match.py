"""1 if the response is the expected answer, else 0.

Both are compared after Unicode normalisation (NFKC: full-width digits are digits), with letter case folded and runs of
white space as one space. Punctuation counts: "5." is not "5". An answer in <answer> tags is taken out first.
"""

import unicodedata

from megatron_hybrid.errors import DataError
from megatron_hybrid.records import Prompt
from megatron_hybrid.rewards.base import extract_answer


class ExactMatchReward:
    name = "exact_match"
    main_thread_only = False

    def score(self, prompt: Prompt, response: str) -> float:
        if prompt.answer is None:
            raise DataError(
                f"prompt {prompt.prompt_id} (task {prompt.task!r}) has no answer to compare a response with: give one."
            )
        return float(_normal(extract_answer(response)) == _normal(prompt.answer))


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
