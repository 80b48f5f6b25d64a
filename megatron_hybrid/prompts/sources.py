"""Opens what the settings `prompts` and `eval_prompts` name, and keeps the two apart.

reasoning_gym:task,task(parameter=value)    generated questions without end
questions.jsonl, questions.parquet          a file
SHARE*SOURCE,SHARE*SOURCE                   several of these, mixed
"""

from megatron_hybrid.errors import ConfigError
from megatron_hybrid.prompts.file_source import FileSource
from megatron_hybrid.prompts.mixture import MixtureSource
from megatron_hybrid.prompts.question import PromptSource, Refuse
from megatron_hybrid.prompts.reasoning_gym import ReasoningGymSource, parse_tasks
from megatron_hybrid.prompts.record_file import FILE_ENDINGS
from megatron_hybrid.weighted import split_weighted

_GENERATED = "reasoning_gym:"


def open_source(spec: str, *, seed: int = 0, held_out: bool = False, on_bad_record: str = "stop") -> PromptSource:
    """The source that `spec` names.

    seed, held_out  choose among generated questions; a file has only its own
    on_bad_record   of files, see `record_file.parsed_records`
    """
    parts = split_weighted("prompts", spec)
    sources = [
        (share, _open_one(name, seed=seed, held_out=held_out, on_bad_record=on_bad_record)) for share, name in parts
    ]
    return sources[0][1] if len(sources) == 1 else MixtureSource(sources, seed=seed)


def open_sources(
    prompts: str | PromptSource,
    eval_prompts: str | None,
    *,
    seed: int,
    num_eval: int,
    refuse: Refuse | None = None,
    on_bad_record: str = "stop",
) -> tuple[PromptSource, PromptSource | None]:
    """(training, held-out) sources that share no question text.

    prompts        what `open_source` takes; or a source that is open
    eval_prompts   None: other questions of the same generated tasks; nothing is held out of a training file
    num_eval       held-out questions that will be asked, the first ones of a generated source; a file is held out whole
    refuse         questions to leave out of both
    on_bad_record  of files, see `record_file.parsed_records`
    """
    training = open_source(prompts, seed=seed, on_bad_record=on_bad_record) if isinstance(prompts, str) else prompts
    asked = eval_prompts or (_generated_part(prompts) if isinstance(prompts, str) else None)
    held_out = None if asked is None else open_source(asked, held_out=True, on_bad_record=on_bad_record)
    if refuse is not None:
        training = training.fitting(refuse)
        held_out = None if held_out is None else held_out.fitting(refuse)
    if held_out is None:
        return training, None
    return training.without({question.text for question in held_out.probe(num_eval)}), held_out


def _open_one(name: str, *, seed: int, held_out: bool, on_bad_record: str) -> PromptSource:
    if name.startswith(_GENERATED):
        return ReasoningGymSource(parse_tasks(name.removeprefix(_GENERATED)), seed=seed, held_out=held_out)
    if name.endswith(FILE_ENDINGS):
        return FileSource.read(name, on_bad_record=on_bad_record)
    raise ConfigError(
        f"prompts must be '{_GENERATED}task,task' or a file that ends in {' or '.join(FILE_ENDINGS)}, got {name!r}: "
        "the form decides how questions are made and scored. Several need a share each: 0.7*SOURCE,0.3*SOURCE."
    )


def _generated_part(prompts: str) -> str | None:
    """The sources of a setting that have questions to hold out by themselves; None: there are none."""
    generated = [(share, name) for share, name in split_weighted("prompts", prompts) if name.startswith(_GENERATED)]
    return ",".join(f"{share}*{name}" for share, name in generated) or None
