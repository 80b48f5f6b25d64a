"""Opens what the settings `prompts` and `eval_prompts` name, and keeps the two apart.

reasoning_gym:task,task(parameter=value)    generated questions without end
questions.jsonl                             a file
"""

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.prompts.jsonl import JsonlSource
from megatron_hybrid.prompts.question import PromptSource
from megatron_hybrid.prompts.reasoning_gym import ReasoningGymSource, parse_tasks

_GENERATED = "reasoning_gym:"


def open_source(spec: str, *, seed: int = 0, held_out: bool = False) -> PromptSource:
    """The source that `spec` names. `seed` and `held_out` choose among generated questions; a file has only its own."""
    if spec.startswith(_GENERATED):
        return ReasoningGymSource(parse_tasks(spec.removeprefix(_GENERATED)), seed=seed, held_out=held_out)
    if spec.endswith(".jsonl"):
        return JsonlSource.read(spec)
    raise ConfigError(
        f"prompts must be '{_GENERATED}task,task' or a file that ends in .jsonl, got {spec!r}: the form decides how "
        "questions are made and scored."
    )


def open_sources(
    prompts: str, eval_prompts: str | None, *, seed: int, num_eval: int
) -> tuple[PromptSource, PromptSource | None]:
    """(training, held-out) sources that share no question text.

    eval_prompts   None: other questions of the same generated tasks; nothing is held out of a training file
    num_eval       held-out questions that will be asked, the first ones of a generated source; a file is held out whole
    """
    training = open_source(prompts, seed=seed)
    if eval_prompts is None and not prompts.startswith(_GENERATED):
        return training, None
    held_out = open_source(eval_prompts or prompts, held_out=True)
    asked = range(num_eval if held_out.size is None else held_out.size)
    return training.without({held_out.item(index).text for index in asked}), held_out
