"""The settings of the study of training: what all its runs share, under a name.

A world is a module with

    TASKS, WRONG, REWARDS             its tasks, those of them that the teacher does not know, its rewards by name
    make(folder, setting)             tokenizer, `teacher` and `student` in a folder, once
    flags(folder, setting)            what a run asks, how long responses get, and what they earn
    optimum(setting, knows=)          (reward, KL) of the best trade between the two, in closed form
"""

import importlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

WORLDS = {"digits": "study_world", "gym": "study_gym"}


def _shared(default: Any, text: str) -> Any:
    """A field with the help of its option."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Setting:
    """One table and one figure of the report."""

    world: str = _shared(
        "digits", "the tasks: " + ", ".join(f"{name} ({module}.py)" for name, module in WORLDS.items())
    )
    reward: str = _shared("share", "share: places that are right; exact: all of them at once (gym: its own)")
    beta: float = _shared(0.05, "weight of the KL, of all methods that have one; lambda is 1")
    teacher: tuple[float, float] = _shared(
        (0.7, 0.7), "chance that the teacher says what it believes: on the tasks it knows, on the others"
    )
    student: tuple[float, float] = _shared(
        (0.4, 0.4), "chance that the student knows the answer at the start, likewise"
    )
    damage: float = _shared(0.0, "noise on the student's matrices before the start, in deviations of each")
    digits: int = _shared(3, "of a question (digits alone)")
    steps: int = _shared(60, "optimizer steps of a run")
    batch: int = _shared(64, "rollouts of a step")
    lrs: tuple[float, ...] = _shared(
        (5e-4,), "learning rates; of several, each method's best on the seed that is not reported"
    )
    world_steps: int = _shared(600, "training steps of the world's models")

    @property
    def module(self) -> Any:
        """Its world."""
        return importlib.import_module(WORLDS[self.world])

    def world_folder(self, worlds: Path) -> Path:
        """Where its models lie: a folder for all settings that share them."""
        parts = [self.world, *([self.digits] if self.world == "digits" else [])]
        parts += ["teacher", *self.teacher, "student", *self.student]
        parts += [*(["damage", self.damage] if self.damage else []), self.world_steps]
        return worlds / "-".join(f"{part:g}" if isinstance(part, float) else str(part) for part in parts)

    @classmethod
    def read(cls, record: dict[str, Any]) -> "Setting":
        """From a settings.json."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in record.items()})


DAMAGED = Setting(reward="exact", beta=0.1, teacher=(0.95, 0.3), student=(0.9, 0.6), damage=1.0, steps=40, lrs=(1e-3,))
GYM = Setting(
    world="gym",
    reward="exact",
    beta=0.1,
    teacher=(0.95, 0.3),
    student=(0.9, 0.6),
    damage=0.8,
    steps=40,
    lrs=(5e-4, 1e-3, 2e-3),
    world_steps=800,
)
SMALL_BATCH: dict[str, Any] = {"batch": 16, "steps": 160, "lrs": (5e-4,)}
SETTINGS = {
    "share": Setting(),
    "exact": Setting(reward="exact", beta=0.1),
    "novice": Setting(student=(0.0, 0.0)),
    "damaged": DAMAGED,
    "damaged-small-batch": replace(DAMAGED, **SMALL_BATCH),
    "gym": GYM,
    "gym-small-batch": replace(GYM, **SMALL_BATCH),
}
"""The settings of the report."""
