"""What the study of variance looks at: a student, a teacher, a few questions and a reward, at fixed weights.

small     the world of `study_world.py`, trained in the first minutes: any response length
smollm2   SmolLM2-135M without layers 12-17 under its unpruned self on the four reasoning-gym tasks of
          examples/6_smollm2_recovery.sh, which makes both models; the shortest question of each task
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_hybrid.errors import DataError
from megatron_hybrid.mcore.checkpoint_io import build_gpt, load_megatron_state, load_weights, single_rank
from megatron_hybrid.parallel import ParallelContext
from megatron_hybrid.prompts.sources import open_source
from megatron_hybrid.prompts.stream import PromptStream
from megatron_hybrid.prompts.template import PromptTemplate
from megatron_hybrid.records import Prompt
from megatron_hybrid.rewards.python_function import PythonFunctionReward
from megatron_hybrid.rewards.reasoning_gym import ReasoningGymReward
from megatron_hybrid.rewards.rubric import Rubric
from megatron_hybrid.rollouts.generate import Sampler
from megatron_hybrid.train.credit import Scored

REAL_PROMPTS = "reasoning_gym:calendar_arithmetic,count_primes,syllogism,time_intervals"
LOOKED_AT = 64
"""Questions among which the shortest of each task are chosen: long ones cost time and show nothing else."""


@dataclass(frozen=True)
class Setting:
    """One model at fixed weights; every batch asks the same questions."""

    student: Any
    teacher: Any
    sampler: Sampler
    rubric: Rubric
    prompts: list[Prompt]
    group_size: int
    vocab_size: int

    def rollouts(self, seed: int) -> Scored:
        """A batch of its own for each seed: a group for each question, scored."""
        batch = self.sampler.sample([self.student], self.prompts, self.group_size, step=0, seed=seed)
        return Scored(batch, self.rubric.score(batch).rewards)


@contextlib.contextmanager
def small(
    world: Path, num_digits: int, *, num_prompts: int, group_size: int, student: Path | None
) -> Iterator[Setting]:
    """Questions of one length: a response has one token more than the question digits, its last included."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(world / "tokenizer"))
    prompts = _prompts(str(world / f"prompts-{num_digits}.jsonl"), tokenizer, num_prompts, system_prompt=None)
    rubric = Rubric({"share_right": (PythonFunctionReward("study_world:share_right"), 1.0)})
    folders = (student or world / "student", world / "teacher")
    with _setting(folders, tokenizer, torch.float32, rubric, prompts, group_size, num_digits + 1) as setting:
        yield setting


@contextlib.contextmanager
def smollm2(
    models: Path, max_response: int, *, num_prompts: int, group_size: int, student: Path | None, dtype: torch.dtype
) -> Iterator[Setting]:
    """Responses up to `max_response` tokens.

    Raises:
        DataError: the models have not been made.
    """
    from transformers import AutoTokenizer

    folders = (student or models / "smollm2-without-12-17", models / "smollm2")
    if missing := [str(folder) for folder in folders if not folder.exists()]:
        raise DataError(f"{' and '.join(missing)} not found: examples/6_smollm2_recovery.sh makes the models. Run it.")
    tokenizer = AutoTokenizer.from_pretrained(str(models / "smollm2-hf"))
    prompts = _prompts(REAL_PROMPTS, tokenizer, num_prompts, system_prompt="")
    rubric = Rubric({"reasoning_gym": (ReasoningGymReward(), 1.0)})
    with _setting(folders, tokenizer, dtype, rubric, prompts, group_size, max_response) as setting:
        yield setting


def _prompts(source: str, tokenizer: Any, count: int, *, system_prompt: str | None) -> list[Prompt]:
    """The shortest questions of each task, equally many of each as far as `count` allows."""
    template = PromptTemplate(tokenizer, system_prompt=system_prompt)
    drawn = PromptStream(open_source(source), template, seed=0, max_prompt_length=4096).draw(0, LOOKED_AT)
    by_task: dict[str, list[Prompt]] = {}
    for prompt in sorted(drawn, key=lambda p: len(p.token_ids)):
        by_task.setdefault(prompt.task, []).append(prompt)
    in_turn = [of_task[k] for k in range(LOOKED_AT) for of_task in by_task.values() if k < len(of_task)]
    return in_turn[:count]


@contextlib.contextmanager
def _setting(
    folders: Sequence[Path],
    tokenizer: Any,
    dtype: torch.dtype,
    rubric: Rubric,
    prompts: list[Prompt],
    group_size: int,
    max_response: int,
) -> Iterator[Setting]:
    with single_rank():
        model_parallel_cuda_manual_seed(0)  # Megatron's attention forks this state, even without dropout
        models = []
        for folder in folders:
            state, args = load_megatron_state(folder)
            model = build_gpt(args, dtype=dtype).eval()
            load_weights(model, {name: value.to(dtype) for name, value in state.items()})
            models.append(model)
        student, teacher = models
        teacher.requires_grad_(False)
        yield Setting(
            student=student,
            teacher=teacher,
            sampler=Sampler(
                parallel=ParallelContext(),
                device=torch.device("cpu"),
                vocab_size=len(tokenizer),
                stop_ids=frozenset({tokenizer.eos_token_id}),
                decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
                max_response_length=max_response,
                batch_size=len(prompts) * group_size,
            ),
            rubric=rubric,
            prompts=prompts,
            group_size=group_size,
            vocab_size=len(tokenizer),
        )
