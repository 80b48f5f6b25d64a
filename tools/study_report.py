"""Tables of the study of variance, from the batches that are there: every number between the README's markers.

A setting is a folder that `study_variance.py` filled. Rows are estimators at beta 1; ratios are of the variance, to
that of the policy gradient with the KL in the reward on the same rollouts.
"""

import json
import math
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from study_estimators import ESTIMATORS, OURS, UNIT, UNIT_RLOO, WEIGHTED
from study_markdown import between, markdown
from study_statistics import Moments, Value, combined, interval, moments, reference_signal

GOAL = 0.35
LOUDEST = 0.05
"""Share of the batches that one column leaves out: where it says another thing, few responses make all of the noise."""
FEWEST = 8
"""Batches of a setting that are worth a table."""
LAMBDAS = (0.0, 0.5, 1.0, 2.0)
SUMMARY = (
    UNIT_RLOO,
    "KL to go in the reward, RLOO",
    "paper's hybrid: sampled future",
    "ours: closed form, RLOO",
    WEIGHTED,
)


@dataclass(frozen=True)
class Measured:
    """The batches of one setting."""

    about: dict[str, Any]
    names: list[str]
    """Of the parts that every batch has."""
    parts: np.ndarray
    """[B, names, layers, width]."""
    squared_norm: np.ndarray
    """[B, names, layers], exact."""
    reference: np.ndarray
    """[N, 2, layers, width]."""
    said: dict[str, np.ndarray]
    """[B] each: reward, length, seconds."""

    @property
    def title(self) -> str:
        return f"{self.about['model']}, up to {self.about['length']} tokens"

    @property
    def exact(self) -> bool:
        return len(self.reference) == 1

    @cached_property
    def sketch_error(self) -> float:
        """Largest error of a mean squared norm that the sketch makes, relative."""
        sketched = np.square(self.parts, dtype=np.float64).sum(axis=(0, 2, 3))
        return float(np.abs(sketched / self.squared_norm.sum(axis=(0, 2)) - 1).max())

    def has(self, label: str, lam: float, discount: float) -> bool:
        """Whether the parts of this estimator were differentiated."""
        needed = {name for name, value in ESTIMATORS[label].of(lam, discount).items() if value}
        return needed <= set(self.names)

    def moments(self, label: str, lam: float, discount: float, layer: int | None = None) -> Moments:
        """Of the whole gradient, or of one layer's."""
        layers = slice(None) if layer is None else slice(layer, layer + 1)
        ours = combined(self.parts[:, :, layers], self.names, ESTIMATORS[label].of(lam, discount))
        if (lam, layer) not in self._references:
            reference = lam * self.reference[:, 0, layers] + self.reference[:, 1, layers]
            flat = reference.reshape(len(reference), -1)
            self._references[lam, layer] = flat, reference_signal(flat)
        return moments(ours.reshape(len(ours), -1), *self._references[lam, layer])

    def ratio(self, label: str, layer: int | None = None) -> Value:
        """Of the variance to that of the KL in the reward, at lambda 1 and discount 1."""
        mine, unit = (self.moments(of, 1.0, 1.0, layer).variance for of in (label, UNIT))
        return interval(mine / unit)

    def without_loudest(self) -> "Measured":
        """Without the batches in which the KL in the reward has its largest gradients, one at least: to its favour."""
        unit = combined(self.parts, self.names, ESTIMATORS[UNIT].of(1.0, 1.0))
        order = np.square(unit, dtype=np.float64).sum(axis=(1, 2)).argsort()
        kept = np.sort(order[: len(order) - math.ceil(LOUDEST * len(order))])
        return replace(self, parts=self.parts[kept], squared_norm=self.squared_norm[kept])

    @cached_property
    def _references(self) -> dict[tuple[float, int | None], tuple[np.ndarray, np.ndarray]]:
        """By lambda and layer: the reference [N, d], and R."""
        return {}


def load(folder: Path) -> Measured | None:
    """None: not enough of it is there yet."""
    batches, references = (sorted(folder.glob(f"{kind}-*.npz")) for kind in ("batch", "reference"))
    exact = folder / "exact.npz"
    if len(batches) < FEWEST or not (exact.exists() or len(references) >= FEWEST):
        return None
    read = [dict(np.load(path)) for path in batches]
    names = [str(name) for name in read[0]["names"] if all(name in batch["names"] for batch in read)]

    def ordered(batch: dict[str, np.ndarray], what: str) -> np.ndarray:
        held = list(batch["names"])
        return batch[what][[held.index(name) for name in names]]

    return Measured(
        about=json.loads((folder / "setting.json").read_text()),
        names=names,
        parts=np.stack([ordered(batch, "sketch") for batch in read]),
        squared_norm=np.stack([ordered(batch, "squared_norm") for batch in read]),
        reference=np.stack([np.load(path)["sketch"] for path in ([exact] if exact.exists() else references)]),
        said={name: np.array([batch[name] for batch in read]) for name in ("reward", "length", "seconds")},
    )


def results(measured: Measured) -> Iterator[dict[str, Any]]:
    """One record for each estimator, lambda and discount."""
    for lam in LAMBDAS:
        unit, unit_rloo = (measured.moments(of, lam, 1.0) for of in (UNIT, UNIT_RLOO))
        for label, estimator in ESTIMATORS.items():
            for discount in measured.about["discounts"] if estimator.discounted else [1.0]:
                if not measured.has(label, lam, discount):
                    continue
                found = measured.moments(label, lam, discount)
                yield {
                    "setting": measured.title,
                    "estimator": label,
                    "unbiased": estimator.unbiased and discount == 1,
                    "lambda": lam,
                    "discount": discount,
                    "variance": asdict(interval(found.variance)),
                    "ratio": asdict(interval(found.variance / unit.variance)),
                    "ratio_rloo": asdict(interval(found.variance / unit_rloo.variance)),
                    "bias": asdict(interval(found.bias)),
                    "cosine": asdict(interval(found.cosine)),
                    "noise_to_signal": asdict(interval(found.noise_to_signal)),
                }


def by_layer(measured: Measured, label: str) -> list[Value]:
    """Ratios of the variance of each layer, at lambda 1 and discount 1."""
    return [measured.ratio(label, layer) for layer in range(len(measured.about["layers"]))]


def shown(value: dict[str, float], form: str = "{:.2f}", with_interval: bool = True) -> str:
    """A statistic as a cell; empty where noise hides it."""
    if not np.isfinite(value["value"]):
        return "hidden by noise"
    text = form.format(value["value"])
    return f"{text} [{form.format(value['low'])}, {form.format(value['high'])}]" if with_interval else text


def percent(value: dict[str, float]) -> str:
    """A share of the norm of dJ with its interval."""
    return shown({name: 100 * number for name, number in value.items()}, "{:.0f}") + " %"


def lines_of(measured: Measured, records: list[dict[str, Any]]) -> Iterator[str]:
    """The tables of one setting."""
    about = measured.about
    yield f"#### {measured.title}"
    yield ""
    reference = "every response, enumerated" if measured.exact else f"{len(measured.reference)} other batches"
    yield (
        f"{about['parameters'] / 1e6:.2f} million parameters, {about['dtype']}; {about['prompts']} questions x "
        f"{about['group_size']} responses, {measured.said['length'].mean():.1f} tokens each, mean reward "
        f"{measured.said['reward'].mean():.3f}; {len(measured.parts)} batches; reference: {reference}; largest "
        f"error of a squared norm by the sketch {100 * measured.sketch_error:.1f} %; "
        f"{measured.said['seconds'].sum() / 60:.0f} minutes beside other work."
    )
    yield ""
    at_one = [r for r in records if r["lambda"] == 1 and r["discount"] == 1]
    yield from markdown(
        ["lambda 1, gamma 1", "variance, x KL in the reward", "bias, % of dJ", "cosine to dJ", "noise / signal"],
        [
            [
                r["estimator"] + ("" if r["unbiased"] else " (biased)"),
                shown(r["ratio"], "{:.3f}"),
                percent(r["bias"]),
                shown(r["cosine"], "{:.3f}", with_interval=False),
                shown(r["noise_to_signal"], "{:.2f}", with_interval=False),
            ]
            for r in at_one
        ],
    )
    lambdas = [lam for lam in LAMBDAS if any(r["lambda"] == lam for r in records)]
    yield from markdown(
        ["ours by gamma: variance (bias)", *(f"lambda {lam:g}" for lam in lambdas)],
        [
            [f"gamma {discount:g}", *(_cell(records, OURS, lam, discount) for lam in lambdas)]
            for discount in about["discounts"]
        ],
    )


def _cell(records: list[dict[str, Any]], label: str, lam: float, discount: float) -> str:
    found = [r for r in records if (r["estimator"], r["lambda"], r["discount"]) == (label, lam, discount)]
    if not found:
        return ""
    return f"{found[0]['ratio']['value']:.3f} ({100 * found[0]['bias']['value']:.0f} %)"


def goal(ratio: dict[str, float]) -> str:
    """A ratio, and what it says of the goal."""
    verdict = "met" if ratio["high"] <= GOAL else "missed" if ratio["low"] > GOAL else "open"
    return f"{shown(ratio, '{:.3f}')}, {verdict}"


def summary(settings: list[Measured], records: list[dict[str, Any]]) -> Iterator[str]:
    """All settings at lambda 1 and gamma 1, and what they say of the goal."""
    rows = []
    for measured in settings:
        mine = {
            r["estimator"]: r for r in records if (r["setting"], r["lambda"], r["discount"]) == (measured.title, 1, 1)
        }
        cells = [f"{mine[label]['ratio']['value']:.3f}" if label in mine else "" for label in SUMMARY]
        cells += [goal(mine[OURS]["ratio"]), goal(mine[OURS]["ratio_rloo"])]
        cells += [shown(asdict(measured.without_loudest().ratio(OURS)), "{:.3f}")]
        layers = by_layer(measured, OURS)
        low, high = (pick(layers, key=lambda v: v.value).value for pick in (min, max))
        rows.append([measured.title, f"{measured.said['length'].mean():.1f}", *cells, f"{low:.3f} to {high:.3f}"])
    header = [
        "variance, x KL in the reward",
        "tokens",
        *SUMMARY,
        "ours",
        "ours, x KL in the reward, RLOO",
        f"ours, without the {LOUDEST:.0%} of batches in which the KL in the reward is loudest",
        "ours, by layer",
    ]
    yield from markdown(header, rows)


def write_report(out: Path, readme: Path | None) -> list[str]:
    """Writes results.json and variance.png into `out`, and both into the README's folder; returns the tables' lines."""
    from study_plots import draw_variance

    settings = [
        found for folder in sorted(out.iterdir()) if (folder / "setting.json").exists() and (found := load(folder))
    ]
    settings.sort(key=lambda m: (m.about["model"], m.about["length"]))
    if not settings:
        return [f"study_variance: {out} holds no setting with {FEWEST} batches yet"]
    by_setting = {measured.title: list(results(measured)) for measured in settings}
    records = [record for of_setting in by_setting.values() for record in of_setting]
    (out / "results.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    lines = [f"Machine: {platform.processor() or platform.machine()}, Python {platform.python_version()}.", ""]
    lines += [*summary(settings, records), "![variance](variance.png)", ""]
    for measured in settings:
        lines += lines_of(measured, by_setting[measured.title])
    draw_variance(settings, records, out / "variance.png")
    if readme is not None:
        between(readme, "variance", lines)
        (readme.parent / "variance.png").write_bytes((out / "variance.png").read_bytes())
    return lines
