"""Bootstrap intervals over sentences.

What is resampled are sentence NUMBERS: a resample takes a number in every language and model at once, so that
comparisons are paired. Resamples are counts, how often each number was drawn; equal n and seed give equal resamples.

Shapes: B resamples, N sentences.
"""

from __future__ import annotations

import dataclasses

import numpy as np

_LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval; floats, or arrays of one shape."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def bootstrap_counts(n: int, resamples: int, seed: int) -> np.ndarray:
    """[B,N] int64: how often each of n sentences was drawn in n draws with replacement.

    `counts @ values_N` is the sum over each resample. A score of the corpus that is a function of sums over sentences
    (BLEU, chrF, bits per byte) is that function of `counts @ sums_Nx...`; `percentile_interval` takes it from there.
    """
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)


def percentile_interval(value: float | np.ndarray, resampled_Bx___: np.ndarray) -> Interval:
    """Percentile interval (Efron and Tibshirani 1993, chapter 13) of what has `value` on the sentences themselves.

    Args:
      value: [...] on all sentences, each once.
      resampled_Bx___: [B,...] on each resample.
    """
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(resampled_Bx___, [tail, 1 - tail], axis=0)
    return Interval(np.asarray(value, np.float64)[()], low, high)


def mean_interval(values___xN: np.ndarray, counts_BxN: np.ndarray) -> Interval:
    """Of the mean over the last axis; the fields are [...]. `values___xN` may be bool."""
    values___xN = np.asarray(values___xN, np.float64)
    resampled = np.moveaxis(values___xN @ counts_BxN.T, -1, 0) / values___xN.shape[-1]
    return percentile_interval(np.mean(values___xN, axis=-1), resampled)


def difference_interval(after___xN: np.ndarray, before___xN: np.ndarray, counts_BxN: np.ndarray) -> Interval:
    """Of mean(after) - mean(before), two models' values of the same sentences, [...,N] each: paired."""
    return mean_interval(np.asarray(after___xN, np.float64) - np.asarray(before___xN, np.float64), counts_BxN)
