"""Generated questions: an equal mixture of reasoning-gym tasks, each with its own configuration.

    chain_sum,lcm(max_value=9),spell_backward(max_word_len=5, worked_examples=2)

Question i belongs to task i mod k, and every question has a number: reasoning-gym seeds its generator with that number
and nothing else. Numbers are split once and for all, so held-out questions are the same for every training seed:

    [0, 2^20)      held out, in order
    [2^20, 2^21)   worked examples, chosen by a hash of (seed, task, index)
    [2^21, 2^32)   training, chosen likewise (random access, and seeds that do not run into each other: with
                   reasoning-gym's own scheme, seed + index, seed 1 is seed 0 shifted by one question)

Different numbers may still give the same text (there are only 200 sums of two digits); `without` redraws those, and
`fitting` those that cannot be used.
"""

import ast
import hashlib
import importlib
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from megatron_hybrid.errors import ConfigError, DataError
from megatron_hybrid.prompts.question import LeftOut, Question, Refuse

_HELD_OUT = range(0, 2**20)
_EXAMPLES = range(2**20, 2**21)
_TRAINING = range(2**21, 2**32)  # numpy, which a few tasks use, takes no larger seed
_ATTEMPTS = 100  # redraws of a held-out text; if nine in ten questions are held out, all fail once in 40 000 questions
_LOOKED_AT = 64  # questions from which `fitting` says what share is redrawn

_log = logging.getLogger(__name__)

RUNS_THE_ANSWER = (
    "binary_matrix",
    "intermediate_integration",
    "polynomial_multiplication",
    "simple_integration",
    "spiral_matrix",
    "string_insertion",
)
"""Tasks whose scorer passes the response to Python's eval, directly or through sympy: a model's text must not run."""


@dataclass(frozen=True)
class TaskSetting:
    """A task as the user asked for it."""

    task: str
    parameters: dict[str, Any] = field(default_factory=dict)
    """For reasoning-gym's configuration of the task; what is not named keeps its default."""
    worked_examples: int = 0
    """Solved questions of the same task shown before each one."""


VETTED = {
    setting.task: setting
    for setting in (
        TaskSetting("calendar_arithmetic", {"tasks": ["is_leap_year"]}, worked_examples=1),
        TaskSetting("count_primes", {"max_n": 20}, worked_examples=1),
        TaskSetting("letter_counting", {"min_words": 1, "max_words": 1}, worked_examples=1),
        TaskSetting("spell_backward", {"min_word_len": 3, "max_word_len": 4}, worked_examples=1),
        TaskSetting("syllogism", {}, worked_examples=1),
        TaskSetting("time_intervals", {"task_types": ["date"], "max_date_difference_days": 30}, worked_examples=1),
    )
}
"""Settings that SmolLM2-135M-Instruct solves now and then at temperature 1 (mean score 0.08 to 0.44), each with some
hundred different questions or more, so that holding some out leaves enough. Without a worked example it talks past the
question and scores 0.00 to 0.11; with one it answers in 1 to 7 tokens. Sums and products of two digits stay below 0.06.
"""


def parse_tasks(spec: str) -> tuple[TaskSetting, ...]:
    """`task,task(parameter=value)` to settings. Parameters are laid over the vetted setting, where there is one."""
    try:
        parsed = ast.parse(f"[{spec}]", mode="eval").body
    except SyntaxError:
        parsed = None
    if not isinstance(parsed, ast.List) or not parsed.elts:
        raise ConfigError(f"expected tasks like 'chain_sum,lcm(max_value=9)' after 'reasoning_gym:', got {spec!r}.")
    settings = tuple(_setting(node) for node in parsed.elts)
    names = [setting.task for setting in settings]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"{', '.join(repeated)} given more than once in {spec!r}: tasks are mixed equally and reported by "
            "name, so name each one once."
        )
    return settings


def _setting(node: ast.expr) -> TaskSetting:
    name, keywords = (node.func, node.keywords) if isinstance(node, ast.Call) else (node, [])
    source = ast.unparse(node)
    unnamed = isinstance(node, ast.Call) and (node.args or any(keyword.arg is None for keyword in keywords))
    if not isinstance(name, ast.Name) or unnamed:
        raise ConfigError(f"expected a task name, or task(parameter=value, ...), got {source!r}.")
    try:
        given = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in keywords}
    except ValueError as error:
        raise ConfigError(
            f"{source!r}: parameters must be plain values (numbers, quoted strings, True, None, lists), got {error}."
        ) from error
    vetted = VETTED.get(name.id, TaskSetting(name.id))
    worked_examples = given.pop("worked_examples", vetted.worked_examples)
    if not isinstance(worked_examples, int) or worked_examples < 0:
        raise ConfigError(f"{source!r}: worked_examples must be a whole number >= 0, got {worked_examples!r}.")
    return TaskSetting(name.id, vetted.parameters | given, worked_examples)


class ReasoningGymSource:
    """An endless mixture of generated questions, a pure function of (settings, seed, held_out, index)."""

    size: int | None = None
    left_out: tuple[LeftOut, ...] = ()

    def __init__(
        self,
        settings: Sequence[TaskSetting],
        *,
        seed: int = 0,
        held_out: bool = False,
        exclude: Collection[str] = (),
        refuse: Refuse | None = None,
    ) -> None:
        self.settings = tuple(settings)
        self._seed = seed
        self._held_out = held_out
        self._exclude = frozenset(exclude)
        self._refuse = refuse
        self._tasks = [_Task(setting) for setting in self.settings]
        self.tasks = frozenset(task.name for task in self._tasks)

    def item(self, index: int) -> Question:
        turned_down: set[str] = set()
        while len(turned_down) < _ATTEMPTS:
            question = self._question(index, turned_down)
            why = None if self._refuse is None else self._refuse(question)
            if why is None:
                return question
            turned_down.add(question.text)
        raise DataError(
            f"reasoning-gym task {question.task!r} gave {_ATTEMPTS} questions that are all {why}. Allow longer "
            "prompts, or use a smaller configuration of the task."
        )

    def probe(self, count: int) -> Iterator[Question]:
        return (self.item(index) for index in range(count))

    def without(self, texts: Collection[str]) -> "ReasoningGymSource":
        return self._changed(self._exclude | frozenset(texts), self._refuse)

    def fitting(self, refuse: Refuse) -> "ReasoningGymSource":
        reasons = Counter((question.task, why) for question in self.probe(_LOOKED_AT) if (why := refuse(question)))
        for (task, why), number in reasons.items():
            of_task = sum(self._tasks[index % len(self._tasks)].name == task for index in range(_LOOKED_AT))
            _log.warning(
                "reasoning_gym:%s: %d of the first %d questions are %s: others are drawn instead of such",
                task,
                number,
                of_task,
                why,
            )
        return self._changed(self._exclude, refuse)

    def _changed(self, exclude: frozenset[str], refuse: Refuse | None) -> "ReasoningGymSource":
        return ReasoningGymSource(
            self.settings, seed=self._seed, held_out=self._held_out, exclude=exclude, refuse=refuse
        )

    def _question(self, index: int, turned_down: Collection[str]) -> Question:
        """Question `index`, or what is drawn in the place of those turned down."""
        place, which = divmod(index, len(self._tasks))
        task = self._tasks[which]
        if not self._held_out:
            record = self._draw(task, _TRAINING, index, self._exclude.union(turned_down))
        elif place not in _HELD_OUT:
            raise DataError(f"held-out question {index} asked for, but each task holds out {len(_HELD_OUT)}.")
        elif turned_down:
            record = self._draw(task, _HELD_OUT, index, turned_down)
        else:
            record = task.record(_HELD_OUT[place])
        return Question(
            record["question"].strip(),
            task.name,
            str(record["answer"]),
            {"source": "reasoning_gym", "task": task.name, "parameters": task.parameters, "record": record},
            self._examples(task, index, record["question"].strip()),
        )

    def _examples(self, task: "_Task", index: int, text: str) -> tuple[tuple[str, str], ...]:
        """Never the question itself, never one that is held out, none twice."""
        shown: dict[str, str] = {}
        while len(shown) < task.worked_examples:
            record = self._draw(task, _EXAMPLES, index, self._exclude | {text} | shown.keys())
            shown[record["question"].strip()] = str(record["answer"])
        return tuple(shown.items())

    def _draw(self, task: "_Task", numbers: range, index: int, exclude: Collection[str]) -> dict[str, Any]:
        for attempt in range(_ATTEMPTS):
            key = f"{self._seed}/{task.name}/{index}/{attempt}".encode()
            digest = int.from_bytes(hashlib.blake2b(key, digest_size=16).digest())
            record = task.record(numbers[digest % len(numbers)])
            if record["question"].strip() not in exclude:
                return record
        raise DataError(
            f"reasoning-gym task {task.name!r} with {task.parameters or 'default parameters'} gave only held-out "
            f"questions in {_ATTEMPTS} draws: it has too few different ones. Use a larger configuration of the task, "
            "or fewer held-out questions."
        )


class _Task:
    """One task of reasoning-gym, addressed by question number."""

    def __init__(self, setting: TaskSetting) -> None:
        _require_known(setting.task)
        self.name = setting.task
        self.parameters = setting.parameters
        self.worked_examples = setting.worked_examples
        self._dataset = self._create(seed=0)
        try:
            self._dataset[_TRAINING[-1]]
            self._reads_any_number = True
        except IndexError:
            self._reads_any_number = False  # a few tasks prepare `size` questions: one dataset per question instead

    def record(self, number: int) -> dict[str, Any]:
        """Question `number` as reasoning-gym made it: question, answer, metadata."""
        return self._dataset[number] if self._reads_any_number else self._create(seed=number, size=1)[0]

    def _create(self, **placement: int) -> Any:
        if clash := {"seed", "size"} & self.parameters.keys():
            raise ConfigError(
                f"task {self.name!r}: {' and '.join(sorted(clash))} cannot be set, as questions are drawn by number. "
                "Choose the seed of the run instead."
            )
        try:
            return _library().create_dataset(self.name, **placement, **self.parameters)
        except (AssertionError, TypeError, ValueError) as error:
            _, config = importlib.import_module("reasoning_gym.factory").DATASETS[self.name]
            known = [f.name for f in fields(config) if f.name not in ("seed", "size")]
            raise ConfigError(
                f"reasoning-gym refuses {self.name}({_arguments(self.parameters)}): {error or 'an assertion failed'}. "
                f"Its parameters are {', '.join(known)}."
            ) from error


def _require_known(task: str) -> None:
    names = sorted(set(importlib.import_module(_library().__name__ + ".factory").DATASETS) - {"composite"})
    if task not in names:
        near = get_close_matches(task, names, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"Known tasks: {', '.join(names)}."
        raise ConfigError(f"reasoning-gym has no task {task!r}. {hint}")
    if task in RUNS_THE_ANSWER:
        raise ConfigError(
            f"task {task!r} is not offered: reasoning-gym scores it by evaluating the response as Python, so a sampled "
            "text could run code in the training process. Choose another task."
        )


def _library() -> Any:
    try:
        return importlib.import_module("reasoning_gym")
    except ModuleNotFoundError as error:
        raise ConfigError(
            "prompts 'reasoning_gym:...' need the reasoning-gym package, which is not installed: "
            "pip install 'megatron-hybrid[rewards]', or give a .jsonl file."
        ) from error


def _arguments(parameters: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in parameters.items())
