"""Settings of any value and type: a frozen config that answers all it can be asked, or a ConfigError."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import FrozenInstanceError, fields
from typing import Any

from hypothesis import strategies as st

from megatron_hybrid.config import HybridConfig, as_dict
from megatron_hybrid.errors import ConfigError
from megatron_hybrid.online_config import OnlineConfig
from tests.fuzz.targets import Target

NUMBERS = st.sampled_from((0, 1, 2, -1, 0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"), 10**400, True, False))
SCHEDULES = st.sampled_from(
    (
        "constant",
        "linear:0:10",
        "cosine:nan:1e9",
        "linear:1",
        "steps:0.5@10,inf@20",
        "steps:@",
        "steps:1@-1",
        "linear:1:0",
    )
)
ADDRESSES = st.sampled_from(
    (
        "http://localhost:1",
        "https://a/v1",
        "http://a",
        "http://[::1",
        "https://me:x@a",
        "//",
        "http://a:99999",
        "https://é",
    )
)
SOURCES = st.sampled_from(
    (
        "reasoning_gym:chain_sum",
        "a.jsonl",
        "0.5*a.jsonl,0.5*b.parquet",
        "-1*a,2*b",
        "inf*a",
        "1*a,1*a",
        "*,",
        "self",
        "m:f",
    )
)
WORDS = st.sampled_from(
    sorted({c for f in fields(HybridConfig) for c in f.metadata["choices"] or ()} | {"skip", "sglang"})
)
VALUES = NUMBERS | SCHEDULES | ADDRESSES | SOURCES | WORDS | st.none() | st.text(max_size=6) | st.just([1])


def check(config: type, case: dict[str, Any]) -> None:
    defaults = {f.name: f.default for f in fields(config)}
    args = Namespace(**{f"hybrid_{name}": value for name, value in (defaults | case).items()})
    try:
        made = config.from_args(args)
    except ConfigError as error:
        assert "  " not in str(error) and len(str(error)) < 3000
        return
    assert as_dict(made) == defaults | case
    try:
        made.reward = made.discount = None
        raise AssertionError("it must be frozen")
    except FrozenInstanceError:
        pass
    for name in ("rewards", "longest_request_s", "has_rollouts", "named_teachers", "imitates", "has_future_cost"):
        getattr(made, name, None)
    for step in (0, 1, 10**9):
        if isinstance(made, HybridConfig):
            assert 0 <= made.at(step).discount <= 1 and made.at(step).reward_weight >= 0


def target(config: type) -> Target:
    names = [f.name for f in fields(config)]
    return Target(st.dictionaries(st.sampled_from(names), VALUES, max_size=4), lambda case: check(config, case))


TARGETS = {"settings, method": target(HybridConfig), "settings, run": target(OnlineConfig)}
