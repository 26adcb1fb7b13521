"""Rows of a model: its numbers with their intervals, and their changes from other models.

Sentence numbers are resampled, the same in every language and model, so that changes are paired. Of what is measured
at every layer, the aligned and the last layer have intervals and changes, and a change is between equal layers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from alignx_jax.evaluation.measure import statistics
from alignx_jax.evaluation.measure.measured import Measured
from alignx_jax.evaluation.measure.scores import Counts, Place, Score
from alignx_jax.evaluation.measure.statistics import Triple
from alignx_jax.evaluation.rows import Model, Row


def rows(one: Measured, others: Sequence[Measured], resamples: int, seed: int) -> list[Row]:
    """The numbers of a model, and their changes from each of `others` that has them, too."""
    counts = functools.cache(functools.partial(statistics.bootstrap_counts, resamples=resamples, seed=seed))
    compared = None, one.model.align_layer, one.model.layers
    shown = {place: score for place, score in one.scores.items() if place.layer in compared}
    found = []
    for place, score in one.scores.items():
        interval = _interval(score, counts) if place in shown else None
        found.append(_row(one.model, place, score, *(interval or (score.value, None, None))))
    for other in others:
        for place, score in shown.items():
            before = other.scores.get(counterpart(place, one.model, other.model))
            if before and before.unit == score.unit:
                found.append(_row(one.model, place, score, *_change(score, before, counts), against=other.model.name))
    return found


def counterpart(place: Place, model: Model, other: Model) -> Place:
    """What a number at the aligned layer, at the last or at none is compared with in another model."""
    if place.layer is None or model.layers == other.layers:
        return place
    return place._replace(layer=model.layer_of(other) if place.layer == model.align_layer else other.layers)


def _interval(score: Score, counts: Counts) -> Triple | None:
    if score.ends:
        return score.value, *score.ends
    resampled = score.resampled(counts)
    return resampled and resampled.triple()


def _change(now: Score, before: Score, counts: Counts) -> tuple[float | None, ...]:
    """Value, low and high; the latter None where the numbers cannot be resampled."""
    if now.ends and before.ends:
        return statistics.difference((now.value, *now.ends), (before.value, *before.ends))
    if now.parts and before.parts:
        triple = (now.resampled(counts) - before.resampled(counts)).triple()
        if triple:
            return triple
    return now.value - before.value, None, None


def _row(model: Model, place: Place, score: Score, *numbers: float | None, against: str | None = None) -> Row:
    value, low, high = (None if x is None or not math.isfinite(x) else float(x) for x in numbers)
    return Row(model.name, *place, value, low, high, score.n, against)
