"""Training on a file of rollouts or demonstrations: read before Megatron starts, and held against the settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_hybrid.checkpoint.fingerprint import tokenizer_fingerprint
from megatron_hybrid.config import HybridConfig
from megatron_hybrid.errors import ConfigError, DataError
from megatron_hybrid.online_config import OnlineConfig
from megatron_hybrid.prompts.file_source import FileSource
from megatron_hybrid.prompts.recorded import read_rollouts, too_long_response
from megatron_hybrid.prompts.stream import PromptStream
from megatron_hybrid.records import Prompt
from megatron_hybrid.teachers.store import TeacherStore


def open_rollouts(config: HybridConfig, online: OnlineConfig, tokenizer: Any) -> FileSource | None:
    """The source that `rollouts` names, without groups that are too long where these are dropped; None: unset.

    Raises:
        ConfigError, DataError: the file cannot be used, or not with these settings.
    """
    if online.rollouts is None:
        return None
    source = read_rollouts(online.rollouts, tokenizer, config.group_size, on_bad_record=online.on_bad_record)
    first = source.item(0).responses[0]
    if first.log_probs is None and (config.rollout_correction != "none" or config.prefix_correction):
        asks = "prefix_correction is on" if config.prefix_correction else f"got {config.rollout_correction!r}"
        raise ConfigError(
            f"{online.rollouts} holds no 'logprobs' of whoever sampled its responses, so no importance weight can be "
            f"worked out: rollout_correction must be 'none' and prefix_correction off, {asks}. The gradient then takes "
            "the responses as the student's own. Or write the log-probs into the file."
        )
    demonstrations = "reward" not in first.entry["record"] and "by_source" in [name for _, name in online.rewards]
    if demonstrations and config.rewards_count and config.baseline != "none":
        raise ConfigError(
            f"{online.rollouts} holds no 'reward': its responses are demonstrations, which earn 1 each, and baseline "
            f"{config.baseline!r} compares them with one another: nothing would be learnt from them. Use baseline "
            "'none' (the gradient is that of cross-entropy), reward_weight 0 for imitation alone, or a --hybrid-reward."
        )
    refuse = too_long_response(online.max_response_length)
    if online.long_prompts == "drop":
        return source.fitting(refuse)
    for question in source.probe(0):
        if (why := refuse(question)) is not None:
            place = {name: value for name, value in question.entry.items() if name in ("line", "row")}
            raise DataError(
                f"{online.rollouts}: the group of {' '.join(f'{unit} {number}' for unit, number in place.items())} is "
                f"one {why}. Cut responses would end elsewhere, so none are: raise --hybrid-max-response-length, or "
                "leave such groups out with --hybrid-long-prompts drop."
            )
    return source


def recorded_rows(prompts: PromptStream, dp_rank: int = 0, dp_size: int = 1) -> list[Prompt]:
    """Every recorded response of this replica's share of the file once, as a row's prompt holds it."""
    assert prompts.size is not None
    groups = prompts.draw(0, prompts.size, dp_rank, dp_size)
    return [replace(group, responses=(response,)) for group in groups for response in group.responses]


def open_teacher_store(
    config: HybridConfig, online: OnlineConfig, tokenizer: Any, prompts: PromptStream
) -> TeacherStore | None:
    """The store that `teacher_store` names, which answers for every response of the file; None: unset.

    Raises:
        ConfigError, DataError: it is none, or was made for something else.
    """
    if online.teacher_store is None:
        return None
    if config.teacher_payload != "topk":
        raise ConfigError(
            f"teacher_payload is {config.teacher_payload!r}, but a store holds a teacher's likeliest tokens alone: set "
            "--hybrid-teacher-payload topk, and --hybrid-teacher-topk to as many as it holds, or fewer."
        )
    store = TeacherStore(
        online.teacher_store,
        k=config.teacher_topk,
        temperature=config.teacher_temperature,
        tokenizer=tokenizer_fingerprint(tokenizer),
    )
    store.require(recorded_rows(prompts))
    return store
