"""What the numbers say, in words no stronger than their intervals."""

from __future__ import annotations

import dataclasses

from alignx_jax.data.languages import language_name
from alignx_jax.evaluation.rows import SCORED, Model, Results, Row, direction_name
from alignx_jax.evaluation.show import cells, doubts, tables
from alignx_jax.evaluation.show.cells import BITS, SCORE, SHARE, Style

UNDECIDED = "no difference that this test can tell"
_UNWRITTEN = 0.01  # share of unknown tokens from which a language is warned of
_COLLAPSED_COSINE = 0.99  # mean cosine of random pairs from which a model is warned of
_COLLAPSED_VARIANCE = 0.1  # total variance, as a share of the baseline's, below which it is, too
_SATURATED = 0.995  # accuracy of the probe from which it tells nothing of two models


@dataclasses.dataclass(frozen=True)
class Answer:
    """The number that answers one of the reader's questions."""

    question: str
    """Empty for a single model, of which only the measure is given."""
    measure: str
    number: str
    """The signed change against the baseline; of a single model, the value."""
    interval: str
    """`[low, high]`; empty where none was computed."""
    mark: str
    """Of a change with an interval: better, worse, same, or chance (see `cells.Cell`)."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """About one model."""

    model: str
    against: str
    """What it is compared with; empty for a single model."""
    answers: tuple[Answer, ...]
    text: str

    @property
    def title(self) -> str:
        return f"{self.model} against {self.against}" if self.against else self.model


@dataclasses.dataclass(frozen=True)
class _Question:
    question: str
    measure: str
    subject: str
    """Begins the sentence about it."""
    style: Style
    unit: str
    now: Row
    before: Row | None = None
    """The baseline's."""
    change: Row | None = None
    direction: str = ""
    """Of a score of translation."""


def verdicts(results: Results) -> list[Verdict]:
    """One for every model that is compared with the baseline, and for every one that has a control, against that; of
    a single model, what it measures."""
    if results.base is None:
        return [_alone(results, results.models[0])]
    return [_compared(results, results.base, model) for model in results.compared()] + of_losses(results)


def of_losses(results: Results) -> list[Verdict]:
    """One for every model that has a control, from which only the pair losses tell it apart."""
    found = []
    for names in results.controls:
        pair = results.against_control(names)
        control, model = pair.models
        one = _compared(pair, control, model)
        text = f"What the pair losses did, apart from what training on the data did ({control.name}): {one.text}"
        found.append(dataclasses.replace(one, text=text))
    return found


def change_sentence(subject: str, style: Style, before: Row, now: Row, change: Row, unit: str = "") -> str:
    """`Retrieval rose from 0.7% to 3.7% (+3.0 points, 95% interval 2.4 to 3.6).`, or what can be said instead.

    Args:
      unit: what the change is counted in.
    """
    ends = f"from {style.text(before.value)} to {style.text(now.value)}"
    amount = f"{style.signed(change.value)} {unit}".strip()
    if change.interval is None:
        return f"{subject} went {ends} ({amount}; no interval was computed)."
    low, high = (f"{style.scale * end:.{style.digits}f}" for end in change.interval)
    test = f"({amount}, 95% interval {low} to {high})"
    if change.low <= 0 <= change.high:
        return f"{subject} went {ends} {test}: {UNDECIDED}."
    return f"{subject} {'rose' if change.value > 0 else 'fell'} {ends} {test}."


def warnings(results: Results) -> list[str]:
    """What a reader has to know before the numbers: languages that a tokenizer cannot write, vectors that may have
    become one, layers that differ."""
    return [*_unwritten(results), *_repeating(results), *_collapsed(results), *_other_layers(results)]


def _repeating(results: Results) -> list[str]:
    """Models that translate many sentences alike."""
    found = []
    for model in results.models:
        if shares := doubts.repeating(results, model):
            fewest = min(shares, key=shares.get)
            found.append(
                f"{model.name} gives most sentences a text that another one gets, too, in {len(shares)} of "
                f"{len(doubts.directions(results))} directions (fewest distinct outputs: {direction_name(fewest)}, "
                f"{SHARE.text(shares[fewest])}): its scores there are no translation."
            )
    return found


def _collapsed(results: Results) -> list[str]:
    """Models whose sentences are hardly apart at the aligned layer: retrieval can rise while they become one."""
    base, found = results.base, []
    for model in results.models:
        signs = []
        cosine = results.find(model, "random_cosine", "aligned")
        compared = base is not None and model is not base
        if cosine and cosine.value >= _COLLAPSED_COSINE:
            before = results.find(base, "random_cosine", model.layer_of(base)) if compared else None
            of_base = f" ({base.name}: {before.value:.3f})" if before else ""
            signs.append(f"the mean cosine of different sentences is {cosine.value:.3f}{of_base}")
        if compared and model.layers == base.layers:
            now, before = (results.find(m, "total_variance", model.align_layer) for m in (model, base))
            if now and before and now.value < _COLLAPSED_VARIANCE * before.value:
                signs.append(f"the total variance is {SHARE.text(now.value / before.value)} of that of {base.name}")
        if signs:
            found.append(
                f"{model.name} may have collapsed at its aligned layer {model.align_layer}: {', and '.join(signs)}. "
                "Retrieval can rise all the same."
            )
    return found


def _other_layers(results: Results) -> list[str]:
    """Models whose change is not the difference of the two values that are shown, or not of equal layers."""
    base, found = results.base, []
    for model in results.compared():
        name, layer, before = model.name, model.align_layer, model.layer_of(base)
        if model.layers != base.layers:
            found.append(
                f"{name} has {model.layers} layers and {base.name} {base.layers}: what is measured at the "
                f"aligned layer is of layer {layer} in the one and of layer {before} in the other."
            )
        elif before != base.align_layer:
            found.append(
                f"{name} is measured at its aligned layer {layer}, {base.name} at layer {base.align_layer}; the "
                f"changes of {name} are from layer {before} of {base.name}."
            )
    return found


def _unwritten(results: Results) -> list[str]:
    found: dict[tuple[str, str], list[str]] = {}
    for model in results.models:
        for code in results.sentences.languages:
            row = results.find(model, "unknown_rate", language=code)
            if row and row.value >= _UNWRITTEN:
                found.setdefault((code, SHARE.text(row.value)), []).append(model.name)
    return [
        f"{rate} of the tokens of {language_name(code)} are unknown to the tokenizer of {', '.join(models)}: "
        "numbers of this language say little."
        for (code, rate), models in found.items()
    ]


def _questions(results: Results, model: Model, base: Model | None) -> list[_Question]:
    """What is asked of every model, where it was measured; `before` and `change` are of the baseline."""
    home, pivot = tables.home_language(results), results.sentences.pivot
    name = language_name(home)
    others = len(results.values("language", "retrieval"))
    perplexities = [results.find(m, "perplexity", language=home) for m in (base, model) if m]
    written = " to ".join(f"{row.value:,.1f}" for row in perplexities if row)
    asked = [
        (
            "Languages closer?",
            "retrieval, points" if base else "retrieval",
            f"Retrieval between {language_name(pivot)} and {others} other {'language' if others == 1 else 'languages'} "
            f"at the aligned layer ({model.align_layer} of {model.layers})",
            SHARE,
            "points",
            {"measure": "retrieval", "layer": model.align_layer},
        ),
        (
            f"{name} kept?",
            "bits per byte",
            f"{name} text in bits per byte (less is better; perplexity {written})",
            BITS,
            "",
            {"measure": "bits_per_byte", "language": home},
        ),
    ]
    for direction in tables.means(results):
        way = direction_name(direction)
        asked.append(
            (
                "Translates better?",
                f"{SCORED}, {way}",
                f"{SCORED} of translation ({way})",
                SCORE,
                "",
                {"measure": SCORED, "direction": direction},
            )
        )
    found = []
    for *words, place in asked:
        now, before, change = results.find(model, **place), None, None
        if base:
            layer = {"layer": model.layer_of(base)} if "layer" in place else {}
            before = results.find(base, **(place | layer))
            change = results.find(model, **place, against=base)
        if now and (base is None or (before and change)):
            found.append(_Question(*words, now, before, change, place.get("direction", "")))
    return found


def _besides(results: Results, model: Model, question: _Question) -> str:
    """A sentence more, with a space before it."""
    text = doubts.sentence(results, model, question.direction) if question.direction else ""
    return f" {text}" if text else ""


def _compared(results: Results, base: Model, model: Model) -> Verdict:
    answers, sentences = [], []
    for q in _questions(results, model, base):
        mark = cells.mark(q.change, q.style)
        if q.direction:
            mark = doubts.mark(results, model, q.direction, mark)
        signed, interval = q.style.signed(q.change.value), q.style.interval(q.change)
        answers.append(Answer(q.question, q.measure, signed, interval, mark))
        text = change_sentence(q.subject, q.style, q.before, q.now, q.change, q.unit)
        sentences.append(text + _besides(results, model, q))
    sentences[1:1] = _told_apart(results, base, model)
    return Verdict(model.name, base.name, tuple(answers), " ".join(sentences))


def _told_apart(results: Results, base: Model, model: Model) -> list[str]:
    """Whether languages diverge at the last layer: by the probe, or where that is at its ceiling by what varies."""
    last, before = (results.find(m, "language_probe", "last") for m in (model, base))
    share, old = (results.find(m, "language_variance", "last") for m in (model, base))
    if not (last and before and share and old):
        return []
    text = (
        f"A linear probe tells the languages apart at the last layer for {SHARE.text(last.value)} of sentences "
        f"({base.name}: {SHARE.text(before.value)})"
    )
    if min(last.value, before.value) < _SATURATED:
        return [f"{text}."]
    return [
        f"{text}: it is saturated and tells nothing of their difference; of the variance of all vectors there, "
        f"{SHARE.text(share.value)} lies between languages ({base.name}: {SHARE.text(old.value)})."
    ]


def _alone(results: Results, model: Model) -> Verdict:
    questions = _questions(results, model, None)
    answers = (Answer("", q.measure, q.style.text(q.now.value), q.style.interval(q.now), "") for q in questions)
    facts = [
        f"{q.subject}: {' '.join(filter(None, (q.style.text(q.now.value), q.style.interval(q.now))))}."
        + _besides(results, model, q)
        for q in questions
    ]
    share = SHARE.text(1 / results.sentences.count)
    text = f"One model, so there is no before and after. {' '.join(facts)} Chance for retrieval is {share}."
    return Verdict(model.name, "", tuple(answers), text)
