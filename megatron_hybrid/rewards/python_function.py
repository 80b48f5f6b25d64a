"""A function of the user's own, named `module:function`, as a reward.

    function(question, response, answer, record) -> float

`question` and `response` are text, `answer` the expected one or None, `record` the source's own: the line or row of a
prompt file with all its fields, or what reasoning-gym made. It is called in a process of its own (`worker_pool.py`),
one response at a time, unless `reward_workers` is 0. Then one that works in the main thread only (it sets alarms,
say) says so by an attribute, `function.main_thread_only = True`; others run beside the teacher's pass.
"""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Callable
from typing import Any

from megatron_hybrid.errors import ConfigError, RewardError
from megatron_hybrid.records import Prompt


class PythonFunctionReward:
    """One function.

    Args:
        name: `module:function`, found as Python's import finds it.

    Raises:
        ConfigError: no such module or function, or it cannot be called with four values.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._function = _find(name)
        self.main_thread_only = bool(getattr(self._function, "main_thread_only", False))

    def score(self, prompt: Prompt, response: str) -> float:
        """Raises RewardError, with the function, the prompt and the line, for whatever goes wrong in the function."""
        where = f"the reward function {self.name}, on prompt {prompt.prompt_id} (task {prompt.task!r}: {prompt.text!r})"
        try:
            score = self._function(prompt.text, response, prompt.answer, prompt.entry.get("record", {}))
        except (Exception, SystemExit) as error:  # exit() in it would read as Megatron's own end of a run
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise RewardError(
                f"{where} and response {response!r}, raised {type(error).__name__}: {error} "
                f"({frame.filename}:{frame.lineno}). Return a number for every response; 0 for one that cannot be "
                "judged."
            ) from error
        try:
            return float(score)
        except Exception as error:  # of what it returned, whose own code this is
            raise RewardError(f"{where}, returned a {type(score).__name__}, {score!r}: expected a number.") from error


def _find(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise ConfigError(
            f"the reward {name!r} cannot be imported: {error}. Install its module, or put the folder that holds it "
            "into PYTHONPATH."
        ) from error
    if not callable(found):
        raise ConfigError(f"the module {module!r} has no function {function!r} to be the reward {name!r}.")
    try:
        inspect.signature(found).bind("question", "response", "answer", {})
    except TypeError as error:
        raise ConfigError(
            f"the reward {name!r} cannot be called as function(question, response, answer, record): {error}."
        ) from error
    except ValueError:  # built-in functions may have no signature: the first call tells
        pass
    return found
