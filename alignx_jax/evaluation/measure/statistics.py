"""Bootstrap intervals over sentences.

What is resampled are sentence NUMBERS: a resample takes a number in every language and model at once, so that
comparisons are paired. Resamples are counts, how often each number was drawn; equal n and seed give equal resamples.

Shapes: B resamples, N sentences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

_LEVEL = 0.95

Triple = tuple[float, float, float]
"""A value, and the ends of its 95 % interval."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval; floats, or arrays of one shape."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclasses.dataclass(frozen=True)
class Resampled:
    """A score on the sentences themselves and on every resample of them.

    Scores are subtracted and averaged resample by resample: where their resamples are the same sentence numbers, the
    interval of what comes out is that of a paired comparison.
    """

    value: np.ndarray
    """[...] on all sentences, each once."""
    resampled_Bx___: np.ndarray
    """[B,...] on each resample; NaN where it is not defined, such as a rate of what none of the sentences has."""

    def __sub__(self, other: Resampled) -> Resampled:
        return Resampled(self.value - other.value, self.resampled_Bx___ - other.resampled_Bx___)

    def interval(self) -> Interval:
        """Percentile interval (Efron and Tibshirani 1993, chapter 13) over the resamples on which it is defined."""
        tail = (1 - _LEVEL) / 2
        low, high = np.nanquantile(self.resampled_Bx___, [tail, 1 - tail], axis=0)
        return Interval(np.asarray(self.value, np.float64)[()], low, high)

    def triple(self) -> Triple | None:
        """Value, low and high of a single number; None where it is defined on no resample."""
        if np.all(np.isnan(self.resampled_Bx___)):
            return None
        interval = self.interval()
        return float(interval.value), float(interval.low), float(interval.high)


def bootstrap_counts(n: int, resamples: int, seed: int) -> np.ndarray:
    """[B,N] int64: how often each of n sentences was drawn in n draws with replacement.

    `counts @ values_N` is the sum over each resample. A score of the corpus that is a function of sums over sentences
    (BLEU, chrF, bits per byte) is that function of `counts @ sums_Nx...`.
    """
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)


def mean(values___xN: np.ndarray, counts_BxN: np.ndarray) -> Resampled:
    """The mean over the last axis. `values___xN` may be bool."""
    values___xN = np.asarray(values___xN, np.float64)
    resampled = np.moveaxis(values___xN @ counts_BxN.T, -1, 0) / values___xN.shape[-1]
    return Resampled(np.mean(values___xN, axis=-1), resampled)


def average(scores: Iterable[Resampled]) -> Resampled:
    """The mean of several scores, such as those of languages, on each resample."""
    scores = list(scores)
    return Resampled(
        np.mean([score.value for score in scores], axis=0),
        np.mean([score.resampled_Bx___ for score in scores], axis=0),
    )


def difference(now: Triple, before: Triple) -> Triple:
    """now - before of independent samples, each with its interval; too wide for the same items.

    The square-and-add rule of Newcombe (1998, Statistics in Medicine 17, 873-890, method 10).
    """
    (value, low, high), (value_0, low_0, high_0) = now, before
    change = value - value_0
    return change, change - np.hypot(value - low, high_0 - value_0), change + np.hypot(high - value, value_0 - low_0)
