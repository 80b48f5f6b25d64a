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
    """val/* name to [seeds, evaluations]."""

    def final(self, name: str) -> tuple[float, float]:
        """(mean, deviation over seeds) of the end."""
        of_seeds = self.values[name][:, -LAST:].mean(axis=1)
        return float(of_seeds.mean()), float(of_seeds.std(ddof=1)) if len(of_seeds) > 1 else float("nan")

    def reaches(self, score: float) -> list[float]:
        """Rollouts of each seed until the held-out reward is there, along lines; inf where it never is."""
        found = []
        for curve in self.values["val/score"]:
            above = np.flatnonzero(curve >= score)
            if not len(above):
                found.append(float("inf"))
            elif above[0] == 0:
                found.append(0.0)
            else:
                k = int(above[0])
                share = (score - curve[k - 1]) / (curve[k] - curve[k - 1])
                found.append(float(self.rollouts[k - 1] + share * (self.rollouts[k] - self.rollouts[k - 1])))
        return found


def load(out: Path, settings: dict[str, Any]) -> list[Outcome]:
    """Methods with at least one finished run, in the order of `methods`."""
    from study_training import run_folder

    from megatron_hybrid.train.curves import load as load_curves

    outcomes = []
    for name, method in methods(settings["steps"]).items():
        folders = sorted(run_folder(out, name, 0).parent.glob("seed-*"))
        runs = [load_curves(f / "metrics.jsonl").held_out for f in folders if (f / "summary.json").exists()]
        if runs:
            steps = runs[0]["val/score"][0]
            values = {key: np.stack([run[key][1] for run in runs]) for key in runs[0]}
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
        f"{settings['steps']} steps of {settings['batch']} rollouts, learning rate {settings['lr']:g}, {max(seeds)} "
        f"seeds ({min(seeds)} at least); means of the last {LAST} evaluations ± deviation over seeds. Machine: "
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}."
    )
    yield ""
    yield from markdown(
        ["held-out", "reward", *(f"{task}{' (teacher wrong)' if task in WRONG else ''}" for task in TASKS)]
        + ["KL, nats/response", "entropy, nats/token"],
        [
            [o.name, *(shown(o.final(f"val/score{task}")) for task in ("", *(f"/{t}" for t in TASKS)))]
            + [shown(o.final("val/kl_per_response")), shown(o.final("val/entropy"))]
            for o in outcomes
        ],
    )
    baselines = [outcome for outcome in outcomes if outcome.method.baseline]
    if not baselines:
        return
    best = max(baselines, key=lambda outcome: outcome.final("val/score")[0])
    score, kl = best.final("val/score")[0], best.final("val/kl_per_response")[0]
    needed = float(np.mean(best.reaches(score)))
    yield f"The best baseline is `{best.name}`: reward {score:.3f} at {kl:.2f} nats a response. Who reaches its reward:"
    yield ""
    rows = []
    for o in outcomes:
        reached = o.reaches(score)
        count = sum(np.isfinite(reached))
        mean = float(np.mean([r for r in reached if np.isfinite(r)])) if count else float("nan")
        cell = f"{mean:.0f}" if count else "never"
        share = f"{mean / needed:.2f}" if count == len(reached) and np.isfinite(needed) and needed else ""
        rows.append(
            [o.name, cell, f"{count} of {len(reached)}", share, f"{o.final('val/kl_per_response')[0] - kl:+.2f}"]
        )
    yield from markdown(["", "rollouts", "seeds", "x the best baseline", "KL at the end, beside its"], rows)
    yield "![training](training.png)"
    yield ""


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Reward and KL along rollouts, the frontier, and the end by task."""
    figure = Figure(figsize=(14.4, 8.4), layout="constrained")
    axes: list[Axes] = list(figure.subplots(2, 2).flat)
    reward, kl, frontier, tasks = axes
    width = 0.8 / len(outcomes)
    for place, (o, colour) in enumerate(zip(outcomes, COLOURS, strict=True)):
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
    """Writes results.json and training.png into `out`, and both into the README's folder; returns the tables' lines."""
    settings = json.loads((out / "settings.json").read_text())
    outcomes = load(out, settings)
    if not outcomes:
        return [f"study_training: {out} holds no finished run yet"]
    names = ("val/score", "val/kl_per_response", "val/entropy", *(f"val/score/{task}" for task in TASKS))
    records = [
        {"method": o.name, "seeds": len(o.values["val/score"]), "rollouts": int(o.rollouts[-1])}
        | {name: o.final(name) for name in names}
        for o in outcomes
    ]
    (out / "results.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    lines = list(lines_of(outcomes, settings))
    draw(outcomes, out / "training.png")
    if readme is not None:
        between(readme, "training", lines)
        (readme.parent / "training.png").write_bytes((out / "training.png").read_bytes())
    return lines
