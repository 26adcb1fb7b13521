"""Results of an evaluation without one: every measure has rows, and every number is invented."""

import dataclasses

import numpy as np

from alignx_jax.evaluation import rows
from alignx_jax.evaluation.rows import OTHERS, Model, Projection, Results, Row

NAMES = ("base model", "stage 1", "next-token only", "stage 2", "other seed", "larger")
CODES = ("ar", "de", "en", "es", "fr", "hi", "ru", "sw", "vi", "zh", "bg", "cs", "el", "et", "fi", "he", "id", "it")
CODES += ("ja", "ko", "nl", "pl", "pt", "ro", "ta", "th", "tr")
COUNT = 546
WORSE = {
    "xsim",
    "bits_per_byte",
    "perplexity",
    "off_target",
    "copy",
    "empty",
    "cut",
    "tasks/wikitext/word_perplexity,none",
}
BETWEEN = ("retrieval", "xsim", "mexa", "mexa_last", "dali", "dali_strict", "in_prompt", "positive_cosine")
BETWEEN += ("negative_cosine", "cosine_difference", "cka", "cka_debiased")
OF_ALL = ("retrieval_lowest", "total_variance", "random_cosine", "uniformity", "language_variance", "meaning_variance")
RESAMPLED = {"retrieval", "xsim", "mexa", "mexa_last", "dali", "dali_strict", "language_probe"}
OF_TEXT = ("bits_per_byte", "perplexity", "continuation_choice", "choices")
METRICS = ("BLEU", "chrF++", "spBLEU (flores200)", "off_target", "copy", "empty", "cut", "chrF++_floor")
METRICS += ("chrF++_above_floor", "distinct")
TASKS = {"tasks/arc_easy/acc,none": True, "tasks/wikitext/word_perplexity,none": False}
SAMPLES = (
    ("de-en", "Letzte Woche hat meine Freundin den Hof gefegt.", "Last week my friend swept the yard."),
    ("en-ar", "Last week my friend swept the yard.", "كنست صديقتي الفناء الأسبوع الماضي."),
    ("en-zh", "Yesterday the cook wrote the letter.", "昨天厨师写好了那封信。"),
)


def results(models: int = 2, languages: int = 4, layers: int = 4) -> Results:
    """Of models that get better one after the other; the third is the control of the second. Aligned is the layer in
    the middle."""
    codes = [*CODES[:languages]] if "en" in CODES[:languages] else ["en", *CODES[: languages - 1]]
    every = [_model(n, codes, layers) for n in range(models)]
    controls = [(NAMES[1], NAMES[2])] if models > 2 else []
    own = {model.name: _rows(model, n, codes) for n, model in enumerate(every)}
    found = [row for of in own.values() for row in of]
    for name, before in [*((model.name, NAMES[0]) for model in every[1:]), *controls]:
        by_place = {row[1:5]: row for row in own[before]}
        shown = [row for row in own[name] if row.layer in (None, layers // 2, layers)]
        found += [_change(row, by_place[row[1:5]]) for row in shown if row[1:5] in by_place]
    outputs = {model.name: "" if n == 0 else "Last week" for n, model in enumerate(every)}
    return Results(
        command="python run.py --stage=evaluate --run=runs/example --mesh=8x1",
        date="2026-11-23",
        machine="8 x cpu (simulated), mesh data 8 x model 1",
        versions={"alignx_jax": "0.1.0", "jax": "0.10.2"},
        config={"mesh": "8x1", "evaluation": {"sentences": "example", "pivot": "en", "limit": 1000}, "seed": 0},
        sentences=rows.Sentences("EXAMPLE: every number is invented", COUNT, codes, "en", "0" * 64),
        notes=["stage 2 was trained with another template."],
        baseline=NAMES[0],
        controls=controls,
        models=every,
        translation=rows.Translation(
            {"BLEU": "nrefs:1|tok:13a|version:2.6.0", "chrF++": "nrefs:1|nc:6|nw:2|version:2.6.0"},
            ["The language identifier knows no Swahili; its off-target rate is left out."],
            [rows.Sample(*sample, outputs) for sample in SAMPLES],
        ),
        tasks=TASKS,
        rows=found,
    )


def _model(n: int, codes: list[str], layers: int) -> Model:
    rng = np.random.default_rng(n)

    def plane(layer: int) -> Projection:
        return Projection(
            layer, {code: [(float(x), float(y)) for x, y in rng.normal(size=(6, 2))] for code in codes}, (0.25, 0.125)
        )

    def losses(step: int) -> rows.Losses:
        pairs = {"contrastive": 1 / (1 + step), "language_matching": 0.7} if n == 1 else {}
        return rows.Losses(step, 3.5, next_token=3.0 / (1 + step / 100), **pairs)

    balance = {"step": 0, "contrastive": 1.5, "chance/contrastive": 2.0, "gradient/contrastive": 9.0}
    balance |= {"share/contrastive": 0.25, "cosine/translations": 0.31, "cosine/others": -0.02, "cosine/deviation": 0.1}
    last = balance | {"step": 400, "share/contrastive": 0.125}
    return Model(
        name=NAMES[n],
        path=f"runs/example/stage{n}",
        step=400 if n else None,
        weights="0af0",
        family="llama",
        parameters=14_487_808,
        layers=layers,
        align_layer=layers // 2,
        projection=[plane(layer) for layer in sorted({0, layers // 2, layers})],
        training=rows.Training(
            [losses(step) for step in range(1, 9)], [losses(step) for step in (0, 4, 8)], [balance, last]
        )
        if n
        else None,
    )


def _rows(model: Model, n: int, codes: list[str]) -> list[Row]:
    """Every measure; a share of 0.2 to 0.5, better from model to model, and highest in the middle."""
    others, found = [code for code in codes if code != "en"], []

    def add(measure: str, layer=None, direction=None, language=None, interval=True) -> None:
        ease = codes.index(language) / len(codes) if language in codes else 0.5
        height = 0.1 - abs(layer / model.layers - 0.5) / 5 if layer is not None else 0
        value = round(0.3 + height - ease / 10 + n / 20 * (-1 if measure in WORSE else 1), 4)
        ends = (round(value - 0.04, 4), round(value + 0.05, 4)) if interval else (None, None)
        found.append(Row(model.name, measure, layer, direction, language, value, *ends, COUNT, None))

    for layer in range(model.layers + 1):
        for measure in BETWEEN:
            for code in (*others, None):
                add(measure, layer, language=code, interval=measure in RESAMPLED)
        for code in (*codes, None):
            add("language_probe", layer, language=code)
        for measure in OF_ALL:
            add(measure, layer, interval=False)
    for a in codes:
        for b in codes:
            if a != b:
                add("retrieval", model.align_layer, f"{a}-{b}", interval=False)
    if n == 1:
        add("matching_head_balanced", interval=False)
    for measure in OF_TEXT:
        for code in (*codes, *([OTHERS] if measure != "perplexity" else [])):
            add(measure, language=code)
    for code in codes:
        add("unknown_rate", language=code, interval=False)
        add("tokens_per_sentence", language=code, interval=False)
    directions = [f"en-{code}" for code in others] + [f"{code}-en" for code in others]
    for metric in METRICS:
        for direction in (*directions, "en-x", "x-en"):
            add(metric, direction=direction, interval=metric != "distinct")
    for measure in TASKS:
        add(measure)
    add("tasks", interval=False)
    small = {"unknown_rate": 0.0, "distinct": 0.96}
    scaled = {"chrF++", "BLEU", "spBLEU (flores200)", "chrF++_floor", "chrF++_above_floor"}
    scaled |= {"tasks/wikitext/word_perplexity,none"}
    return [
        row._replace(value=small[row.measure])
        if row.measure in small
        else row._replace(value=round(100 * row.value, 2), low=round(100 * row.low, 2), high=round(100 * row.high, 2))
        if row.measure in scaled
        else row
        for row in found
    ]


def _change(row: Row, before: Row) -> Row:
    scale = 100 if row.value > 2 else 1
    value = round(row.value - before.value, 4)
    low, high = (None, None) if row.low is None else (round(value - scale * 0.02, 4), round(value + scale * 0.03, 4))
    return row._replace(value=value, low=low, high=high, against=before.model)


def put(of: Results, model: int, measure: str, *numbers: float | None, against: str | None = None, **place) -> Results:
    """The same with other numbers, value, low and high, in one row, which may be new."""
    name = of.models[model].name
    layer, direction, language = (place.get(key) for key in ("layer", "direction", "language"))
    value, low, high = (*numbers, None, None)[:3]
    new = Row(name, measure, layer, direction, language, value, low, high, COUNT, against)
    kept = [
        row for row in of.rows if row._replace(value=0, low=0, high=0, n=0) != new._replace(value=0, low=0, high=0, n=0)
    ]
    return dataclasses.replace(of, rows=[*kept, new])


def without(of: Results, *measures: str, change: bool = False) -> Results:
    """The same without the rows of these measures; `change`: without their changes alone."""
    kept = [row for row in of.rows if row.measure not in measures or (change and row.against is None)]
    return dataclasses.replace(of, rows=kept)


def with_model(of: Results, number: int, **changes) -> Results:
    """The same with other facts about one model."""
    models = [dataclasses.replace(m, **changes) if n == number else m for n, m in enumerate(of.models)]
    return dataclasses.replace(of, models=models)
