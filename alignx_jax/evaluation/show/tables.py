"""The tables of an evaluation: models side by side, each with its change against the baseline.

One `Table` serves the page, the terminal, TensorBoard and the model card.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from alignx_jax.data import languages
from alignx_jax.data.languages import language_name
from alignx_jax.evaluation.rows import ABOVE_FLOOR, FLOOR, OTHERS, SCORED, Model, Results, direction_name
from alignx_jax.evaluation.show import doubts
from alignx_jax.evaluation.show.cells import (
    BITS,
    INDEX,
    LENGTH,
    PERPLEXITY,
    SCORE,
    SHARE,
    SHARE_OF_ERRORS,
    SHARE_OF_NEITHER,
    Cell,
    Style,
    cell,
)

_OF_TEXT = {
    "bits_per_byte": ("Bits per byte", BITS),
    "perplexity": ("Perplexity of a token", PERPLEXITY),
    "continuation_choice": ("Choice of continuation", SHARE),
    "choices": ("Two-option items", SHARE),
}
"""What is measured of the text of a language."""
_METRICS = {
    "COMET": ("COMET", INDEX),
    "off_target": ("off-target", SHARE_OF_ERRORS),
    "copy": ("copied", SHARE_OF_ERRORS),
    "empty": ("empty", SHARE_OF_ERRORS),
    "cut": ("cut off", SHARE_OF_ERRORS),
    "distinct": ("distinct outputs", SHARE_OF_NEITHER),
    FLOOR: (f"{SCORED} by chance", LENGTH),
}
"""Metrics of translation; the others, such as spBLEU with its tokenizers, are scores by their own name."""
_FIRST = (SCORED, FLOOR)


@dataclasses.dataclass(frozen=True)
class Line:
    label: str
    cells: tuple[Cell, ...] = ()
    """Empty: the label is a heading over the lines that follow."""


@dataclasses.dataclass(frozen=True)
class Table:
    title: str
    head: tuple[str, ...]
    lines: tuple[Line, ...]


def _table(results: Results, title: str, lines: Sequence[Line]) -> Table | None:
    return Table(title, ("", *(model.name for model in results.models)), tuple(lines)) if lines else None


def _section(label: str, lines: Sequence[Line]) -> list[Line]:
    return [Line(label), *lines] if lines else []


def _line(results: Results, label: str, style: Style, measure: str, layer=None, **place) -> list[Line]:
    """The line of one measure, none where no model has it; `layer` and `place` are those of `Results.find`."""
    cells = []
    for model in results.models:
        change = results.base and results.find(model, measure, layer, **place, against=results.base)
        cells.append(cell(results.find(model, measure, layer, **place), style, change))
    return [Line(label, tuple(cells))] if any(c != Cell() for c in cells) else []


def home_language(results: Results) -> str:
    """`languages.home` of what the models were measured in."""
    return languages.home(results.values("language", "perplexity"), results.sentences.pivot)


def mexa_sentences(results: Results) -> int:
    """How many sentences MEXA is taken over: it falls as they become more."""
    return next((n for n in results.values("n", "mexa")), 0)


def overview(results: Results) -> Table:
    """What a reader compares first; also the table of the terminal."""
    home = home_language(results)

    def aligned(label: str, style: Style, measure: str) -> list[Line]:
        return _line(results, label, style, measure, "aligned")

    lines = [
        Line("Closer, at the aligned layer"),
        *aligned("Retrieval, mean", SHARE, "retrieval"),
        *aligned("Retrieval, lowest language", SHARE, "retrieval_lowest"),
        *aligned(f"MEXA, {mexa_sentences(results)} sentences", SHARE, "mexa"),
        *aligned("xSIM error", SHARE_OF_ERRORS, "xsim"),
        *aligned("DALI", SHARE, "dali"),
        *aligned("DALI, strict", SHARE, "dali_strict"),
        *aligned("CKA, debiased", INDEX, "cka_debiased"),
        Line("Languages told apart"),
        *aligned("Language probe, aligned layer", SHARE_OF_NEITHER, "language_probe"),
        *_line(results, "Language probe, last layer", SHARE, "language_probe", "last"),
        *_line(results, "Matching head, balanced", SHARE, "matching_head_balanced"),
        *_section(language_name(home), _text_lines(results, home)),
        *_section("Other languages, mean", _text_lines(results, OTHERS)),
        *_section(
            "Translation",
            [line for name in (*_FIRST, "distinct", "off_target") for line in _averages(results, name)],
        ),
        *_section("Tasks", _line(results, "Accuracy, mean", SHARE, "tasks")),
    ]
    return _table(results, "Models side by side", lines)


def _text_lines(results: Results, code: str) -> list[Line]:
    """Every measure of the text of a language."""
    return [
        line
        for measure, (title, style) in _OF_TEXT.items()
        for line in _line(results, title, style, measure, language=code)
    ]


def home(results: Results) -> Table | None:
    """What a model may have forgotten: its first language."""
    code = home_language(results)
    return _table(results, language_name(code), _text_lines(results, code))


def by_language(results: Results) -> list[Table]:
    """Each measure of text, a line for each language."""
    found = [_languages(results, title, style, measure) for measure, (title, style) in _OF_TEXT.items()]
    return [table for table in found if table]


def tokenization(results: Results) -> list[Table]:
    """Share of unknown tokens and tokens a sentence, a line for each language."""
    plain = dataclasses.replace(results, baseline="")  # a tokenizer is no result of training: it has no changes
    found = (
        _languages(plain, "Unknown tokens", SHARE_OF_NEITHER, "unknown_rate"),
        _languages(plain, "Tokens a sentence", LENGTH, "tokens_per_sentence"),
    )
    return [table for table in found if table]


def _languages(results: Results, title: str, style: Style, measure: str) -> Table | None:
    codes = results.sentences.languages
    lines = [line for c in codes for line in _line(results, language_name(c), style, measure, language=c)]
    return _table(results, title, lines)


def metrics(results: Results) -> list[str]:
    """Metrics of translation, chrF++ and what chance has of it first."""
    found = dict.fromkeys(row.measure for row in results.rows if row.direction and row.layer is None)
    found.pop(ABOVE_FLOOR, None)
    return sorted(found, key=lambda name: name not in _FIRST)


def _score(results: Results, metric: str, direction: str, label: str) -> list[Line]:
    """The line of one metric of a direction or an average."""
    style = _METRICS.get(metric, (metric, SCORE))[1]
    lines = _line(results, label, style, metric, direction=direction)
    if style.better < 1:
        return lines
    # A score may rise also where a model gives every sentence the same text.
    return [
        Line(
            line.label,
            tuple(
                dataclasses.replace(c, mark=doubts.mark(results, model, direction, c.mark))
                for c, model in zip(line.cells, results.models, strict=True)
            ),
        )
        for line in lines
    ]


def metric_name(metric: str) -> str:
    return _METRICS.get(metric, (metric,))[0]


def means(results: Results) -> list[str]:
    """The directions that are means."""
    directions = doubts.directions(results)
    return [name for name in results.values("direction", "distinct") if name not in directions]


def _averages(results: Results, metric: str) -> list[Line]:
    return [
        line
        for direction in means(results)
        for line in _score(results, metric, direction, f"{metric_name(metric)}, {direction_name(direction)}")
    ]


def translation_averages(results: Results) -> Table | None:
    """Every metric, averaged over the directions out of, into and beside the pivot."""
    lines = []
    for direction in means(results):
        heading = direction_name(direction)
        lines += _section(
            heading[0].upper() + heading[1:],
            [line for name in metrics(results) for line in _score(results, name, direction, metric_name(name))],
        )
    return _table(results, "Averages over directions", lines)


def translation_directions(results: Results, metric: str) -> Table | None:
    """One metric in every direction."""
    lines = [
        line
        for direction in doubts.directions(results)
        for line in _score(results, metric, direction, direction_name(direction))
    ]
    return _table(results, metric_name(metric), lines)


def tasks(results: Results) -> Table | None:
    """Tasks of lm-evaluation-harness, with 95 % intervals of 1.96 standard errors."""
    lines = []
    for measure, higher_is_better in results.tasks.items():
        _, task, metric = measure.split("/", 2)
        rows = [row for model in results.models if (row := results.find(model, measure))]
        style = _style(max((row.value for row in rows), default=0.0), higher_is_better)
        lines += _line(results, f"{task}, {metric.split(',')[0]}", style, measure)
    return _table(results, "Tasks", lines)


def _style(greatest: float, higher_is_better: bool | None) -> Style:
    """How a metric of the harness is written: an accuracy and its like in %, all else as it is."""
    better = {True: 1, False: -1, None: 0}[higher_is_better]
    share = greatest <= 1 and better >= 0
    return Style(100, 1, "%", better) if share else Style(1, 1 if greatest > 10 else 3, "", better)


def balance(results: Results) -> Table | None:
    """How the losses of each run stood to each other before its first step; shares also after its last."""
    neutral, share = Style(1, 3, "", 0), SHARE_OF_NEITHER
    names = {"next_token": "Next token", "contrastive": "Contrastive", "language_matching": "Language matching"}

    def lines(label: str, style: Style, key: str, place: int = 0) -> list[Line]:
        cells = tuple(_balance_cell(model, style, key, place) for model in results.models)
        return [Line(label, cells)] if any(c != Cell() for c in cells) else []

    found = []
    for loss, title in names.items():
        found += _section(
            title,
            lines("Value", neutral, loss)
            + lines("Value of chance", neutral, f"chance/{loss}")
            + lines("Gradient norm", neutral, f"gradient/{loss}")
            + lines("Share of the gradient", share, f"share/{loss}")
            + lines("Share, last step", share, f"share/{loss}", -1),
        )
    found += _section(
        "Cosines at the aligned layer, as the loss sees them",
        lines("Translations", neutral, "cosine/translations")
        + lines("Other sentences", neutral, "cosine/others")
        + lines("Deviation of the others", neutral, "cosine/deviation"),
    )
    return _table(results, "The losses before the first step", found)


def _balance_cell(model: Model, style: Style, key: str, place: int) -> Cell:
    balances = model.training.balance if model.training else []
    value = balances[place].get(key) if balances else None
    return Cell(style.text(value)) if isinstance(value, float | int) else Cell()
