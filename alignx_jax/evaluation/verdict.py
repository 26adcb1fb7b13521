"""What the numbers say, in words no stronger than their intervals."""

from __future__ import annotations

import dataclasses

from alignx_jax.data.languages import language_name
from alignx_jax.evaluation import cells, chance, tables
from alignx_jax.evaluation.cells import BITS, SCORE, SHARE, Number, Style, get, value_of

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
    number: Number
    before: Number
    change: Number
    scores: dict | None = None
    """Of a score of translation, all that evaluation.json has of it."""

    def mark(self) -> str:
        found = cells.mark(self.change, self.style) if self.change else ""
        return found if self.scores is None else chance.mark(self.scores, found)

    def besides(self) -> str:
        """A sentence more, with a space before it."""
        text = chance.sentence(self.scores) if self.scores else ""
        return f" {text}" if text else ""


def verdicts(results: dict) -> list[Verdict]:
    """One for every model that is compared with the baseline, and for every one that has a control, against that; of
    a single model, what it measures."""
    base = cells.baseline(results)
    if base is None:
        return [_alone(results, results["models"][0])]
    return [_compared(results, base, model) for model in results["models"] if model is not base] + of_losses(results)


def of_losses(results: dict) -> list[Verdict]:
    """One for every model that has a control, from which only the pair losses tell it apart."""
    found = []
    for pair in cells.against_controls(results):
        control, model = pair["models"]
        one = _compared(pair, control, model)
        text = f"What the pair losses did, apart from what training on the data did ({control['name']}): {one.text}"
        found.append(dataclasses.replace(one, text=text))
    return found


def change_sentence(subject: str, style: Style, before: Number, after: Number, change: Number, unit: str = "") -> str:
    """`Retrieval rose from 0.7% to 3.7% (+3.0 points, 95% interval 2.4 to 3.6).`, or what can be said instead.

    Args:
      change: (value, low, high) of a paired comparison, or the plain difference where none was made.
      unit: what the change is counted in.
    """
    ends = f"from {style.text(value_of(before))} to {style.text(value_of(after))}"
    value = value_of(change)
    amount = f"{style.signed(value)} {unit}".strip()
    if change is value:
        return f"{subject} went {ends} ({amount}; no interval was computed)."
    low, high = (f"{style.scale * end:.{style.digits}f}" for end in change[1:])
    test = f"({amount}, 95% interval {low} to {high})"
    if change[1] <= 0 <= change[2]:
        return f"{subject} went {ends} {test}: {UNDECIDED}."
    return f"{subject} {'rose' if value > 0 else 'fell'} {ends} {test}."


def warnings(results: dict) -> list[str]:
    """What a reader has to know before the numbers: languages that a tokenizer cannot write, vectors that may have
    become one, layers that differ."""
    return [*_unwritten(results), *_repeating(results), *_collapsed(results), *_other_layers(results)]


def _repeating(results: dict) -> list[str]:
    """Models that translate many sentences alike."""
    found = []
    for model in results["models"]:
        if shares := chance.repeating(model):
            fewest = min(shares, key=shares.get)
            found.append(
                f"{model['name']} gives most sentences a text that another one gets, too, in {len(shares)} of "
                f"{len(model['translation']['directions'])} directions (fewest distinct outputs: "
                f"{tables.direction_name(fewest)}, {SHARE.text(shares[fewest])}): its scores there are no translation."
            )
    return found


def _collapsed(results: dict) -> list[str]:
    """Models whose sentences are hardly apart at the aligned layer: retrieval can rise while they become one."""
    base, found = cells.baseline(results), []
    for model in results["models"]:
        layer, signs = model["align_layer"], []
        cosine = cells.at_layer(model, layer, "random_cosine")
        compared = base is not None and model is not base
        if cosine >= _COLLAPSED_COSINE:
            before = cells.at_layer(base, model["baseline_layer"], "random_cosine") if compared else None
            of_base = f" ({base['name']}: {before:.3f})" if compared else ""
            signs.append(f"the mean cosine of different sentences is {cosine:.3f}{of_base}")
        if compared and model["layers"] == base["layers"]:
            now, before = (cells.at_layer(m, layer, "total_variance") for m in (model, base))
            if now < _COLLAPSED_VARIANCE * before:
                signs.append(f"the total variance is {SHARE.text(now / before)} of that of {base['name']}")
        if signs:
            found.append(
                f"{model['name']} may have collapsed at its aligned layer {layer}: {', and '.join(signs)}. "
                "Retrieval can rise all the same."
            )
    return found


def _other_layers(results: dict) -> list[str]:
    """Models whose change is not the difference of the two values that are shown, or not of equal layers."""
    base, found = cells.baseline(results), []
    for model in results["models"] if base else ():
        name, layer, before = model["name"], model["align_layer"], model["baseline_layer"]
        if model["layers"] != base["layers"]:
            found.append(
                f"{name} has {model['layers']} layers and {base['name']} {base['layers']}: what is measured at the "
                f"aligned layer is of layer {layer} in the one and of layer {before} in the other."
            )
        elif before != base["align_layer"]:
            found.append(
                f"{name} is measured at its aligned layer {layer}, {base['name']} at layer {base['align_layer']}; the "
                f"changes of {name} are from layer {before} of {base['name']}."
            )
    return found


def _unwritten(results: dict) -> list[str]:
    found: dict[tuple[str, str], list[str]] = {}
    for model in results["models"]:
        for code, rate in model["unknown_rate"].items():
            if rate >= _UNWRITTEN:
                found.setdefault((code, SHARE.text(rate)), []).append(model["name"])
    return [
        f"{rate} of the tokens of {language_name(code)} are unknown to the tokenizer of {', '.join(models)}: "
        "numbers of this language say little."
        for (code, rate), models in found.items()
    ]


def _questions(results: dict, model: dict, base: dict | None) -> list[_Question]:
    """What is asked of every model, where it was measured; `before` and `change` are of the baseline."""
    home, pivot = tables.home_language(results), results["sentences"]["pivot"]
    name = language_name(home)
    others = len(model["alignment"]["retrieval"])
    perplexity = [get(m, "perplexity", home, "value") for m in (base, model) if m is not None]
    written = " to ".join(f"{value:,.1f}" for value in perplexity if value is not None)
    found = [
        _Question(
            "Languages closer?",
            "retrieval, points" if base else "retrieval",
            f"Retrieval between {language_name(pivot)} and {others} other {'language' if others == 1 else 'languages'} "
            f"at the aligned layer ({model['align_layer']} of {model['layers']})",
            SHARE,
            "points",
            tables.retrieval(model),
            base and cells.at_layer(base, model["baseline_layer"], "retrieval"),
            get(model, "intervals", "retrieval_change", "mean"),
        ),
        _Question(
            f"{name} kept?",
            "bits per byte",
            f"{name} text in bits per byte (less is better; perplexity {written})",
            BITS,
            "",
            get(model, "perplexity", home, "bits_per_byte"),
            get(base, "perplexity", home, "bits_per_byte"),
            get(model, "intervals", "bits_per_byte_change", home),
        ),
    ]
    for key, scores in (get(model, "translation", "averages") or {}).items():
        direction = tables.direction_name(key)
        found.append(
            _Question(
                "Translates better?",
                f"chrF++, {direction}",
                f"chrF++ of translation ({direction})",
                SCORE,
                "",
                scores["chrF++"],
                get(base, "translation", "averages", key, "chrF++"),
                scores.get("chrF++_change"),
                scores,
            )
        )
    return [q for q in found if q.number is not None and (base is None or q.before is not None)]


def _compared(results: dict, base: dict, model: dict) -> Verdict:
    answers, sentences = [], []
    for q in _questions(results, model, base):
        change = q.change or value_of(q.number) - value_of(q.before)
        signed, interval = q.style.signed(value_of(change)), q.style.interval(change)
        answers.append(Answer(q.question, q.measure, signed, interval, q.mark()))
        sentences.append(change_sentence(q.subject, q.style, q.before, q.number, change, q.unit) + q.besides())
    sentences.insert(1, _told_apart(base, model))
    return Verdict(model["name"], base["name"], tuple(answers), " ".join(sentences))


def _told_apart(base: dict, model: dict) -> str:
    """Whether languages diverge at the last layer: by the probe, or where that is at its ceiling by what varies."""
    last, before = (m["alignment"]["language_probe"][-1] for m in (model, base))
    text = (
        f"A linear probe tells the languages apart at the last layer for {SHARE.text(last)} of sentences "
        f"({base['name']}: {SHARE.text(before)})"
    )
    if min(last, before) < _SATURATED:
        return f"{text}."
    share, old = (SHARE.text(m["alignment"]["language_variance"][-1]) for m in (model, base))
    return (
        f"{text}: it is saturated and tells nothing of their difference; of the variance of all vectors there, {share} "
        f"lies between languages ({base['name']}: {old})."
    )


def _alone(results: dict, model: dict) -> Verdict:
    questions = _questions(results, model, None)
    answers = (
        Answer("", q.measure, q.style.text(value_of(q.number)), q.style.interval(q.number), "") for q in questions
    )
    facts = [
        f"{q.subject}: {q.style.text(value_of(q.number))}{f' {end}' if (end := q.style.interval(q.number)) else ''}."
        + q.besides()
        for q in questions
    ]
    chance = SHARE.text(1 / results["sentences"]["count"])
    text = f"One model, so there is no before and after. {' '.join(facts)} Chance for retrieval is {chance}."
    return Verdict(model["name"], "", tuple(answers), text)
