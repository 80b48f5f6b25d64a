"""From logits on one rank: every contender at each type and vocabulary, and how our cost grows with both sizes."""

import statistics
from collections.abc import Callable

import numpy as np
from bench_contenders import BACKENDS, Judge, Logits, contenders, ours
from bench_measure import ALL, Contender, Record, measure, timed

SHARES = (4, 2, 1)
"""Growth is measured at a quarter, a half and all of the tokens, and of the vocabulary."""


def table(tokens: int, vocab: int, dtype: str, repeats: int, say: Callable[[str, float], None]) -> list[Record]:
    """All contenders, forward and backward, on one problem."""
    problem = Logits.draw(tokens, vocab, dtype)
    return measure(
        contenders(),
        problem,
        lambda who: Record(who.name, who.job.name, "logits", dtype, 1, vocab, tokens),
        Judge(problem).error,
        repeats,
        unit_bytes=problem.unit_bytes,
        say=lambda text, cost: say(f"{dtype}, vocabulary {vocab}: {text}", cost),
    )


def growth(tokens: int, vocab: int, repeats: int, say: Callable[[str, float], None]) -> list[Record]:
    """Time of our backends, fp32, along tokens and along the vocabulary, with the fitted exponent: 1 is linear."""
    records = []
    for backend in BACKENDS:
        who = Contender(f"ours, {backend}", ALL, ours(backend))
        for along in ("tokens", "vocabulary"):
            say(f"growth of {backend} with {along}", 2.0)
            by_token = along == "tokens"
            shapes = [(tokens // s, vocab) if by_token else (tokens, vocab // s) for s in SHARES]
            problems = [Logits.draw(*shape, "fp32") for shape in shapes]
            times: list[list[float]] = [[] for _ in shapes]
            for _ in range(repeats + 1):
                for taken, problem in zip(times, problems, strict=True):
                    taken.append(sum(timed(who, problem)))
            medians = [statistics.median(taken[1:]) for taken in times]  # the first is for warmth
            sizes = [shape[0] if by_token else shape[1] for shape in shapes]
            records.append(
                Record(
                    who.name,
                    who.job.name,
                    "growth",
                    "fp32",
                    1,
                    vocab,
                    tokens,
                    extra={"along": along, "sizes": sizes, "time_s": medians, "exponent": exponent(sizes, medians)},
                )
            )
    return records


def exponent(sizes: list[int], times_s: list[float]) -> float:
    """Slope of log time over log size."""
    return float(np.polyfit(np.log(sizes), np.log(times_s), 1)[0])
