"""Frozen settings, validated together, without torch: the same fields become `--hybrid-*` flags in `cli/arguments.py`.

`HybridConfig` is the method (what gradient), `OnlineConfig` the run (where prompts, rewards and the teacher come from).
"""

import math
import re
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, Self
from urllib.parse import urlsplit

from megatron_hybrid.annealing import Annealed, annealed
from megatron_hybrid.errors import ConfigError
from megatron_hybrid.weighted import split_weighted

FUTURE_COSTS = ("closed_form", "sampled")
BASELINES = ("none", "rloo", "grpo", "reinforce_plus_plus", "running_mean")
GROUP_BASELINES = ("rloo", "grpo")
COST_BASELINES = ("none", "group")
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
FILE_REWARDS = ("exact_match", "math_answer")
REWARDS = ("by_source", "reasoning_gym", *FILE_REWARDS)
LONG_PROMPTS = ("refuse", "drop")
SERVER_APIS = ("vllm", "sglang")
SERVER_KEY_VARIABLE = "HYBRID_SERVER_API_KEY"
"""Environment variable with the key of an inference engine's server, sent to no other server."""
REWARD_KEY_VARIABLE = "HYBRID_REWARD_API_KEY"
"""The same for a server that is a reward."""


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
                    f"{name} must be one of {', '.join(choices)}; got {value!r}.{_nearest(value, choices)}"
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


@dataclass(frozen=True)
class OnlineConfig(_FromArguments):
    """Where an online run takes its prompts, rewards and teacher from, and what it leaves behind."""

    prompts: str | None = setting(
        None,
        "training prompts: 'reasoning_gym:task,task', or a .jsonl or .parquet file with prompt and answer in each line "
        "or row; several: SHARE*SOURCE,SHARE*SOURCE",
    )
    rollouts: str | None = setting(
        None,
        "in place of prompts: a .jsonl or .parquet file with prompt and response in each line or row, and reward, "
        "logprobs and group where there are; without reward they are demonstrations",
    )
    eval_prompts: str | None = setting(
        None, "held-out prompts, same forms; unset: other seeds of the reasoning_gym tasks among the training prompts"
    )
    max_prompt_length: int | None = setting(
        None, "tokens a prompt may have; unset: what the sequence length leaves beside a response"
    )
    long_prompts: str = setting(
        "refuse",
        "prompts with more tokens than that, and recorded responses with more than max_response_length, end the run "
        "before it starts, or are dropped",
        LONG_PROMPTS,
    )
    system_prompt: str | None = setting(None, "system message of the chat template; unset: the template's own default")
    max_response_length: int = setting(64, "tokens a response may have, end-of-sequence included")
    rollout_batch_size: int = setting(64, "sequences decoded together on one data-parallel replica")
    pack_sequences: bool = setting(
        False, "train on sequences behind one another in one row (THD) instead of padded rows"
    )
    teacher_load: str | None = setting(
        None,
        "Megatron checkpoint (torch_dist) of the teacher, its arguments are read from it; several, comma-separated: "
        "TASK=PATH for one per task ('*' for all others), WEIGHT*PATH for a mixture of their distributions; a PATH "
        "'self' is a copy of the student",
    )
    teacher_ema_decay: float | None = setting(
        None, "teacher_load self: what the copy keeps of itself at each step, in [0, 1); unset: the copy stays"
    )
    teacher_refresh_interval: int | None = setting(
        None, "teacher_load self: steps after which the copy is taken anew; unset: never"
    )
    teacher_hint: str | None = setting(
        None,
        "what the teacher reads behind the question and the student does not, with {answer} filled in: on-policy "
        "self-distillation from a hint or solution",
    )
    teacher_server: str | None = setting(
        None,
        "http:// address of an inference engine that is the teacher, in place of teacher_load; needs teacher_payload "
        f"topk; a key is taken from {SERVER_KEY_VARIABLE}",
    )
    teacher_store: str | None = setting(
        None,
        "folder with a teacher's answers to the responses of rollouts (tools/precompute_teacher.py), in place of "
        "teacher_load; needs teacher_payload topk",
    )
    rollout_server: str | None = setting(
        None,
        "http:// address of an inference engine that samples, in place of the student's own decoding; a key is taken "
        f"from {SERVER_KEY_VARIABLE}",
    )
    rollout_sync_interval: int | None = setting(
        None,
        "rollout_server: steps after which it is given the student's weights; unset: it keeps its own, and the student "
        "answers held-out prompts itself",
    )
    rollout_sync_dir: str | None = setting(
        None, "folder for those weights, on a disk that all ranks and the server share, runs too; unset: in run_dir"
    )
    server_api: str = setting(
        "vllm", "what rollout_server and teacher_server are: vllm (its OpenAI-compatible server) or sglang", SERVER_APIS
    )
    server_requests: int = setting(64, "requests to an inference engine that are under way at a time, per replica")
    run_dir: str = setting("runs/hybrid", "folder for the resolved configuration, metrics.jsonl, samples and plots")
    reward: str = setting(
        "by_source",
        "what a response earns: by_source (a reasoning-gym question by its task's own scorer, one of a file by "
        "file_reward, a recorded response what its file says, a demonstration 1), reasoning_gym, exact_match, "
        "math_answer, a function of your own as module:function, or the http:// address of a server (its key in "
        f"{REWARD_KEY_VARIABLE}); several, comma-separated: WEIGHT*REWARD,WEIGHT*REWARD for their weighted sum",
    )
    file_reward: str = setting("exact_match", "reward by_source: that of questions from a file", FILE_REWARDS)
    truncated_reward: float | None = setting(
        None, "what a response earns that was cut off at the length limit; unset: its score"
    )
    gradient_norms_interval: int = setting(
        10, "steps between measurements of the dense and sparse gradient norms, which make the logits once more"
    )
    samples_interval: int = setting(10, "steps between entries of the table of samples")
    server_timeout: float = setting(600.0, "seconds that one request to a server may take")
    server_retries: int = setting(
        5, "times a request that failed is tried again, with pauses that double from one second"
    )

    @property
    def rewards(self) -> list[tuple[float, str]]:
        """The rewards and their weights."""
        return split_weighted("reward", self.reward)

    @property
    def longest_request_s(self) -> float:
        """Seconds until a server's silence ends the run, pauses included; 0 where no server is asked."""
        servers = (self.teacher_server, self.rollout_server)
        asks = any(servers) or any("://" in name for _, name in self.rewards)
        pauses = sum(min(2.0**number, 120.0) for number in range(self.server_retries - 1))  # see servers/json_server.py
        return (self.server_retries + 1) * self.server_timeout + pauses if asks else 0.0

    def __post_init__(self) -> None:
        for name in ("prompts", "eval_prompts"):
            for share, source in split_weighted(name, getattr(self, name) or "unset"):
                if share < 0:
                    raise ConfigError(
                        f"{name} gives {source!r} the share {share}: it cannot be less than nothing. Leave it out."
                    )
        self._check_rollouts()
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise ConfigError(f"max_prompt_length must be at least 1, got {self.max_prompt_length}.")
        if self.long_prompts not in LONG_PROMPTS:
            raise ConfigError(f"long_prompts must be one of {', '.join(LONG_PROMPTS)}; got {self.long_prompts!r}.")
        for _, name in self.rewards:
            _check_reward(name)
        if self.file_reward != FILE_REWARDS[0] and "by_source" not in [name for _, name in self.rewards]:
            raise ConfigError(
                f"file_reward is {self.file_reward!r}, but reward {self.reward!r} does not ask it: it is part of the "
                "reward by_source. Name it as the reward itself."
            )
        for name in (
            "max_response_length",
            "rollout_batch_size",
            "gradient_norms_interval",
            "samples_interval",
            "server_requests",
            "rollout_sync_interval",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")
        self._check_servers()
        self_teacher = re.search(r"(^|[=*,])\s*self\s*(,|$)", self.teacher_load or "") is not None
        for name in ("teacher_ema_decay", "teacher_refresh_interval"):
            value = getattr(self, name)
            if value is not None and not self_teacher:
                raise ConfigError(
                    f"{name} is {value}, but teacher_load is {self.teacher_load!r}: only a copy of the student changes "
                    "during a run. Set teacher_load 'self'."
                )
        if self.teacher_ema_decay is not None and not 0 <= self.teacher_ema_decay < 1:
            raise ConfigError(f"teacher_ema_decay must lie in [0, 1), got {self.teacher_ema_decay}.")
        if self.teacher_refresh_interval is not None and self.teacher_refresh_interval < 1:
            raise ConfigError(f"teacher_refresh_interval must be at least 1, got {self.teacher_refresh_interval}.")
        if self.teacher_ema_decay is not None and self.teacher_refresh_interval is not None:
            raise ConfigError(
                "teacher_ema_decay and teacher_refresh_interval are both set: the copy is either averaged or taken "
                "anew. Leave one out."
            )

    def _check_rollouts(self) -> None:
        """Rollouts from a file, in place of prompts."""
        if self.rollouts is None:
            if self.teacher_store is not None:
                raise ConfigError(
                    f"teacher_store is {self.teacher_store!r}, but there are no recorded rollouts: responses that are "
                    "sampled in the run are new to every store. Give --hybrid-rollouts, or --hybrid-teacher-load."
                )
            return
        if not self.rollouts.endswith((".jsonl", ".parquet")):
            raise ConfigError(f"rollouts must be a .jsonl or .parquet file, got {self.rollouts!r}.")
        for name in ("prompts", "rollout_server"):
            if (value := getattr(self, name)) is not None:
                raise ConfigError(
                    f"rollouts is {self.rollouts!r} and {name} {value!r}: responses are either read or sampled, and "
                    "one of the two would be silently ignored. Leave one out."
                )

    def _check_servers(self) -> None:
        """Rewards, rollouts and teachers that are asked over HTTP."""
        for name in ("teacher_server", "rollout_server"):
            if (url := getattr(self, name)) is not None:
                check_url(name, url)
        if len(named := self.named_teachers) > 1:
            (first, one), (second, other), *_ = named.items()
            raise ConfigError(
                f"{first} is {one!r} and {second} {other!r}: one of the two would be silently ignored. Leave one out."
            )
        if self.server_api not in SERVER_APIS:
            raise ConfigError(
                f"server_api must be one of {', '.join(SERVER_APIS)}; got {self.server_api!r}."
                f"{_nearest(self.server_api, SERVER_APIS)}"
            )
        if self.rollout_server is None and self.rollout_sync_interval is not None:
            raise ConfigError(
                f"rollout_sync_interval is {self.rollout_sync_interval}, but there is no rollout_server to give "
                "weights to: give its address, or leave the interval out."
            )
        if self.rollout_sync_interval is None and self.rollout_sync_dir is not None:
            raise ConfigError(
                f"rollout_sync_dir is {self.rollout_sync_dir!r}, but no weights are written: give "
                "rollout_sync_interval."
            )
        if not (math.isfinite(self.server_timeout) and self.server_timeout > 0):
            raise ConfigError(f"server_timeout must be a finite number of seconds > 0, got {self.server_timeout}.")
        if self.server_retries < 0:
            raise ConfigError(f"server_retries must be at least 0, got {self.server_retries}.")

    @property
    def has_rollouts(self) -> bool:
        """Whether rollouts are trained on, sampled or recorded; else the script's own data is."""
        return self.prompts is not None or self.rollouts is not None

    @property
    def named_teachers(self) -> dict[str, str]:
        """The setting that asks for a teacher, and its value; validated to be one at most."""
        names = ("teacher_server", "teacher_load", "teacher_store")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def names_teacher(self) -> bool:
        """Whether a teacher is asked for."""
        return bool(self.named_teachers)


def check_url(name: str, url: str) -> None:
    """Raises ConfigError unless `url` is an address that can be asked, and that may be shown."""
    if re.match(r"[^/?#]*//[^/?#]*@", url):
        variable = REWARD_KEY_VARIABLE if name == "reward" else SERVER_KEY_VARIABLE
        raise ConfigError(
            f"{name} is an address with a user or password before its '@' (not shown here): it would be written into "
            f"config.json and errors, and is not sent. Put the server's key into the environment variable {variable}, "
            "which goes along as a bearer token, and leave it out of the address."
        )
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        fits = False
    if not fits:
        raise ConfigError(f"{name} {url!r} is no address of a server: expected http://HOST:PORT or https://HOST.")


def _check_reward(name: str) -> None:
    if "://" in name:
        check_url("reward", name)
    elif not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name) and name not in REWARDS:
        several = " Several rewards need a weight each, as in 1*exact_match,0.5*math_answer." if "," in name else ""
        raise ConfigError(
            f"reward must be one of {', '.join(REWARDS)}, module:function, or http://...; got {name!r}."
            f"{_nearest(name, REWARDS)}{several}"
        )


def _nearest(value: Any, choices: tuple[str, ...]) -> str:
    near = get_close_matches(str(value), choices, n=1, cutoff=0.4)
    return f" Did you mean {near[0]!r}?" if near else ""


def as_dict(config: Any) -> dict[str, Any]:
    """A config as plain values, in the order of its fields."""
    return {f.name: getattr(config, f.name) for f in fields(config)}
