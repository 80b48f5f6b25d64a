"""Tables and figures of the study of training, from the runs' own metrics.jsonl; seeds as mean and deviation.

What they say of the goals: `study_goals.py`.
"""

import itertools
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study_goals import KL, REWARD, goals, needed
from study_markdown import between, markdown
from study_runs import Method, methods
from study_settings import Setting

COLOURS = (
    *("#8C8C8C", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#0072B2"),
    *("#B79BD2", "#7A3E9D", "#F0C419", "#000000", "#A8C686", "#5E7A32"),
)
OBJECTIVE = "objective"
TUNING_SEED = 1000
"""Of the runs that choose a learning rate and are not reported."""
LAST = 3
"""Evaluations at the end of a run that its final numbers are means of."""


@dataclass(frozen=True)
class Outcome:
    """All seeds of one method."""

    name: str
    method: Method
    rollouts: np.ndarray
    """[evaluations]: responses sampled before each."""
    values: dict[str, np.ndarray]
    """val/* name to [seeds, evaluations]; `OBJECTIVE` too: reward - beta KL of the response, -J."""
    lr: float = 0.0
    tried: dict[float, float] = field(default_factory=dict)
    """Learning rates to the reward of the run that looked at them, mean of its evaluations."""

    @property
    def num_seeds(self) -> int:
        return len(self.values[REWARD])

    def final(self, name: str) -> tuple[float, float]:
        """(mean, deviation over seeds) of the end."""
        of_seeds = self.values[name][:, -LAST:].mean(axis=1)
        return float(of_seeds.mean()), float(of_seeds.std(ddof=1)) if len(of_seeds) > 1 else float("nan")

    def reaches(self, name: str, target: float) -> list[float]:
        """Rollouts of each seed until a number is this high, along lines; inf where it never is."""
        found = []
        for curve in self.values[name]:
            above = np.flatnonzero(curve >= target)
            if not len(above):
                found.append(float("inf"))
            elif above[0] == 0:
                found.append(0.0)
            else:
                k = int(above[0])
                share = (target - curve[k - 1]) / (curve[k] - curve[k - 1])
                found.append(float(self.rollouts[k - 1] + share * (self.rollouts[k] - self.rollouts[k - 1])))
        return found

    def at(self, name: str, rollouts: Sequence[float]) -> list[float]:
        """A number of each seed after so many rollouts, along lines; at its end where it has fewer."""
        return [float(np.interp(x, self.rollouts, curve)) for x, curve in zip(rollouts, self.values[name], strict=True)]


def run_folder(out: Path, method: str, lr: float, seed: int) -> Path:
    """Where a run lies."""
    return out / method.replace(" ", "_").replace(",", "").replace("'", "") / f"lr-{lr:g}" / f"seed-{seed}"


def is_done(run: Path) -> bool:
    """A run writes its summary last."""
    return (run / "summary.json").exists()


def held_out(run: Path) -> dict[str, np.ndarray]:
    """val/* name to [evaluations], and `steps`."""
    from megatron_hybrid.train.curves import load as load_curves

    curves = load_curves(run / "metrics.jsonl").held_out
    # Where a run ends at an evaluation's step, Megatron evaluates once more: the same numbers.
    steps, once = np.unique(curves[REWARD][0], return_index=True)
    return {"steps": steps} | {name: values[once] for name, (_, values) in curves.items()}


def tried_rates(out: Path, method: str, setting: Setting) -> dict[float, float]:
    """Learning rates to the mean reward of all evaluations but the first, on the seed that is not reported."""
    runs = {lr: run_folder(out, method, lr, TUNING_SEED) for lr in setting.lrs}
    return {lr: float(held_out(run)[REWARD][1:].mean()) for lr, run in runs.items() if is_done(run)}


def chosen_rate(out: Path, method: str, setting: Setting) -> float:
    """The learning rate with which a method is reported: the best of those tried, where there is a choice."""
    tried = tried_rates(out, method, setting)
    return max(tried, key=lambda lr: tried[lr]) if tried else setting.lrs[0]


def load(out: Path, setting: Setting) -> list[Outcome]:
    """Methods with at least one finished run, in the order of `methods`."""
    outcomes = []
    for name, method in methods(setting).items():
        lr = chosen_rate(out, name, setting)
        folders = sorted(run_folder(out, name, lr, 0).parent.glob("seed-*"))
        runs = [held_out(f) for f in folders if is_done(f) and f.name != f"seed-{TUNING_SEED}"]
        if runs:
            values = {key: np.stack([run[key] for run in runs]) for key in runs[0]}
            rollouts = values.pop("steps")[0] * setting.batch
            values[OBJECTIVE] = values[REWARD] - setting.beta * values[KL]
            outcomes.append(Outcome(name, method, rollouts, values, lr, tried_rates(out, name, setting)))
    return outcomes


def shown(numbers: tuple[float, float]) -> str:
    """A mean, and its deviation over seeds where there are several."""
    mean, deviation = numbers
    return f"{mean:.3f}" if np.isnan(deviation) else f"{mean:.3f} ± {deviation:.3f}"


def lines_of(outcomes: Sequence[Outcome], setting: Setting) -> Iterator[str]:
    """The tables."""
    world, seeds = setting.module, [outcome.num_seeds for outcome in outcomes]
    sure, known = ([f"{chance:.0%}" for chance in pair] for pair in (setting.teacher, setting.student))
    rates = ", ".join(f"{lr:g}" for lr in setting.lrs)
    (r_right, kl_right), (r_wrong, kl_wrong) = (world.optimum(setting, knows=knows) for knows in (True, False))
    yield (
        f"Reward: {setting.reward}, beta {setting.beta:g}"
        + (f", {setting.digits} digits" if setting.world == "digits" else "")
        + f"; on the tasks that the teacher knows, and on the others, it says what it believes with {sure[0]} and "
        f"{sure[1]}, and the student knows {known[0]} and {known[1]} at the start; {setting.steps} steps of "
        f"{setting.batch} rollouts, learning rate {rates}"
        + (f" (each method's best on seed {TUNING_SEED})" if len(setting.lrs) > 1 else "")
        + f", {max(seeds)} seeds ({min(seeds)} at least); means of the last {LAST} evaluations ± deviation over seeds. "
        f"Machine: {platform.processor() or platform.machine()}, Python {platform.python_version()}."
    )
    yield ""
    yield (
        f"Optimum of reward - beta KL in closed form, p ~ q exp(r / beta): reward {r_right:.2f} at {kl_right:.2f} nats "
        f"on the teacher's tasks, {r_wrong:.2f} at {kl_wrong:.2f} nats on the others; both together "
        f"{(r_right + r_wrong) / 2:.2f} at {(kl_right + kl_wrong) / 2:.2f}."
    )
    yield ""
    yield from markdown(
        ["held-out", "reward", *(f"{task}{' (teacher wrong)' if task in world.WRONG else ''}" for task in world.TASKS)]
        + ["KL, nats/response", "reward - beta KL", "entropy, nats/token"],
        [
            [o.name, *(shown(o.final(f"val/score{task}")) for task in ("", *(f"/{t}" for t in world.TASKS)))]
            + [shown(o.final(name)) for name in (KL, OBJECTIVE, "val/entropy")]
            for o in outcomes
        ],
    )
    if len(setting.lrs) > 1:
        yield from markdown(
            [f"mean reward of seed {TUNING_SEED} by learning rate", *(f"{lr:g}" for lr in setting.lrs)],
            [[o.name, *(_rate(o, lr) for lr in setting.lrs)] for o in outcomes],
        )
    yield from needed(outcomes)
    yield from goals(outcomes)


def _rate(outcome: Outcome, lr: float) -> str:
    if lr not in outcome.tried:
        return ""
    return f"{outcome.tried[lr]:.3f}" + (", chosen" if lr == outcome.lr else "")


def draw(outcomes: Sequence[Outcome], setting: Setting, path: Path) -> None:
    """Reward and KL along rollouts, the frontier, and the end by task."""
    world = setting.module
    figure = Figure(figsize=(14.4, 8.4), layout="constrained")
    axes: list[Axes] = list(figure.subplots(2, 2).flat)
    reward, kl, frontier, tasks = axes
    width = 0.8 / len(outcomes)
    for place, (o, colour) in enumerate(zip(outcomes, itertools.cycle(COLOURS), strict=False)):
        for ax, name in ((reward, REWARD), (kl, KL)):
            mean, spread = o.values[name].mean(axis=0), o.values[name].std(axis=0)
            ax.plot(o.rollouts, mean, color=colour, label=o.name)
            ax.fill_between(o.rollouts, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
        x, y = (o.values[name].mean(axis=0) for name in (KL, REWARD))
        frontier.plot(x, y, color=colour, linewidth=0.8, marker=".", markersize=4)
        frontier.plot(x[-1:], y[-1:], color=colour, marker="o")
        heights = [o.final(f"val/score/{task}")[0] for task in world.TASKS]
        at = np.arange(len(world.TASKS)) + (place - (len(outcomes) - 1) / 2) * width
        tasks.bar(at, heights, 0.95 * width, color=colour)
    reward.set(xlabel="rollouts", ylabel="held-out reward", title="reward (band: deviation over seeds)")
    kl.set(xlabel="rollouts", ylabel="held-out KL to the teacher, nats/response", title="KL")
    frontier.set(xlabel="KL, nats/response", ylabel="held-out reward", title="frontier (dot: the end)")
    tasks.set(ylabel="held-out reward", title="by task")
    labels = [f"{task}\n(teacher wrong)" if task in world.WRONG else task for task in world.TASKS]
    tasks.set_xticks(range(len(labels)), labels)
    figure.legend(*reward.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def write_report(out: Path, readme: Path | None) -> list[str]:
    """Writes results.json and a figure into `out`, and both into the README's folder; returns the tables' lines."""
    setting = Setting.read(json.loads((out / "settings.json").read_text()))
    outcomes = load(out, setting)
    if not outcomes:
        return [f"study_training: {out} holds no finished run yet"]
    tasks = (f"val/score/{task}" for task in setting.module.TASKS)
    names = (REWARD, OBJECTIVE, KL, "val/entropy", *tasks)
    records = [
        {"method": o.name, "lr": o.lr, "seeds": o.num_seeds, "rollouts": int(o.rollouts[-1])}
        | {name: o.final(name) for name in names}
        for o in outcomes
    ]
    (out / "results.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    picture = f"{out.name}.png"
    lines = [*lines_of(outcomes, setting), f"![{out.name}]({picture})"]
    draw(outcomes, setting, out / picture)
    if readme is not None:
        between(readme, out.name, lines)
        (readme.parent / picture).write_bytes((out / picture).read_bytes())
    return lines
