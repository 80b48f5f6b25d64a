"""Frozen settings, validated together, without torch: the same fields become `--hybrid-*` flags in `cli/arguments.py`.

`HybridConfig` is the method (what gradient), `OnlineConfig` the run (where prompts, rewards and the teacher come from).
"""

import math
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Self

from megatron_hybrid.errors import ConfigError

FUTURE_COSTS = ("closed_form", "sampled")
BASELINES = ("none", "rloo", "grpo")
COST_BASELINES = ("none", "group")
AGGREGATIONS = ("seq-mean-token-sum", "token-mean", "seq-mean-token-mean")
BACKENDS = ("torch",)
FILE_REWARDS = ("exact_match", "math_answer")


def setting(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field that carries its help text and choices to the command line."""
    return field(default=default, metadata={"help": text, "choices": choices})


class _FromArguments:
    """Reads itself from parsed `--hybrid-*` arguments; past this boundary nobody reads them again."""

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """The settings in `args.hybrid_<field>`, validated."""
        return cls(**{f.name: getattr(args, f"hybrid_{f.name}") for f in fields(cls)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class HybridConfig(_FromArguments):
    """The objective of arXiv 2512.23097, minimised: beta * trajectory reverse KL - lambda * reward; its estimator."""

    reward_weight: float = setting(1.0, "lambda: weight of the reward, per unit of reward")
    imitation_weight: float = setting(1.0, "beta: weight of the reverse KL to the teacher, per nat")
    discount: float = setting(
        1.0, "gamma in [0, 1]: discount of future imitation cost; 1 is the unbiased gradient, 0 one-step distillation"
    )
    future_cost: str = setting(
        "closed_form",
        "future imitation cost from the per-token KL (closed_form, less noise) or from sampled log-ratios (sampled)",
        FUTURE_COSTS,
    )
    baseline: str = setting(
        "rloo",
        "what is subtracted from the reward: leave-one-out group mean (rloo), group mean over std (grpo), nothing",
        BASELINES,
    )
    cost_baseline: str = setting(
        "group",
        "what is subtracted from the future imitation cost: leave-one-out mean of the group at the same position "
        "(needs whole groups in a micro-batch), nothing",
        COST_BASELINES,
    )
    group_size: int = setting(4, "responses sampled for each prompt")
    aggregation: str = setting(
        "seq-mean-token-sum",
        "how tokens become one loss over the global batch; seq-mean-token-sum is the objective itself",
        AGGREGATIONS,
    )
    student_temperature: float = setting(1.0, "temperature of the student: it samples and learns softmax(z / T)")
    teacher_temperature: float = setting(1.0, "temperature of the teacher's logits")
    teacher_logit_floor: float | None = setting(
        None, "teacher logits below this are raised to it; needed where a teacher forbids tokens with -inf"
    )
    backend: str = setting("torch", "implementation of the op", BACKENDS)

    def __post_init__(self) -> None:
        for name in ("reward_weight", "imitation_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(
                    f"{name} must be a finite number >= 0, got {value}: a negative weight would maximise the cost. "
                    "Change the sign of the reward itself, not of its weight."
                )
        if self.reward_weight == 0 and self.imitation_weight == 0:
            raise ConfigError(
                "reward_weight and imitation_weight are both 0, so there is nothing to learn: set one above 0."
            )
        if not 0 <= self.discount <= 1:
            raise ConfigError(
                f"discount (gamma) must lie in [0, 1], got {self.discount}: above 1 far-away costs would outweigh near "
                "ones. Use 1 for the exact gradient of the objective."
            )
        for name, choices in (
            ("future_cost", FUTURE_COSTS),
            ("baseline", BASELINES),
            ("cost_baseline", COST_BASELINES),
            ("aggregation", AGGREGATIONS),
            ("backend", BACKENDS),
        ):
            value = getattr(self, name)
            if value not in choices:
                near = get_close_matches(str(value), choices, n=1, cutoff=0.4)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {value!r}.{hint}")
        if self.group_size < 1:
            raise ConfigError(f"group_size must be at least 1, got {self.group_size}: a prompt needs a response.")
        if self.group_size < 2 and self.baseline in ("rloo", "grpo"):
            raise ConfigError(
                f"baseline {self.baseline!r} compares the responses to one prompt, but group_size is {self.group_size}"
                ": every advantage would be 0 or undefined. Use group_size >= 2, or baseline 'none'."
            )
        for name in ("student_temperature", "teacher_temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be a finite number > 0, got {value}: logits are divided by it.")


@dataclass(frozen=True)
class OnlineConfig(_FromArguments):
    """Where an online run takes its prompts, rewards and teacher from, and what it leaves behind."""

    prompts: str | None = setting(
        None, "training prompts: 'reasoning_gym:task,task' or a .jsonl file with prompt and answer in each line"
    )
    eval_prompts: str | None = setting(
        None, "held-out prompts, same forms; unset with reasoning_gym: other seeds of the same tasks"
    )
    system_prompt: str | None = setting(None, "system message of the chat template; unset: the template's own default")
    max_response_length: int = setting(64, "tokens a response may have, end-of-sequence included")
    rollout_batch_size: int = setting(64, "sequences decoded together on one data-parallel replica")
    teacher_load: str | None = setting(
        None, "Megatron checkpoint (torch_dist) of the teacher; its arguments are read from it"
    )
    run_dir: str = setting("runs/hybrid", "folder for the resolved configuration, metrics.jsonl, samples and plots")
    file_reward: str = setting("exact_match", "reward of questions from a file", FILE_REWARDS)
    truncated_reward: float | None = setting(
        None, "what a response earns that was cut off at the length limit; unset: its score"
    )
    gradient_norms_interval: int = setting(
        1, "steps between measurements of the dense and sparse gradient norms, which read the logits two more times"
    )
    samples_interval: int = setting(10, "steps between entries of the table of samples")

    def __post_init__(self) -> None:
        for name in ("max_response_length", "rollout_batch_size", "gradient_norms_interval", "samples_interval"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")


def as_dict(config: Any) -> dict[str, Any]:
    """A config as plain values, in the order of its fields."""
    return {f.name: getattr(config, f.name) for f in fields(config)}
