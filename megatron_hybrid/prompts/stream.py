"""The order of prompts: a pure function of (seed, position), so a run resumes from the number of prompts it consumed.

`order.py` says which question stands at a position. Data-parallel ranks take neighbouring slices of a draw, so a draw
holds the same prompts for every dp_size. No state, no collectives.
"""

from megatron_hybrid.errors import ConfigError, DataError
from megatron_hybrid.prompts.order import Order
from megatron_hybrid.prompts.question import PromptSource, Question, Refuse
from megatron_hybrid.prompts.template import PromptTemplate
from megatron_hybrid.records import Prompt

_SAMPLE_OF_GENERATED = (
    64  # questions encoded up front where all cannot be: several of each task, in well under a second
)


class PromptStream:
    """An endless, seeded, resumable sequence of prompts.

    max_prompt_length   tokens a prompt may have; what the model's sequence length leaves beside a response
    """

    def __init__(self, source: PromptSource, template: PromptTemplate, *, seed: int, max_prompt_length: int) -> None:
        if max_prompt_length < 1:
            raise ConfigError(
                f"max_prompt_length must be at least 1, got {max_prompt_length}: the response length leaves no room "
                "for a prompt. Lower max_response_length or raise the sequence length."
            )
        if source.size is not None and source.size < 1:
            raise DataError("the source has no questions: a stream needs at least one.")
        self._order = Order(source, seed=seed)
        self._template = template
        self._max_prompt_length = max_prompt_length
        self.size = source.size
        """Questions before the first repetition; None for generated ones."""
        self._require_short([self._encode(question, prompt_id=0) for question in source.probe(_SAMPLE_OF_GENERATED)])

    def draw(self, start: int, count: int, dp_rank: int = 0, dp_size: int = 1) -> list[Prompt]:
        """This rank's share of the prompts at positions [start, start + count).

        start, count   positions over all data-parallel ranks together
        returns        the dp_rank-th of dp_size neighbouring slices, in order; sizes differ by at most 1
        """
        if start < 0 or count < 0 or not 0 <= dp_rank < dp_size:
            raise ConfigError(
                f"cannot draw {count} prompts from position {start} for rank {dp_rank} of {dp_size}: start and count "
                "must be >= 0 and 0 <= dp_rank < dp_size."
            )
        positions = range(start + count * dp_rank // dp_size, start + count * (dp_rank + 1) // dp_size)
        prompts = [self._encode(self._order.question(position), prompt_id=position) for position in positions]
        self._require_short(prompts)
        return prompts

    def _encode(self, question: Question, *, prompt_id: int) -> Prompt:
        ids = self._template.encode(question)
        for_teacher = self._template.encode_for_teacher(question)
        return Prompt(
            prompt_id,
            ids,
            question.text,
            question.task,
            question.answer,
            question.entry,
            for_teacher,
            question.responses,
        )

    def _require_short(self, prompts: list[Prompt]) -> None:
        too_long = [prompt for prompt in prompts if len(prompt.token_ids) > self._max_prompt_length]
        if too_long:
            longest = max(too_long, key=lambda prompt: len(prompt.token_ids))
            raise DataError(
                f"{len(too_long)} of {len(prompts)} prompts are longer than {self._max_prompt_length} tokens; the "
                f"longest has {len(longest.token_ids)} ({_place(longest)}: {_excerpt(longest.text)}). Cut prompts "
                "would ask something else, so none are: raise the sequence length, lower max_response_length, shorten "
                "the system prompt, or take these questions out (--hybrid-long-prompts drop; reasoning-gym: a smaller "
                "configuration of the task)."
            )
        too_long = [prompt for prompt in prompts if len(prompt.teacher_token_ids or ()) > self._max_prompt_length]
        if too_long:
            longest = max(too_long, key=lambda prompt: len(prompt.teacher_token_ids or ()))
            raise DataError(
                f"with the teacher's hint {len(too_long)} of {len(prompts)} prompts are longer than "
                f"{self._max_prompt_length} tokens; the longest has {len(longest.teacher_token_ids or ())}, "
                f"{len(longest.token_ids)} without it ({_place(longest)}: {_excerpt(longest.text)}). The teacher "
                "reads hint and response in one sequence: raise the sequence length, lower max_response_length, or "
                "shorten the hint."
            )


def too_long(template: PromptTemplate, max_prompt_length: int) -> Refuse:
    """What a source is told to leave out, where long prompts are dropped and not refused."""

    def refuse(question: Question) -> str | None:
        if len(template.encode(question)) > max_prompt_length:
            return f"longer than {max_prompt_length} tokens"
        if len(template.encode_for_teacher(question) or ()) > max_prompt_length:
            return f"longer than {max_prompt_length} tokens with the teacher's hint"
        return None

    return refuse


def _place(prompt: Prompt) -> str:
    """Where a prompt comes from: its task, and its line or row in a file."""
    places = [f"{unit} {prompt.entry[unit]}" for unit in ("line", "row") if unit in prompt.entry]
    return ", ".join([*places, f"task {prompt.task!r}"])


def _excerpt(text: str, length: int = 80) -> str:
    return repr(text if len(text) <= length else text[:length] + "...")
