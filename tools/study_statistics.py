"""What batches of gradients say of an estimator: trace of the covariance, bias, cosine, each with a bootstrap interval.

Of B independent batches g_i and N of a reference r_j only inner products are needed. With weights w_i of the batches
(all 1; in the bootstrap, how often each was drawn):

    S  = mean of |g_i|^2                                     E |g|^2
    U  = mean of <g_i, g_j> over pairs of different batches  |E g|^2, unbiased: no batch meets itself
    C  = mean of <g_i, r_j>                                  <E g, dJ>
    R  = as U, of the reference (its |r|^2 where it is exact)

    variance = S - U       bias^2 = U - 2 C + R       cosine = C / sqrt(U R)       noise to signal = variance / U

The variance at all 1 is the usual one. Estimators share their rollouts, so ratios are bootstrapped together. numpy
alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Value:
    """A statistic with its bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Moments:
    """S, U, C, R of one estimator: the value first, then one of each resample; [1 + RESAMPLES] fp64."""

    second: np.ndarray
    signal: np.ndarray
    cross: np.ndarray
    reference: np.ndarray

    @property
    def variance(self) -> np.ndarray:
        return self.second - self.signal

    @property
    def squared_bias(self) -> np.ndarray:
        return self.signal - 2 * self.cross + self.reference

    @property
    def bias(self) -> np.ndarray:
        """As a share of the reference's norm; the root keeps the sign of what noise made negative."""
        return signed_root(self.squared_bias / self.reference)

    @property
    def cosine(self) -> np.ndarray:
        """NaN where the noise hides the mean itself."""
        with np.errstate(invalid="ignore"):
            return self.cross / np.sqrt(self.signal * self.reference)

    @property
    def noise_to_signal(self) -> np.ndarray:
        return np.where(self.signal > 0, self.variance / np.where(self.signal > 0, self.signal, 1.0), np.nan)


def signed_root(values: np.ndarray) -> np.ndarray:
    """sqrt of the size, with the sign."""
    return np.sign(values) * np.sqrt(np.abs(values))


def combined(parts: np.ndarray, names: list[str], coefficients: Mapping[str, float]) -> np.ndarray:
    """[B, layers, width]: the estimator made of these parts [B, names, layers, width]."""
    used = [(names.index(name), value) for name, value in coefficients.items() if value]
    return np.tensordot(parts[:, [i for i, _ in used]], np.array([v for _, v in used], parts.dtype), axes=(1, 0))


@lru_cache
def resamples(count: int, seed: int = 0) -> np.ndarray:
    """[1 + RESAMPLES, count] fp64: how often each batch counts; the first row is all 1."""
    draw = np.random.default_rng(seed)
    return np.vstack([np.ones((1, count)), draw.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)])


def moments(gradients: np.ndarray, reference: np.ndarray, of_reference: np.ndarray | None = None) -> Moments:
    """Of one estimator's batches [B, d] and the reference's [N, d].

    of_reference  what `reference_signal` gives, where it is known already
    """
    w, v = resamples(len(gradients)), resamples(len(reference), seed=1)
    second, signal = _self_moments(_products(gradients, gradients), w)
    cross = np.einsum("kj,kj->k", w @ _products(gradients, reference), v) / (len(gradients) * len(reference))
    return Moments(second, signal, cross, reference_signal(reference) if of_reference is None else of_reference)


def reference_signal(reference: np.ndarray) -> np.ndarray:
    """R of the reference's batches [N, d]; N = 1 is an exact one."""
    v, gram = resamples(len(reference), seed=1), _products(reference, reference)
    return np.full(len(v), gram[0, 0]) if len(reference) == 1 else _self_moments(gram, v)[1]


def _products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Inner products [A, B] fp64 of vectors in their own precision: what is subtracted later is seldom near equal."""
    return (a @ b.T).astype(np.float64)


def _self_moments(gram: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(S, U) for each row of weights."""
    norms, count = np.diag(gram), len(gram)
    with_itself = w**2 @ norms
    pairs = np.einsum("ki,ki->k", w @ gram, w) - with_itself
    num_pairs = count**2 - (w**2).sum(axis=1)  # 0 where one batch was drawn again and again
    return w @ norms / count, np.divide(pairs, num_pairs, out=np.full_like(pairs, np.nan), where=num_pairs > 0)


def interval(values: np.ndarray) -> Value:
    """The first value, with the percentiles of the others; NaN resamples are left out."""
    known = values[1:][np.isfinite(values[1:])]
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(known, [tail, 100 - tail]) if len(known) else (np.nan, np.nan)
    return Value(float(values[0]), float(low), float(high))
