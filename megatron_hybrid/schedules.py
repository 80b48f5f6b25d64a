"""Settings that change over training, as text on the command line and as a number at each step.

    constant                     the setting's own value V
    linear:FROM:STEPS            FROM at step 0, V from STEPS on, straight between
    cosine:FROM:STEPS            likewise, along half a cosine: slow, fast, slow
    steps:VALUE@STEP,VALUE@STEP  V, and from each STEP on the VALUE before it

A step counts optimizer steps that are done. Standard library only: settings are validated before anything is loaded.
"""

import math
from collections.abc import Callable

from megatron_hybrid.errors import ConfigError

FORMS = "constant, linear:FROM:STEPS, cosine:FROM:STEPS or steps:VALUE@STEP,VALUE@STEP"


def schedule(name: str, text: str, value: float) -> Callable[[int], float]:
    """The value of setting `name` at each step; `value` is what the setting itself says.

    Raises:
        ConfigError: the text is none of the forms, or its numbers are out of order.
    """
    shape, _, rest = text.partition(":")
    try:
        if text == "constant":
            return lambda step: value
        if shape in ("linear", "cosine"):
            start, steps = rest.split(":")
            return _ramp(shape, float(start), value, int(steps))
        if shape == "steps":
            pairs = [pair.split("@") for pair in rest.split(",")]
            return _stairs(value, [(int(at), float(number)) for number, at in pairs])
    except ValueError as error:
        raise ConfigError(f"{name}_schedule {text!r} cannot be read ({error}): write {FORMS}.") from error
    raise ConfigError(f"{name}_schedule {text!r} has no shape of {FORMS}.")


def _ramp(shape: str, start: float, end: float, steps: int) -> Callable[[int], float]:
    if steps < 1:
        raise ValueError(f"{steps} steps are too few to change over")

    def at(step: int) -> float:
        share = min(step / steps, 1.0)
        if shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return start + (end - start) * share if share < 1 else end

    return at


def _stairs(value: float, stairs: list[tuple[int, float]]) -> Callable[[int], float]:
    steps = [step for step, _ in stairs]
    if steps != sorted(set(steps)):
        raise ValueError(f"steps must rise, got {steps}")

    def at(step: int) -> float:
        return next((number for first, number in reversed(stairs) if step >= first), value)

    return at
