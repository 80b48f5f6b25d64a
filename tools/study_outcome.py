"""Tables and figures of the study of training, from the runs' own metrics.jsonl; seeds as mean and deviation."""

import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from study_markdown import between, markdown
from study_runs import Method, methods
from study_world import TASKS, WRONG

COLOURS = ("#8C8C8C", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#0072B2", "#000000")
OBJECTIVE = "objective"
GAIN = 0.9
"""Share of what the best baseline gains that is to be reached: its very end would be a matter of noise."""
LEAST = 0.05
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


def load(out: Path, settings: dict[str, Any]) -> list[Outcome]:
    """Methods with at least one finished run, in the order of `methods`."""
    from study_training import run_folder

    from megatron_hybrid.train.curves import load as load_curves

    outcomes = []
    for name, method in methods(settings["steps"], settings["beta"]).items():
        folders = sorted(run_folder(out, name, 0).parent.glob("seed-*"))
        runs = [load_curves(f / "metrics.jsonl").held_out for f in folders if (f / "summary.json").exists()]
        if runs:
            # Where a run ends at an evaluation's step, Megatron evaluates once more: the same numbers.
            steps, once = np.unique(runs[0]["val/score"][0], return_index=True)
            values = {key: np.stack([run[key][1][once] for run in runs]) for key in runs[0]}
            values[OBJECTIVE] = values["val/score"] - settings["beta"] * values["val/kl_per_response"]
            outcomes.append(Outcome(name, method, steps * settings["batch"], values))
    return outcomes


def shown(numbers: tuple[float, float]) -> str:
    """A mean, and its deviation over seeds where there are several."""
    mean, deviation = numbers
    return f"{mean:.3f}" if np.isnan(deviation) else f"{mean:.3f} ± {deviation:.3f}"


def lines_of(outcomes: Sequence[Outcome], settings: dict[str, Any]) -> Iterator[str]:
    """The tables."""
    seeds = [len(outcome.values["val/score"]) for outcome in outcomes]
    yield (
        f"Reward: {settings['reward']}, beta {settings['beta']:g}; student knows {settings['knows']:.0%} of the digits "
        f"at the start; {settings['steps']} steps of {settings['batch']} rollouts, learning rate {settings['lr']:g}, "
        f"{max(seeds)} seeds ({min(seeds)} at least); means of the last {LAST} evaluations ± deviation over seeds. "
        f"Machine: {platform.processor() or platform.machine()}, Python {platform.python_version()}."
    )
    yield ""
    yield from markdown(
        ["held-out", "reward", *(f"{task}{' (teacher wrong)' if task in WRONG else ''}" for task in TASKS)]
        + ["KL, nats/response", "reward - beta KL", "entropy, nats/token"],
        [
            [o.name, *(shown(o.final(f"val/score{task}")) for task in ("", *(f"/{t}" for t in TASKS)))]
            + [shown(o.final(name)) for name in ("val/kl_per_response", OBJECTIVE, "val/entropy")]
            for o in outcomes
        ],
    )
    if any(outcome.method.baseline for outcome in outcomes):
        yield from needed(outcomes)


def needed(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Rollouts until most of the best baseline's gain is there, of reward and of the objective."""
    columns: list[list[str]] = []
    for name, what in (("val/score", "reward"), (OBJECTIVE, "reward - beta KL")):
        best = max((o for o in outcomes if o.method.baseline), key=lambda o: o.final(name)[0])
        start = float(best.values[name][:, 0].mean())
        if best.final(name)[0] - start < LEAST:
            yield f"No baseline gains {LEAST} in {what}: rollouts to reach it would count noise."
            yield ""
            continue
        target = start + GAIN * (best.final(name)[0] - start)
        unit = float(np.mean(best.reaches(name, target)))
        cells = []
        for o in outcomes:
            reached = np.array(o.reaches(name, target))
            count = int(np.isfinite(reached).sum())
            mean = float(reached.mean()) if count == len(reached) else float("inf")
            share = f" ({mean / unit:.2f} x)" if np.isfinite(mean) and np.isfinite(unit) and unit else ""
            cells.append(f"{mean:.0f}{share}" if np.isfinite(mean) else f"{count} of {len(reached)} seeds reach it")
        columns.append([f"rollouts to {what} {target:.3f}, {GAIN:.0%} of the gain of `{best.name}`", *cells])
    if columns:
        headers, *rows = zip(*columns, strict=True)
        yield from markdown(["", *headers], [[o.name, *row] for o, row in zip(outcomes, rows, strict=True)])


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Reward and KL along rollouts, the frontier, and the end by task."""
    figure = Figure(figsize=(14.4, 8.4), layout="constrained")
    axes: list[Axes] = list(figure.subplots(2, 2).flat)
    reward, kl, frontier, tasks = axes
    width = 0.8 / len(outcomes)
    for place, (o, colour) in enumerate(zip(outcomes, COLOURS, strict=False)):
        for ax, name in ((reward, "val/score"), (kl, "val/kl_per_response")):
            mean, spread = o.values[name].mean(axis=0), o.values[name].std(axis=0)
            ax.plot(o.rollouts, mean, color=colour, label=o.name)
            ax.fill_between(o.rollouts, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
        x, y = (o.values[name].mean(axis=0) for name in ("val/kl_per_response", "val/score"))
        frontier.plot(x, y, color=colour, linewidth=0.8, marker=".", markersize=4)
        frontier.plot(x[-1:], y[-1:], color=colour, marker="o")
        heights = [o.final(f"val/score/{task}")[0] for task in TASKS]
        at = np.arange(len(TASKS)) + (place - (len(outcomes) - 1) / 2) * width
        tasks.bar(at, heights, 0.95 * width, color=colour)
    reward.set(xlabel="rollouts", ylabel="held-out reward", title="reward (band: deviation over seeds)")
    kl.set(xlabel="rollouts", ylabel="held-out KL to the teacher, nats/response", title="KL")
    frontier.set(xlabel="KL, nats/response", ylabel="held-out reward", title="frontier (dot: the end)")
    tasks.set(ylabel="held-out reward", title="by task")
    tasks.set_xticks(range(len(TASKS)), [f"{t}\n(teacher wrong)" if t in WRONG else t for t in TASKS])
    reward.legend(fontsize=7)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def write_report(out: Path, readme: Path | None) -> list[str]:
    """Writes results.json and a figure into `out`, and both into the README's folder; returns the tables' lines."""
    settings = json.loads((out / "settings.json").read_text())
    outcomes = load(out, settings)
    if not outcomes:
        return [f"study_training: {out} holds no finished run yet"]
    names = ("val/score", OBJECTIVE, "val/kl_per_response", "val/entropy", *(f"val/score/{task}" for task in TASKS))
    records = [
        {"method": o.name, "seeds": len(o.values["val/score"]), "rollouts": int(o.rollouts[-1])}
        | {name: o.final(name) for name in names}
        for o in outcomes
    ]
    (out / "results.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    lines = [*lines_of(outcomes, settings), f"![{out.name}]({out.name}.png)"]
    picture = f"{out.name}.png"
    draw(outcomes, out / picture)
    if readme is not None:
        between(readme, out.name, lines)
        (readme.parent / picture).write_bytes((out / picture).read_bytes())
    return lines
