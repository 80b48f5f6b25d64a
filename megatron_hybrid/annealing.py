"""Settings that change over training, as text on the command line and as a number at each step.

    constant                     the setting's own value V
    linear:FROM:STEPS            FROM + (V - FROM) t,  t = min(step / STEPS, 1)
    cosine:FROM:STEPS            FROM + (V - FROM) (1 - cos(pi t)) / 2:  slow, fast, slow
    steps:VALUE@STEP,VALUE@STEP  V, and from each STEP on the VALUE before it

A step counts optimizer steps that are done. Standard library only: settings are validated before anything is loaded.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_hybrid.errors import ConfigError

FORMS = "constant, linear:FROM:STEPS, cosine:FROM:STEPS or steps:VALUE@STEP,VALUE@STEP"


@dataclass(frozen=True)
class Annealed:
    """One setting over training."""

    at: Callable[[int], float]
    """Its value once so many steps are done."""
    turning_points: tuple[int, ...]
    """Steps between which it only rises or only falls, the first and one of the last included."""


def annealed(name: str, text: str, value: float) -> Annealed:
    """Setting `name` as the text of its schedule has it; `value` is what the setting itself says.

    Raises:
        ConfigError: the text is none of the forms, or its numbers are out of order.
    """
    shape, _, rest = text.partition(":")
    try:
        if text == "constant":
            return Annealed(lambda step: value, (0,))
        if shape in ("linear", "cosine"):
            start, colon, steps = rest.partition(":")
            if not colon:
                raise ValueError("STEPS is missing")
            return _ramp(shape, float(start), value, int(steps))
        if shape == "steps":
            pairs = [pair.partition("@") for pair in rest.split(",")]
            return _stairs(value, [(int(at), float(number)) for number, _, at in pairs])
    except ValueError as error:
        raise ConfigError(f"{name}_schedule {text!r} cannot be read ({error}): write {FORMS}.") from error
    raise ConfigError(f"{name}_schedule {text!r} has no shape of {FORMS}.")


def _ramp(shape: str, start: float, end: float, steps: int) -> Annealed:
    if steps < 1:
        raise ValueError(f"{steps} steps are too few to change over")

    def at(step: int) -> float:
        share = min(step / steps, 1.0)
        if shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return start + (end - start) * share if share < 1 else end

    return Annealed(at, (0, steps))


def _stairs(value: float, stairs: list[tuple[int, float]]) -> Annealed:
    steps = [step for step, _ in stairs]
    if steps != sorted(set(steps)) or steps[0] < 0:
        raise ValueError(f"steps must rise from 0 on, got {steps}")

    def at(step: int) -> float:
        return next((number for first, number in reversed(stairs) if step >= first), value)

    return Annealed(at, (0, *steps))
