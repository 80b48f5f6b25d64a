"""`WEIGHT*THING,WEIGHT*THING`: how settings name several rewards, prompt sources or teachers. Text to pairs; no torch.

One THING may stand alone, with the weight 1. A comma separates only where a weight follows, so a THING may hold commas
of its own (`reasoning_gym:task,task`). Not here: what the things are, and whether weights are shares or factors.
"""

import math
import re

from megatron_hybrid.errors import ConfigError

_NUMBER = r"[+-]?(?:nan|inf|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
_WEIGHT = re.compile(rf"\s*({_NUMBER})\s*\*(.*)", re.DOTALL)
_BETWEEN = re.compile(rf",(?=\s*{_NUMBER}\s*\*)")


def weighted(part: str) -> tuple[float, str] | None:
    """`WEIGHT*THING` as (weight, thing); None where the part has no weight."""
    found = _WEIGHT.fullmatch(part)
    return (float(found[1]), found[2].strip()) if found else None


def split_weighted(setting: str, text: str) -> list[tuple[float, str]]:
    """The value of a setting as its (weight, thing)s.

    Raises:
        ConfigError: a part without a name or, beside others, without a weight; a weight of 0 or that is no finite
            number; a thing named twice.
    """
    parts = _BETWEEN.split(text)
    pairs = [weighted(part) or (None if len(parts) > 1 else (1.0, part.strip())) for part in parts]
    found = [pair for pair in pairs if pair is not None]
    if len(found) < len(pairs):
        raise ConfigError(
            f"{setting} {text!r}: {parts[0].strip()!r} has no weight, and what follows it has one. Write "
            "WEIGHT*NAME,WEIGHT*NAME, or one NAME alone."
        )
    for weight, thing in found:
        if not thing:
            raise ConfigError(f"{setting} {text!r} names nothing where a name should stand. Write WEIGHT*NAME or NAME.")
        if not math.isfinite(weight) or weight == 0:
            raise ConfigError(
                f"{setting} {text!r} gives {thing!r} the weight {weight}: expected a finite number that is not 0. "
                "Leave out what should not count."
            )
    things = [thing for _, thing in found]
    if twice := sorted({thing for thing in things if things.count(thing) > 1}):
        raise ConfigError(f"{setting} {text!r} names {', '.join(twice)} more than once: add their weights up.")
    return found
