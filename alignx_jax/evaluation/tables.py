"""The tables of an evaluation: models side by side, each with its change against the baseline.

One `Table` serves the page, the terminal and TensorBoard. `results` is the dictionary that `evaluation.json` holds.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

import numpy as np

from alignx_jax.data import languages
from alignx_jax.data.languages import language_name
from alignx_jax.evaluation import chance
from alignx_jax.evaluation.cells import (
    BITS,
    INDEX,
    LENGTH,
    PERPLEXITY,
    SCORE,
    SHARE,
    SHARE_OF_ERRORS,
    SHARE_OF_NEITHER,
    Number,
    Row,
    Style,
    at_layer,
    baseline,
    cell,
    get,
    row,
    value_of,
)

_TOKEN = "Perplexity of a token"
_OF_TEXT = {
    "Bits per byte": (BITS, "bits_per_byte", "perplexity", "bits_per_byte"),
    _TOKEN: (PERPLEXITY, "perplexity", "perplexity", "value"),
    "Choice of continuation": (SHARE, "continuation_choice", "continuation_choice"),
    "Two-option items": (SHARE, "choices", "choices"),
}
"""What is measured of the text of a language: style, name of its change in `intervals`, path around the language."""
_FLOOR = f"{chance.SCORED}_floor"
_METRICS = {"COMET": INDEX, **dict.fromkeys(("off_target", "copy", "empty", "cut"), SHARE_OF_ERRORS)}
_METRICS |= {"distinct": SHARE_OF_NEITHER, _FLOOR: LENGTH}
"""Metrics of translation; the others, such as spBLEU with its tokenizers, are scores."""
_METRIC_NAMES = {"off_target": "off-target", "copy": "copied", "cut": "cut off", "distinct": "distinct outputs"}
_METRIC_NAMES |= {_FLOOR: f"{chance.SCORED} by chance"}
_NO_METRICS = ("_interval", "_change", "_above_floor", "repeating")
_DIRECTION = re.compile(r"([a-z]+(?:-[A-Z][a-z]+)?)-([a-z]+(?:-[A-Z][a-z]+)?)")


@dataclasses.dataclass(frozen=True)
class Table:
    title: str
    head: tuple[str, ...]
    rows: tuple[Row, ...]


def _section(label: str, rows: Sequence[Row]) -> list[Row]:
    return [Row(label), *rows] if rows else []


def _table(results: dict, title: str, rows: Sequence[Row]) -> Table | None:
    return Table(title, ("", *(model["name"] for model in results["models"])), tuple(rows)) if rows else None


def home_language(results: dict) -> str:
    """`languages.home` of what any of the models was measured in."""
    measured = {code for model in results["models"] for code in get(model, "perplexity") or ()}
    return languages.home(measured, results["sentences"]["pivot"])


def retrieval(model: dict, code: str = "mean") -> Number:
    """At the aligned layer, mean of both directions, of a language or of all, with its interval."""
    return get(model, "intervals", "retrieval", code)


def mexa_sentences(results: dict) -> int:
    """How many sentences MEXA is taken over: it falls as they become more."""
    return results["models"][0]["alignment"]["mexa_sentences"]


def overview(results: dict) -> Table:
    """What a reader compares first; also the table of the terminal."""
    home, base = home_language(results), baseline(results)

    def interval_row(label, style, name, code="mean"):
        return row(
            results,
            label,
            style,
            lambda m: get(m, "intervals", name, code),
            lambda m: get(m, "intervals", f"{name}_change", code),
        )

    def layer_row(label, style, value):
        """What has no interval; `value` is of a model and a layer."""
        return row(
            results,
            label,
            style,
            lambda m: value(m, m["align_layer"]),
            lambda m: value(m, m["align_layer"]) - value(base, m["baseline_layer"]),
        )

    def lowest(m, layer):  # a minimum is biased downwards in resamples: it gets no interval
        return min(at_layer(m, layer, "retrieval", code) for code in m["alignment"]["retrieval"])

    rows = [
        Row("Closer, at the aligned layer"),
        *interval_row("Retrieval, mean", SHARE, "retrieval"),
        *layer_row("Retrieval, lowest language", SHARE, lowest),
        *interval_row(f"MEXA, {mexa_sentences(results)} sentences", SHARE, "mexa"),
        *interval_row("xSIM error", SHARE_OF_ERRORS, "xsim"),
        *interval_row("DALI", SHARE, "dali"),
        *interval_row("DALI, strict", SHARE, "dali_strict"),
        *layer_row("CKA, debiased", INDEX, lambda m, layer: at_layer(m, layer, "cka_debiased")),
        Row("Languages told apart"),
        *interval_row("Language probe, aligned layer", SHARE_OF_NEITHER, "language_probe"),
        *interval_row("Language probe, last layer", SHARE, "language_probe_last"),
        *row(results, "Matching head, balanced", SHARE, lambda m: get(m, "alignment", "matching_head", "balanced")),
        *_section(language_name(home), [r for title in _OF_TEXT for r in _text_row(results, title, title, home)]),
        *_section(
            "Other languages, mean",
            [
                r
                for title, (style, name, *_) in _OF_TEXT.items()
                if title != _TOKEN
                for r in interval_row(title, style, name, "others")
            ],
        ),
        *_section(
            "Translation",
            [r for name in (chance.SCORED, _FLOOR, "distinct", "off_target") for r in _averages(results, name)],
        ),
        *_section("Tasks", row(results, "Accuracy, mean", SHARE, lambda m: _mean(_accuracies(m)))),
    ]
    return _table(results, "Models side by side", rows)


def _text_row(results: dict, label: str, title: str, code: str) -> list[Row]:
    """A row of `_OF_TEXT` for one language."""
    style, kind, *path = _OF_TEXT[title]
    return row(
        results,
        label,
        style,
        lambda m: get(m, path[0], code, *path[1:]),
        lambda m: get(m, "intervals", f"{kind}_change", code),
    )


def home(results: dict) -> Table | None:
    """What a model may have forgotten: its first language."""
    code = home_language(results)
    return _table(
        results, language_name(code), [r for title in _OF_TEXT for r in _text_row(results, title, title, code)]
    )


def _mean(numbers: Iterable[Number]) -> float | None:
    found = [value_of(number) for number in numbers if number is not None]
    return float(np.mean(found)) if found else None


def _accuracies(model: dict) -> list[float]:
    """Of every task that is in no group, and of every group; of its members where it has none, each set once."""
    scores, groups = get(model, "tasks") or {}, get(model, "task_groups") or {}
    members = {name for of in groups.values() for name in of}

    def of_task(task: str) -> list[float]:
        own = [of[0] for name, of in scores.get(task, {}).items() if name.split(",")[0] == "acc"]
        return own or [value for member in groups.get(task, ()) for value in of_task(member)]

    return [value for task in dict.fromkeys([*scores, *groups]) if task not in members for value in of_task(task)]


def direction_codes(direction: str) -> tuple[str, str]:
    """`de` and `en` of `de-en`, `zh-Hant` and `x` of `zh-Hant-x`."""
    return _DIRECTION.fullmatch(direction).groups()


def direction_name(direction: str) -> str:
    """`German to English` of `de-en`, `English to others` of an average's `en-x`."""
    if direction == "x-y":
        return "between others"
    return " to ".join("others" if code == "x" else language_name(code) for code in direction_codes(direction))


def _keys(results: dict, *path: str) -> list[str]:
    """Keys that the models have at a path, each once."""
    return list(dict.fromkeys(key for model in results["models"] for key in get(model, *path) or {}))


def metrics(results: dict) -> list[str]:
    """Metrics of translation, chrF++ and what chance has of it first."""
    found = {
        name: None
        for key in _keys(results, "translation", "averages")
        for name in _keys(results, "translation", "averages", key)
    }
    first = (chance.SCORED, _FLOOR)
    return sorted((name for name in found if not name.endswith(_NO_METRICS)), key=lambda name: name not in first)


def _scores(results: dict, part: str, key: str, metric: str, label: str) -> list[Row]:
    """The row of one metric of an average or a direction."""

    def number(m):
        return get(m, "translation", part, key, f"{metric}_interval") or get(m, "translation", part, key, metric)

    def change(m):
        return get(m, "translation", part, key, f"{metric}_change")

    style = _METRICS.get(metric, SCORE)
    rows = row(results, label, style, number, change)
    if style.better < 1:
        return rows
    # A score, which may rise also where a model gives every sentence the same text.
    scores = [get(model, "translation", part, key) or {} for model in results["models"]]
    return [
        Row(
            label,
            tuple(dataclasses.replace(c, mark=chance.mark(s, c.mark)) for c, s in zip(r.cells, scores, strict=True)),
        )
        for r in rows
    ]


def metric_name(metric: str) -> str:
    return _METRIC_NAMES.get(metric, metric)


def _averages(results: dict, metric: str) -> list[Row]:
    return [
        r
        for key in _keys(results, "translation", "averages")
        for r in _scores(results, "averages", key, metric, f"{metric_name(metric)}, {direction_name(key)}")
    ]


def translation_averages(results: dict) -> Table | None:
    """Every metric, averaged over the directions out of, into and beside the pivot."""
    rows = []
    for key in _keys(results, "translation", "averages"):
        heading = direction_name(key)
        rows += _section(
            heading[0].upper() + heading[1:],
            [r for name in metrics(results) for r in _scores(results, "averages", key, name, metric_name(name))],
        )
    return _table(results, "Averages over directions", rows)


def translation_directions(results: dict, metric: str) -> Table | None:
    """One metric in every direction."""
    rows = [
        r
        for key in _keys(results, "translation", "directions")
        for r in _scores(results, "directions", key, metric, direction_name(key))
    ]
    return _table(results, metric_name(metric), rows)


def tasks(results: dict) -> Table | None:
    """Tasks of lm-evaluation-harness, with 95 % intervals of 1.96 standard errors."""
    rows = []
    for task in _keys(results, "tasks"):
        for metric in _keys(results, "tasks", task):

            def number(model, task=task, metric=metric):
                value, error, _ = get(model, "tasks", task, metric) or (None, None, None)
                return value if error is None else (value, value - 1.96 * error, value + 1.96 * error)

            greatest = max(value_of(number(m)) for m in results["models"] if number(m) is not None)
            known = (get(m, "tasks", task, metric) for m in results["models"])
            style = _style(greatest, next(found[2] for found in known if found))
            rows += row(results, f"{task}, {metric.split(',')[0]}", style, number)
    return _table(results, "Tasks", rows)


def _style(greatest: float, higher_is_better: bool | None) -> Style:
    """How a metric of the harness is written: an accuracy and its like in %, all else as it is."""
    better = {True: 1, False: -1, None: 0}[higher_is_better]
    share = greatest <= 1 and better >= 0
    return Style(100, 1, "%", better) if share else Style(1, 1 if greatest > 10 else 3, "", better)


def by_language(results: dict) -> list[Table]:
    """Each measure of text, a row for each language."""
    codes = results["sentences"]["languages"]
    found = (
        _table(results, title, [r for code in codes for r in _text_row(results, language_name(code), title, code)])
        for title in _OF_TEXT
    )
    return [table for table in found if table]


def balance(results: dict) -> Table | None:
    """How the losses of each run stood to each other before its first step; shares also after its last."""
    neutral, share = Style(1, 3, "", 0), SHARE_OF_NEITHER
    names = {"next_token": "Next token", "contrastive": "Contrastive", "language_matching": "Language matching"}

    def rows(label: str, style: Style, key: str, place: int = 0) -> list[Row]:
        found = {m["name"]: get(m, "training", "balance") for m in results["models"]}
        return row(results, label, style, lambda m: found[m["name"]][place].get(key) if found[m["name"]] else None)

    return _table(
        results,
        "The losses before the first step",
        [
            line
            for loss, title in names.items()
            for line in _section(
                title,
                rows("Value", neutral, loss)
                + rows("Value of chance", neutral, f"chance/{loss}")
                + rows("Gradient norm", neutral, f"gradient/{loss}")
                + rows("Share of the gradient", share, f"share/{loss}")
                + rows("Share, last step", share, f"share/{loss}", -1),
            )
        ]
        + _section(
            "Cosines at the aligned layer, as the loss sees them",
            rows("Translations", neutral, "cosine/translations")
            + rows("Other sentences", neutral, "cosine/others")
            + rows("Deviation of the others", neutral, "cosine/deviation"),
        ),
    )


def tokenization(results: dict) -> list[Table]:
    """Share of unknown tokens and tokens a sentence, a row for each language."""
    return [
        _table(
            results,
            title,
            [
                Row(language_name(code), tuple(cell(get(m, key, code), style) for m in results["models"]))
                for code in results["sentences"]["languages"]
            ],
        )
        for title, key, style in (
            ("Unknown tokens", "unknown_rate", SHARE_OF_NEITHER),
            ("Tokens a sentence", "tokens_per_sentence", LENGTH),
        )
    ]
