"""A run's settings: where prompts, rewards, responses and the teacher come from, and what is left behind.

Frozen, validated together, without torch, as the method's (`config.py`); the same fields become `--hybrid-*` flags.
"""

import ipaddress
import math
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from megatron_hybrid.config import FromArguments, nearest, setting
from megatron_hybrid.errors import ConfigError
from megatron_hybrid.weighted import split_weighted

FILE_REWARDS = ("exact_match", "math_answer")
REWARDS = ("by_source", "reasoning_gym", *FILE_REWARDS, "python_tests")
EXECUTES_CODE = "python_tests"
"""The reward that runs what the model wrote."""
LONG_PROMPTS = ("refuse", "drop")
ON_FAILED_REWARD = ("stop", "zero", "drop")
ON_FAILED_ROLLOUT = ("stop", "drop")
BAD_RECORDS = ("stop", "skip")
SERVER_APIS = ("vllm", "sglang")
SERVER_KEY_VARIABLE = "HYBRID_SERVER_API_KEY"
"""Environment variable with the key of an inference engine's server, sent to no other server."""
REWARD_KEY_VARIABLE = "HYBRID_REWARD_API_KEY"
"""The same for a server that is a reward."""

_MOST_RETRIES = 1000
"""With pauses of two minutes, more than a day."""


@dataclass(frozen=True)
class OnlineConfig(FromArguments):
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
    on_bad_record: str = setting(
        "stop",
        "records of files that cannot be used end the run before it starts, or are left out and counted, with the "
        "groups that miss one then",
        BAD_RECORDS,
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
    allow_other_inputs: bool = setting(
        False, "go on from a checkpoint that learnt from another teacher, other prompts or by another tokenizer or seed"
    )
    run_dir: str = setting("runs/hybrid", "folder for the resolved configuration, metrics.jsonl, samples and plots")
    reward: str = setting(
        "by_source",
        "what a response earns: by_source (a reasoning-gym question by its task's own scorer, one of a file by "
        "file_reward, a recorded response what its file says, a demonstration 1), reasoning_gym, exact_match, "
        "math_answer, python_tests (1 if the response's code passes the record's tests), a function of your own as "
        "module:function, or the http:// address of a server (its key in "
        f"{REWARD_KEY_VARIABLE}); several, comma-separated: WEIGHT*REWARD,WEIGHT*REWARD for their weighted sum",
    )
    file_reward: str = setting("exact_match", "reward by_source: that of questions from a file", FILE_REWARDS)
    truncated_reward: float | None = setting(
        None, "what a response earns that was cut off at the length limit; unset: its score"
    )
    on_failed_reward: str = setting(
        "stop",
        "a reward raises, takes too long, gives no finite number, or its server stays down: the run ends, the score is "
        "0, or the response's whole group is dropped, as if it had not been sampled",
        ON_FAILED_REWARD,
    )
    reward_workers: int | None = setting(
        None,
        "processes of a replica that score, several responses at a time; unset: one for module:function, none for "
        "other rewards, which are made in the run's own process, as with 0",
    )
    reward_timeout: float = setting(
        60.0, "seconds that a process may take for one response before it is ended; inf: no limit"
    )
    reward_memory: float = setting(8.0, "GiB of address space of such a process; inf: no limit")
    allow_code_execution: bool = setting(
        False,
        f"let the reward {EXECUTES_CODE} run what the model wrote, in a sandbox (megatron_hybrid/rewards/sandbox.py)",
    )
    on_failed_rollout: str = setting(
        "stop",
        "rollout_server gives no response to a prompt, at any attempt: the run ends, or the prompt's group is dropped",
        ON_FAILED_ROLLOUT,
    )
    gradient_norms_interval: int = setting(
        10, "steps between measurements of the dense and sparse gradient norms, which make the logits once more"
    )
    samples_interval: int = setting(10, "steps between entries of the table of samples")
    nonfinite_steps: int = setting(
        3,
        "steps in a row that are skipped because their gradient is not finite, after which the run stops; 0: none is "
        "skipped, what happens is up to Megatron's --rerun-mode and --no-check-for-nan-in-loss-and-grad",
    )
    allow_http: bool = setting(
        False, "send prompts and keys also over plain http:// to other machines, where who is on the way can read them"
    )
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
        self.check_types()
        for name in ("prompts", "eval_prompts"):
            for share, source in split_weighted(name, getattr(self, name) or "unset"):
                if share < 0:
                    raise ConfigError(
                        f"{name} gives {source!r} the share {share}: it cannot be less than nothing. Leave it out."
                    )
        self._check_rollouts()
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise ConfigError(f"max_prompt_length must be at least 1, got {self.max_prompt_length}.")
        for name, choices in (("long_prompts", LONG_PROMPTS), ("on_bad_record", BAD_RECORDS)):
            if (value := getattr(self, name)) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")
        self._check_rewards()
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
        if self.nonfinite_steps < 0:
            raise ConfigError(
                f"nonfinite_steps must be at least 0, got {self.nonfinite_steps}: it counts steps in a row. Use 0 to "
                "skip none."
            )
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

    def _check_rewards(self) -> None:
        """What is rewarded, and what becomes of a response where that fails."""
        names = [name for _, name in self.rewards]
        for name in names:
            _check_reward(name, allow_http=self.allow_http)
        if self.file_reward != FILE_REWARDS[0] and "by_source" not in names:
            raise ConfigError(
                f"file_reward is {self.file_reward!r}, but reward {self.reward!r} does not ask it: it is part of the "
                "reward by_source. Name it as the reward itself."
            )
        if self.allow_code_execution != (EXECUTES_CODE in names):
            raise ConfigError(
                f"allow_code_execution is {self.allow_code_execution}, and reward {self.reward!r}: {EXECUTES_CODE} "
                "runs what the model wrote, on the machines of the run, and has to be allowed; nothing else does. Set "
                "both, or neither."
            )
        for name, choices in (("on_failed_reward", ON_FAILED_REWARD), ("on_failed_rollout", ON_FAILED_ROLLOUT)):
            if (value := getattr(self, name)) not in choices:
                raise ConfigError(
                    f"{name} must be one of {', '.join(choices)}; got {value!r}.{nearest(value, choices)}"
                )
        if self.on_failed_rollout != "stop" and self.rollout_server is None:
            raise ConfigError(
                f"on_failed_rollout is {self.on_failed_rollout!r}, but there is no rollout_server: the student's own "
                "decoding does not fail for a single prompt. Leave it out."
            )
        if self.reward_workers is not None and self.reward_workers < 0:
            raise ConfigError(f"reward_workers must be at least 0, got {self.reward_workers}.")
        for name in ("reward_timeout", "reward_memory"):
            if not (value := getattr(self, name)) > 0:
                raise ConfigError(f"{name} must be above 0, got {value}. Use inf for no limit.")

    def workers_of(self, reward: str) -> int:
        """Processes that make this one of `rewards`; 0: the run's own."""
        if "://" in reward:
            return 0
        return int(":" in reward) if self.reward_workers is None else self.reward_workers

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
                check_url(name, url, allow_http=self.allow_http)
        if len(named := self.named_teachers) > 1:
            (first, one), (second, other), *_ = named.items()
            raise ConfigError(
                f"{first} is {one!r} and {second} {other!r}: one of the two would be silently ignored. Leave one out."
            )
        if self.server_api not in SERVER_APIS:
            raise ConfigError(
                f"server_api must be one of {', '.join(SERVER_APIS)}; got {self.server_api!r}."
                f"{nearest(self.server_api, SERVER_APIS)}"
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
        if not 0 <= self.server_retries <= _MOST_RETRIES:
            raise ConfigError(f"server_retries must lie in [0, {_MOST_RETRIES}], got {self.server_retries}.")

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


def check_url(name: str, url: str, *, allow_http: bool = False) -> None:
    """Raises ConfigError unless `url` is an address that can be asked, that may be shown, and that nobody listens to.

    allow_http  plain http:// also to other machines
    """
    if re.match(r"[^/?#]*//[^/?#]*@", url):
        variable = REWARD_KEY_VARIABLE if name == "reward" else SERVER_KEY_VARIABLE
        raise ConfigError(
            f"{name} is an address with a user or password before its '@' (not shown here): it would be written into "
            f"config.json and errors, and is not sent. Put the server's key into the environment variable {variable}, "
            "which goes along as a bearer token, and leave it out of the address."
        )
    keys = r"[?&][^=&]*(key|token|secret|passw|auth|sig)[^=&]*="
    if name != "reward" and re.search("[?#]", url) or re.search(keys, url, re.IGNORECASE):
        variable = REWARD_KEY_VARIABLE if name == "reward" else SERVER_KEY_VARIABLE
        raise ConfigError(
            f"{name} is an address with a query that has no place in it (not shown here): it would be written into "
            f"config.json, checkpoints and errors. Put a key into the environment variable {variable}, which goes "
            "along as a bearer token, and leave it out of the address."
        )
    try:
        parts = urlsplit(url)
        # Characters that one parser drops and another reads would make it another host than the one that is checked.
        fits = parts.scheme in ("http", "https") and parts.port != 0 and not re.search(r"[\s\\]|[^ -~]", url)
    except ValueError:  # a port that is no number
        fits = False
    if not (fits and parts.hostname):
        raise ConfigError(f"{name} {url!r} is no address of a server: expected http://HOST:PORT or https://HOST.")
    if parts.scheme == "http" and not allow_http and not _is_this_machine(parts.hostname):
        raise ConfigError(
            f"{name} {url!r} is plain http to another machine: prompts, responses and the server's key could be read "
            "on the way, and answered by somebody else. Use https://, or say --hybrid-allow-http where the network "
            "between is your own."
        )


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def _check_reward(name: str, *, allow_http: bool) -> None:
    if "://" in name:
        check_url("reward", name, allow_http=allow_http)
    elif not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name) and name not in REWARDS:
        several = " Several rewards need a weight each, as in 1*exact_match,0.5*math_answer." if "," in name else ""
        raise ConfigError(
            f"reward must be one of {', '.join(REWARDS)}, module:function, or http://...; got {name!r}."
            f"{nearest(name, REWARDS)}{several}"
        )
