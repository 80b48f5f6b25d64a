"""1 if the code in a response passes the tests of its record, else 0. The code is run: see `sandbox.py` for where.

    response: the last ```python (or ```) block; else the text in <answer> tags, or all of it
    record["tests"]: Python text, or a list of it, run behind the code in the same namespace (asserts, say)

Only on request, `--hybrid-allow-code-execution`. A response that ends early, never ends, or takes too much scores 0.
The tests run in the interpreter that has run the response's code: one that is out for it can make them pass (by an
object that equals everything). Look at samples of a reward that rises too well.
"""

from __future__ import annotations

import re

from megatron_hybrid.errors import DataError
from megatron_hybrid.records import Prompt
from megatron_hybrid.rewards.base import extract_answer
from megatron_hybrid.rewards.sandbox import Limits, check_sandbox, passes

_FENCE = "```"


class PythonTestsReward:
    """
    limits  of a response's code

    Raises:
        ConfigError: there is no sandbox on this machine.
    """

    name = "python_tests"
    main_thread_only = False

    def __init__(self, limits: Limits) -> None:
        check_sandbox()
        self._limits = limits

    def score(self, prompt: Prompt, response: str) -> float:
        tests = prompt.entry.get("record", {}).get("tests")
        texts = [tests] if isinstance(tests, str) else tests
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"the record of prompt {prompt.prompt_id} (task {prompt.task!r}) has the tests {tests!r:.200}: "
                "expected Python text, or a list of it, that a response's code has to pass. Give the field 'tests'."
            )
        return float(passes(extract_code(response), texts, self._limits))


def extract_code(response: str) -> str:
    """The last fenced block that is Python, or of no named language; without one the answer. Linear in the length."""
    parts = response.split(_FENCE)  # text, block, text, block, ...: a block's first line is its language
    blocks = [parts[place].partition("\n") for place in range(1, len(parts) - 1, 2)]
    python = [code for language, _, code in blocks if re.fullmatch(r"\s*(python3?|py)?\s*", language, re.IGNORECASE)]
    return python[-1] if python else extract_answer(response)
