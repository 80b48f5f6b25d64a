"""`--hybrid-*` flags, declared from the fields of the config classes, which read them back."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

from megatron_hybrid.config import HybridConfig
from megatron_hybrid.online_config import OnlineConfig

_GROUPS = {
    "hybrid teacher": "teacher_",
    "hybrid responses": "group_size|student_temperature|max_response|rollout_batch|pack_",
    "hybrid servers": "rollout_server|rollout_sync|server_|allow_http",
    "hybrid use of responses": "rollout_|prefix_|clip_|mini_batches|ppo_epochs",
    "hybrid LM head and op": "backend|lm_head",
    "hybrid prompts and rewards": (
        "prompts|rollouts|eval_|max_prompt|long_prompts|on_bad|system_|reward$|file_reward|truncated_reward|"
        "on_failed|reward_workers|reward_timeout|reward_memory|allow_code"
    ),
    "hybrid batches of the script's own": "pretraining_",
    "hybrid run folder and resume": "run_dir|allow_other|gradient_norms|samples_|nonfinite_",
}
"""Heading of the help to how the names of its settings begin, first match; a setting of none is of the objective."""
_OBJECTIVE = "hybrid objective"


class _TurnOn(argparse.Action):
    """`--hybrid` brings the Megatron setting that the hybrid gradient stands on."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        namespace.hybrid = True
        namespace.calculate_per_token_loss = True


def add_hybrid_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds `--hybrid` and the `--hybrid-*` flags; an `extra_args_provider` for Megatron's parser.

    `--hybrid` also sets --calculate-per-token-loss: one global normaliser. Without it every other flag here is inert
    and the run is plain Megatron.
    """
    groups = {title: parser.add_argument_group(title) for title in (_OBJECTIVE, *_GROUPS)}
    groups[_OBJECTIVE].add_argument(
        "--hybrid", action=_TurnOn, nargs=0, default=False, help="train with the hybrid objective; off: plain Megatron"
    )
    for config in (HybridConfig, OnlineConfig):
        for f in fields(config):
            assert f.default is not MISSING, f.name
            group = groups[_heading(f.name)]
            kind = _kind(str(f.type))
            default = "unset" if f.default is None else f.default
            text = f"{f.metadata['help']} (default: {default})".replace("%", "%%")
            if kind is bool:
                assert f.default is False, f.name
                group.add_argument(_flag(f.name), action="store_true", help=text)
                continue
            group.add_argument(
                _flag(f.name),
                type=kind,
                default=f.default,
                choices=f.metadata["choices"],
                metavar=None if f.metadata["choices"] else kind.__name__.upper(),
                help=text,
            )
    return parser


def hybrid_config_from_args(args: argparse.Namespace) -> HybridConfig | None:
    """The method, validated; None without `--hybrid`.

    Raises:
        ConfigError: a setting is out of range or contradicts another.
    """
    return HybridConfig.from_args(args) if getattr(args, "hybrid", False) else None


def _flag(name: str) -> str:
    return "--hybrid-" + name.replace("_", "-")


def _heading(name: str) -> str:
    return next((title for title, starts in _GROUPS.items() if re.match(starts, name)), _OBJECTIVE)


def _kind(annotation: str) -> type:
    # Optional settings are written `X | None`; the flag takes an X.
    names = {
        "float": float,
        "int": int,
        "str": str,
        "bool": bool,
        "<class 'bool'>": bool,
        "<class 'float'>": float,
        "<class 'int'>": int,
        "<class 'str'>": str,
    }
    return names[annotation.removesuffix(" | None")]
