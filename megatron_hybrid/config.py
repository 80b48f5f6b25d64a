"""The method's settings (what gradient), frozen, validated together, without torch; and what all settings share.

Their fields become `--hybrid-*` flags in `cli/arguments.py`. The settings of a run: `online_config.py`.
"""

import math
import numbers
import re
import reprlib
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, Self, get_args

from megatron_hybrid.annealing import Annealed, annealed
from megatron_hybrid.errors import ConfigError

FUTURE_COSTS = ("closed_form", "sampled")
BASELINES = ("none", "rloo", "grpo", "reinforce_plus_plus", "running_mean")
GROUP_BASELINES = ("rloo", "grpo")
COST_BASELINES = ("none", "group")
IMITATION_FILTERS = ("none", "task")
AGGREGATIONS = ("seq-mean-token-sum", "token-mean", "seq-mean-token-mean")
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "skewed_kl", "skewed_reverse_kl")
ROLLOUT_CORRECTIONS = (
    "none",
    "token_truncate",
    "token_mask",
    "sequence_truncate",
    "sequence_mask",
    "ppo_clip",
)
TEACHER_PAYLOADS = ("hidden", "topk")
BACKENDS = ("torch", "compile", "triton")
LM_HEADS = ("fused", "logits")
SCHEDULED = ("reward_weight", "imitation_weight", "discount")
"""Settings that have a schedule, `<setting>_schedule`."""

_WIDER: dict[Any, type] = {float: numbers.Real, int: numbers.Integral}
"""What a field of this type takes."""
_LARGEST = 2**63


def setting(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field that carries its help text and choices to the command line."""
    return field(default=default, metadata={"help": text, "choices": choices})


class FromArguments:
    """Reads itself from parsed `--hybrid-*` arguments; past this boundary nobody reads them again."""

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """The settings in `args.hybrid_<field>`, validated."""
        return cls(**{f.name: getattr(args, f"hybrid_{f.name}") for f in fields(cls)})  # type: ignore[arg-type]

    def check_types(self) -> None:
        """Raises ConfigError where a value is none of its field's type: the command line makes no such, scripts may."""
        for f in fields(self):  # type: ignore[arg-type]
            _check_type(f.name, getattr(self, f.name), get_args(f.type) or (f.type,))


def _check_type(name: str, value: Any, kinds: tuple[Any, ...]) -> None:
    # bool counts as a whole number to Python, and numpy's numbers are none of Python's.
    wider = tuple(_WIDER.get(kind, kind) for kind in kinds)
    if not (bool in kinds if isinstance(value, bool) else isinstance(value, wider)):
        expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ConfigError(f"{name} must be {expected}, got {reprlib.repr(value)} ({type(value).__name__}).")
    if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        raise ConfigError(f"{name} {reprlib.repr(value)} holds a character that neither files nor addresses can have.")
    if isinstance(value, numbers.Integral) and abs(int(value)) > _LARGEST:
        raise ConfigError(f"{name} is a number of {int(value).bit_length()} bits: nothing here goes that far.")


@dataclass(frozen=True)
class HybridConfig(FromArguments):
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
    divergence: str = setting(
        "reverse_kl",
        "what imitation minimises at each token; only reverse_kl has a trajectory objective, the others need discount "
        "0",
        DIVERGENCES,
    )
    divergence_mix: float = setting(
        0.5,
        "in (0, 1): jsd, the teacher's share of the mixture (GKD's beta); skewed_kl and skewed_reverse_kl, the share "
        "of the divergence's first distribution (DistiLLM's alpha)",
    )
    baseline: str = setting(
        "rloo",
        "what is subtracted from the reward: leave-one-out group mean (rloo), group mean over std (grpo), batch mean "
        "over std (reinforce_plus_plus), mean of earlier ones (running_mean), nothing",
        BASELINES,
    )
    baseline_decay: float = setting(
        0.9, "running_mean: what a collection of rollouts keeps of the mean of those before it, in [0, 1)"
    )
    cost_baseline: str = setting(
        "group",
        "what is subtracted from the future imitation cost: leave-one-out mean of the group at the same position "
        "(needs whole groups in a micro-batch), nothing",
        COST_BASELINES,
    )
    imitation_filter: str = setting(
        "none",
        "imitation_weight by task: less where the responses that the teacher prefers have earned less (task), the same "
        "everywhere",
        IMITATION_FILTERS,
    )
    imitation_filter_floor: float = setting(0.1, "task: share of imitation_weight that is left there, in [0, 1]")
    imitation_filter_decay: float = setting(0.9, "task: what a step keeps of what earlier ones have seen, in [0, 1)")
    rollout_correction: str = setting(
        "token_truncate",
        "importance weight pi / sampler of the sparse term: per token or per sequence, truncated at the threshold or "
        "masked outside it, or PPO's clipping",
        ROLLOUT_CORRECTIONS,
    )
    rollout_is_threshold: float = setting(
        2.0, "largest importance weight; masks also drop weights below 1 / threshold. inf: exact weights"
    )
    prefix_correction: bool = setting(
        False, "weigh the dense term of a token by the importance of the tokens before it, truncated likewise"
    )
    clip_ratio_low: float = setting(0.2, "ppo_clip: a negative advantage stops pushing below 1 - this")
    clip_ratio_high: float = setting(0.2, "ppo_clip: a positive advantage stops pushing above 1 + this")
    mini_batches: int = setting(1, "optimizer steps that share one collection of rollouts, each on its own part")
    ppo_epochs: int = setting(1, "times each collection of rollouts is trained on")
    reward_weight_schedule: str = setting(
        "constant",
        "reward_weight over training: constant; linear:FROM:STEPS or cosine:FROM:STEPS up to the weight itself; "
        "steps:VALUE@STEP,VALUE@STEP",
    )
    imitation_weight_schedule: str = setting("constant", "imitation_weight over training, likewise")
    discount_schedule: str = setting("constant", "discount over training, likewise")
    group_size: int = setting(4, "responses sampled for each prompt")
    aggregation: str = setting(
        "seq-mean-token-sum",
        "how tokens become one loss over the global batch; seq-mean-token-sum is the objective itself",
        AGGREGATIONS,
    )
    pretraining_microbatches: int = setting(
        0, "micro-batches of the script's own data beside the rollouts of a step, on each data-parallel replica"
    )
    pretraining_weight: float = setting(
        1.0, "weight of their cross-entropy, mean over the tokens of all of them, beside the rollouts' loss"
    )
    student_temperature: float = setting(1.0, "temperature of the student: it samples and learns softmax(z / T)")
    teacher_temperature: float = setting(1.0, "temperature of the teacher's logits")
    teacher_logit_floor: float | None = setting(
        None, "teacher logits below this are raised to it; needed where a teacher forbids tokens with -inf"
    )
    teacher_payload: str = setting(
        "hidden",
        "what the teacher leaves for the loss: hidden states (the whole distribution), or its topk tokens and one "
        "bucket for the rest",
        TEACHER_PAYLOADS,
    )
    teacher_topk: int = setting(64, "tokens of a topk payload")
    backend: str = setting("torch", "implementation of the op", BACKENDS)
    lm_head: str = setting(
        "fused",
        "student logits of a chunk of tokens at a time, inside the loss (fused), or of all response tokens of a "
        "micro-batch at once (logits, the reference)",
        LM_HEADS,
    )
    lm_head_chunk_size: int | None = setting(
        None,
        "tokens of a chunk; unset: 512 on a CPU, else by the memory that is free at the first one, which changes the "
        "order of sums: set it where runs must repeat to the bit",
    )

    def __post_init__(self) -> None:
        self.check_types()
        self._check_choices()
        for step in self._turning_points():
            self._check_weights(step)
        for step in self._turning_points():
            if self.divergence != "reverse_kl" and (discount := self._value("discount", step)):
                when = f" from step {step} on" if step else ""
                raise ConfigError(
                    f"divergence {self.divergence!r} is a one-step loss: only the reverse KL adds up to a cost of the "
                    f"whole response, which is what discount ({discount}{when}) discounts. Set discount 0, or "
                    "divergence 'reverse_kl'."
                )
        if self.divergence != "reverse_kl" and self.teacher_payload == "topk":
            raise ConfigError(
                f"divergence {self.divergence!r} needs the teacher's whole distribution, but teacher_payload is "
                "'topk': its one bucket for the rest is exact for the reverse KL only. Use teacher_payload 'hidden'."
            )
        if self.teacher_payload == "topk" and self.teacher_logit_floor is not None:
            raise ConfigError(
                f"teacher_logit_floor is {self.teacher_logit_floor}, but teacher_payload is 'topk': a token that the "
                "teacher forbids is in the bucket of all others there, which has a floor of its own. Leave the floor "
                "out, or use teacher_payload 'hidden'."
            )
        self._check_numbers()
        self._check_pretraining()
        self._check_filter()
        if self.group_size < 2 and self.baseline in GROUP_BASELINES:
            raise ConfigError(
                f"baseline {self.baseline!r} compares the responses to one prompt, but group_size is {self.group_size}"
                ": every advantage would be 0 or undefined. Use group_size >= 2, or baseline 'none'."
            )

    def at(self, step: int) -> Self:
        """The settings of one step: weights and discount as their schedules have them; `step` steps are done."""
        now: dict[str, Any] = {name: self._value(name, step) for name in SCHEDULED}
        return replace(self, **now | {f"{name}_schedule": "constant" for name in SCHEDULED})

    @property
    def imitates(self) -> bool:
        """Whether the imitation term is ever on."""
        return any(self._value("imitation_weight", step) > 0 for step in self._turning_points())

    @property
    def rewards_count(self) -> bool:
        """Whether the reward term is ever on."""
        return any(self._value("reward_weight", step) > 0 for step in self._turning_points())

    @property
    def has_future_cost(self) -> bool:
        """Whether the future imitation cost is ever on."""
        return self.imitates and any(self._value("discount", step) > 0 for step in self._turning_points())

    def _annealed(self, name: str) -> Annealed:
        return annealed(name, getattr(self, f"{name}_schedule"), getattr(self, name))

    def _value(self, name: str, step: int) -> float:
        return self._annealed(name).at(step)

    def _turning_points(self) -> list[int]:
        """Steps between which no scheduled setting turns: what holds at each of them holds at all."""
        return sorted({step for name in SCHEDULED for step in self._annealed(name).turning_points})

    def _check_weights(self, step: int) -> None:
        """Weights and discount at one step of their schedules."""
        weights = {name: self._value(name, step) for name in ("reward_weight", "imitation_weight")}
        for name, value in weights.items():
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(
                    f"{name} must be a finite number >= 0, got {value}: a negative weight would maximise the cost. "
                    "Change the sign of the reward itself, not of its weight."
                )
        if not any(weights.values()):
            when = f" from step {step} on" if step else ""
            raise ConfigError(
                f"reward_weight and imitation_weight are both 0{when}, so there is nothing to learn: set one above 0."
            )
        discount = self._value("discount", step)
        if not 0 <= discount <= 1:
            raise ConfigError(
                f"discount (gamma) must lie in [0, 1], got {discount}: above 1 far-away costs would outweigh near "
                "ones. Use 1 for the exact gradient of the objective."
            )

    def _check_choices(self) -> None:
        for name, choices in (
            ("future_cost", FUTURE_COSTS),
            ("baseline", BASELINES),
            ("cost_baseline", COST_BASELINES),
            ("imitation_filter", IMITATION_FILTERS),
            ("divergence", DIVERGENCES),
            ("rollout_correction", ROLLOUT_CORRECTIONS),
            ("teacher_payload", TEACHER_PAYLOADS),
            ("aggregation", AGGREGATIONS),
            ("backend", BACKENDS),
            ("lm_head", LM_HEADS),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(
                    f"{name} must be one of {', '.join(choices)}; got {value!r}.{nearest(value, choices)}"
                )

    def _check_pretraining(self) -> None:
        """The share of the script's own data."""
        if self.pretraining_microbatches < 0:
            raise ConfigError(f"pretraining_microbatches must be at least 0, got {self.pretraining_microbatches}.")
        if not (math.isfinite(self.pretraining_weight) and self.pretraining_weight > 0):
            raise ConfigError(
                f"pretraining_weight must be a finite number > 0, got {self.pretraining_weight}. For no "
                "pretraining set pretraining_microbatches 0."
            )
        if self.pretraining_weight != 1 and not self.pretraining_microbatches:
            raise ConfigError(
                f"pretraining_weight is {self.pretraining_weight}, but pretraining_microbatches is 0: there is nothing "
                "to weigh. Set both, or neither."
            )

    def _check_filter(self) -> None:
        """What the filter of the imitation by task compares."""
        if not 0 <= self.imitation_filter_floor <= 1:
            raise ConfigError(f"imitation_filter_floor must lie in [0, 1], got {self.imitation_filter_floor}.")
        if not 0 <= self.imitation_filter_decay < 1:
            raise ConfigError(
                f"imitation_filter_decay must lie in [0, 1), got {self.imitation_filter_decay}: at 1 nothing is learnt."
            )
        if self.imitation_filter == "task" and not (self.imitates and self.rewards_count and self.group_size >= 2):
            raise ConfigError(
                "imitation_filter 'task' compares what the teacher prefers with what earns more, among responses to "
                f"one prompt, but imitation_weight is {self.imitation_weight}, reward_weight {self.reward_weight} and "
                f"group_size {self.group_size}. Set both weights above 0 and group_size >= 2, or imitation_filter "
                "'none'."
            )

    def _check_numbers(self) -> None:
        for name in ("group_size", "mini_batches", "ppo_epochs", "teacher_topk"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")
        for name in ("student_temperature", "teacher_temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be a finite number > 0, got {value}: logits are divided by it.")
        if self.teacher_logit_floor is not None and not math.isfinite(self.teacher_logit_floor):
            raise ConfigError(
                f"teacher_logit_floor must be finite, got {self.teacher_logit_floor}: it is there to keep the KL "
                "finite. Leave it out for no floor."
            )
        if not 0 < self.divergence_mix < 1:
            raise ConfigError(
                f"divergence_mix must lie strictly between 0 and 1, got {self.divergence_mix}: at either end the "
                "mixture is one of the two distributions. Choose forward_kl or reverse_kl for those."
            )
        if not 0 <= self.baseline_decay < 1:
            raise ConfigError(
                f"baseline_decay must lie in [0, 1), got {self.baseline_decay}: at 1 the mean never moves."
            )
        if not self.rollout_is_threshold >= 1:
            raise ConfigError(
                f"rollout_is_threshold must be at least 1, got {self.rollout_is_threshold}: on-policy tokens have "
                "weight 1, and would be cut. Use inf for exact importance weights."
            )
        if self.lm_head_chunk_size is not None and (self.lm_head_chunk_size < 1 or self.lm_head != "fused"):
            raise ConfigError(
                f"lm_head_chunk_size is {self.lm_head_chunk_size} and lm_head {self.lm_head!r}: it is the number of "
                "tokens, at least 1, whose logits the fused head makes at a time. Leave it unset, or use lm_head "
                "'fused'."
            )
        for name in ("clip_ratio_low", "clip_ratio_high"):
            value = getattr(self, name)
            if not (value > 0 and (name == "clip_ratio_high" or value <= 1)):
                raise ConfigError(f"{name} must be above 0 (and clip_ratio_low at most 1), got {value}.")


def nearest(value: Any, choices: tuple[str, ...]) -> str:
    """A hint for a message: the choice that was probably meant."""
    near = get_close_matches(str(value), choices, n=1, cutoff=0.4)
    return f" Did you mean {near[0]!r}?" if near else ""


def as_dict(config: Any) -> dict[str, Any]:
    """A config as plain values, in the order of its fields."""
    return {f.name: getattr(config, f.name) for f in fields(config)}
