"""The record of one model: its scores with their intervals, and the intervals of their changes from the baseline.

Sentence numbers are resampled, the same in every language and model, so that changes are paired. Of what is measured
at every layer, the aligned layer counts, and a change is between equal layers.

Shapes: B resamples, N sentences.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from alignx_jax.config import EvaluationConfig
from alignx_jax.data import languages
from alignx_jax.evaluation import scoring, statistics, translation_scores
from alignx_jax.evaluation.measured import Measured
from alignx_jax.evaluation.statistics import Resampled

Counts = Callable[[int], np.ndarray]
"""`statistics.bootstrap_counts` of a number of sentences."""


def record(one: Measured, base: Measured, options: EvaluationConfig, seed: int) -> dict[str, Any]:
    """A model's part of evaluation.json (docs/evaluation.md describes it).

    Args:
      base: the model that changes are against; `one` itself for that one.
    """
    counts = functools.cache(functools.partial(statistics.bootstrap_counts, resamples=options.resamples, seed=seed))
    home = languages.home(one.text, options.pivot)
    layer, before = one.record["align_layer"], layer_of_baseline(one.record, base.record)
    text, own = _text(one, home, counts), _alignment(one, layer, counts)
    changes = {}
    if one is not base:
        changes = _changes(own, _alignment(base, before, counts)) | _changes(text, _text(base, home, counts))
        if not _same_tokens(one, base):
            del changes["perplexity_change"]
    others = {name: {"others": of["others"].triple()} for name, of in text.items() if "others" in of}
    by_language = {name: {c: s.triple() for c, s in of.items() if c != "others"} for name, of in text.items()}
    return one.record | {
        "baseline_layer": before,
        "intervals": {name: {code: s.triple() for code, s in of.items()} for name, of in own.items()}
        | others
        | changes,
        "perplexity": {
            code: {"value": p.value, "bits_per_byte": by_language["bits_per_byte"][code]}
            for code, p in one.text.items()
        },
        "continuation_choice": by_language["continuation_choice"],
        "choices": by_language["choices"] or None,
        "translation": one.translation and translation_scores.record(one.translation, base.translation, counts),
    }


def against(one: Measured, control: Measured, options: EvaluationConfig, seed: int) -> dict[str, Any]:
    """The changes of a model from another one than the baseline, each as `record` has them."""
    found = record(one, control, options, seed)

    def changes(of: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in of.items() if name.endswith("_change")}

    translated = found["translation"] and {
        part: {key: changes(of) for key, of in found["translation"][part].items()}
        for part in ("directions", "averages")
    }
    return {
        "model": one.name,
        "control": control.name,
        "baseline_layer": found["baseline_layer"],
        "intervals": changes(found["intervals"]),
        "translation": translated,
    }


def layer_of_baseline(model: Mapping[str, Any], base: Mapping[str, Any]) -> int:
    """The layer of the baseline that a model's aligned layer is compared with: the same, or, as layers of models of
    different depth are not the same, the baseline's own aligned layer."""
    return model["align_layer"] if model["layers"] == base["layers"] else base["align_layer"]


def _alignment(one: Measured, layer: int, counts: Counts) -> dict[str, dict[str, Resampled]]:
    """By measure and language, and the `mean` of languages, at a layer; of the probe at the last one too."""
    places = {name: (name, layer) for name in one.alignment} | {"language_probe_last": ("language_probe", -1)}
    found = {}
    for name, (measure, place) in places.items():
        of = {code: _mean(x_LxN[place], counts) for code, x_LxN in one.alignment[measure].items()}
        found[name] = of | {"mean": statistics.average(of.values())}
    return found


def _text(one: Measured, home: str, counts: Counts) -> dict[str, dict[str, Resampled]]:
    """By measure and language, and the mean of `others` than the home language; of perplexities no mean is taken."""
    bits = {code: _ratio(p.nll / math.log(2), p.bytes, counts) for code, p in one.text.items()}
    found = {
        "bits_per_byte": bits,
        "continuation_choice": {code: _mean(hits, counts) for code, hits in one.endings.items() if len(hits)},
        "choices": {code: _mean(hits, counts) for code, hits in one.choices.items() if len(hits)},
    }
    for of in found.values():
        if others := [score for code, score in of.items() if code != home]:
            of["others"] = statistics.average(others)
    return found | {"perplexity": {code: _perplexity(p, counts) for code, p in one.text.items()}}


def _changes(
    after: Mapping[str, Mapping[str, Resampled]], before: Mapping[str, Mapping[str, Resampled]]
) -> dict[str, dict[str, list[float]]]:
    return {
        f"{name}_change": {code: (score - before[name][code]).triple() for code, score in of.items()}
        for name, of in after.items()
    }


def _same_tokens(one: Measured, base: Measured) -> bool:
    """Do both cut every sentence into as many tokens? Only then do their perplexities of a token compare."""
    return all(np.array_equal(p.tokens, base.text[code].tokens) for code, p in one.text.items())


def _mean(values_N: np.ndarray, counts: Counts) -> Resampled:
    return statistics.mean(values_N, counts(len(values_N)))


def _ratio(numerator_N: np.ndarray, denominator_N: np.ndarray, counts: Counts) -> Resampled:
    """Of two sums over the sentences."""
    counts_BxN = counts(len(numerator_N))
    value = numerator_N.sum() / denominator_N.sum()
    return Resampled(value, (counts_BxN @ numerator_N) / (counts_BxN @ denominator_N))


def _perplexity(text: scoring.Perplexity, counts: Counts) -> Resampled:
    nats = _ratio(text.nll, text.tokens, counts)
    return Resampled(np.exp(nats.value), np.exp(nats.resampled_Bx___))
