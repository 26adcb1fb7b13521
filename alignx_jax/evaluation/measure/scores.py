"""What a number of an evaluation is of, and what its interval and its changes are resampled from.

Shapes: B resamples, N sentences, S sums, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from alignx_jax.evaluation.measure.statistics import Resampled, average

Counts = Callable[[int], np.ndarray]
"""`statistics.bootstrap_counts` of a number of sentences."""


class Place(NamedTuple):
    """What a number is of; the fields are those of `rows.Row`."""

    measure: str
    layer: int | None = None
    direction: str | None = None
    language: str | None = None


@dataclasses.dataclass(frozen=True)
class Sums:
    """A number that is a function of sums over sentences, so that every resample has one."""

    value: float
    sums_NxS: np.ndarray
    """What each sentence adds."""
    score: Callable[[np.ndarray], np.ndarray]
    """Of sums [...,S] the number [...]."""

    def resampled(self, counts_BxN: np.ndarray) -> np.ndarray:
        """[B] the number on each resample, which has sentence n counts[b,n] times."""
        return self.score(counts_BxN @ self.sums_NxS)


@dataclasses.dataclass(frozen=True)
class Score:
    """One number of a model."""

    value: float
    n: int | None = None
    """Sentences or items of each language or direction."""
    parts: tuple[Sums, ...] = ()
    """What it is the mean of; none where it has no interval, or one of its own."""
    ends: tuple[float, float] | None = None
    """An interval of its own."""
    unit: Hashable = None
    """Numbers of different units, such as perplexities of different tokens, are not compared."""

    def resampled(self, counts: Counts) -> Resampled | None:
        """On every resample of its sentences; numbers of the same sentences have the same resamples."""
        if not self.parts:
            return None
        found = (Resampled(p.value, p.resampled(counts(len(p.sums_NxS)).astype(np.float64))) for p in self.parts)
        return average(found)


def mean_of(values_N: np.ndarray) -> Sums:
    """The mean over sentences or items."""
    values_Nx1 = np.asarray(values_N, np.float64)[:, None]
    return Sums(float(values_Nx1.mean()), values_Nx1, lambda sums: sums[..., 0] / len(values_Nx1))


def of_sums(sums: Sums, unit: Hashable = None) -> Score:
    return Score(sums.value, len(sums.sums_NxS), (sums,), unit=unit)


def mean(scores: Iterable[Score], unit: Hashable = None) -> Score:
    """The mean of several of one part each, such as those of languages; resampled where all of them are."""
    scores = list(scores)
    parts = tuple(part for score in scores for (part,) in [score.parts]) if all(s.parts for s in scores) else ()
    counted = {score.n for score in scores}
    n = counted.pop() if len(counted) == 1 else None
    return Score(float(np.mean([score.value for score in scores])), n, parts, unit=unit)


def with_mean(of: Mapping[str, Score], measure: str) -> dict[Place, Score]:
    """The scores of languages, and their mean."""
    found = {Place(measure, language=code): score for code, score in of.items()}
    return found | {Place(measure): mean(of.values())} if of else {}
