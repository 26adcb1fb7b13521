"""Translation and chance, against sacrebleu on shuffled references; one text for all is no translation."""

import dataclasses
import functools

import numpy as np
import pytest
import sacrebleu

from alignx_jax.config import TranslationConfig
from alignx_jax.evaluation.measure import chance, comparison, statistics, translation_scores
from alignx_jax.evaluation.measure.measured import Measured
from alignx_jax.evaluation.measure.scores import Place
from alignx_jax.evaluation.rows import Results
from alignx_jax.evaluation.show import doubts, tables, verdict
from tests.evaluation import examples

CODES = ("de", "fr", "es")
N = 12
_SYLLABLES = ("ba", "ko", "li", "mu", "ne", "ra", "so", "ti", "ve", "zu")
PIVOT = ["".join(np.random.default_rng(n).choice(_SYLLABLES, 9)) + f" {n}" for n in range(N)]
SENTENCES = {"en": PIVOT} | {code: [f"{code} {text[::-1]} {text}" for text in PIVOT] for code in CODES}


def scored(outputs):
    cut = {pair: [False] * N for pair in outputs}
    return translation_scores.score(outputs, SENTENCES, "en", TranslationConfig(), cut)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(translation_scores, "_SPBLEU", ())


def same(text=None):
    """Every sentence gets one text of the target language."""
    return {("en", code): [text or SENTENCES[code][3]] * N for code in CODES}


@pytest.mark.parametrize("n", [2, 3, 50])
def test_nothing_stays_in_its_place(n):
    found = chance.derangement(n)
    assert sorted(found) == list(range(n)) and not np.any(found == np.arange(n))
    np.testing.assert_array_equal(found, chance.derangement(n))


def test_the_floor_and_what_is_above_it_are_those_of_sacrebleu():
    """All of it with `corpus_score`: on all sentences, and on each resample."""
    outputs = {("en", code): [*SENTENCES[code][: N - 3], *SENTENCES[code][:3]] for code in CODES}
    few = functools.partial(statistics.bootstrap_counts, resamples=20, seed=1)
    got = translation_scores.scores(scored(outputs))
    order = chance.derangement(N)

    def chrf(pair, places, references):
        lines = [outputs[pair][n] for n in places]
        return sacrebleu.corpus_chrf(lines, [[references[n] for n in places]], word_order=2).score

    def means(places):
        both = [
            (chrf(pair, places, SENTENCES[pair[1]]), chrf(pair, places, [SENTENCES[pair[1]][n] for n in order]))
            for pair in outputs
        ]
        return np.mean(both, axis=0)

    every = np.array([means(np.repeat(np.arange(N), counts)) for counts in [np.ones(N, int), *few(N)]])
    assert got[Place("chrF++_floor", direction="en-x")].value == pytest.approx(every[0, 1])
    above = every[:, 0] - every[:, 1]
    found = got[Place("chrF++_above_floor", direction="en-x")].resampled(few)
    np.testing.assert_allclose([found.value, *found.resampled_Bx___], above, rtol=1e-9)


def results(before, after) -> Results:
    """Two models with these translations, and nothing else that is told of."""
    found = examples.results(models=2)
    metrics = {row.measure for row in found.rows if row.direction and row.layer is None}
    base, now = (
        Measured(model, translation_scores.scores(scored(outputs)), None, None)
        for model, outputs in zip(found.models, (before, after), strict=True)
    )
    rows = comparison.rows(base, [], 200, 1) + comparison.rows(now, [base], 200, 1)
    return dataclasses.replace(found, rows=examples.without(found, *metrics).rows + rows)


def test_one_text_for_all_is_not_better_though_its_score_rises():
    found = results({pair: ["?"] * N for pair in same()}, same())
    base, model = found.models
    change = found.find(model, "chrF++", direction="en-x", against=base)
    assert change.low > 0, "the interval of the change alone would call it better"
    assert found.find(model, "distinct", direction="en-x").value == pytest.approx(1 / N)
    above = found.find(model, "chrF++_above_floor", direction="en-x").value
    assert above == pytest.approx(0, abs=1e-9), "sums over equal outputs know no order"
    (one,) = verdict.verdicts(found)
    assert one.answers[-1].mark == "chance"
    assert "No better than chance: with references shuffled among the sentences it is " in one.text
    assert "3 of 3 directions give most sentences a text that another one gets, too" in one.text
    for table in (tables.overview(found), tables.translation_averages(found)):
        marks = {line.label: line.cells[1].mark for line in table.lines if line.cells}
        assert {mark for label, mark in marks.items() if label.startswith("chrF++,") or label == "chrF++"} == {"chance"}
    assert {line.cells[1].mark for line in tables.translation_directions(found, "chrF++").lines} == {"chance"}
    first, second = verdict.warnings(found)
    assert first.startswith("base model gives most") and second.startswith("stage 1 gives most sentences a text that")
    assert "in 3 of 3 directions (fewest distinct outputs: English to German, 8.3%)" in second


def test_one_language_that_is_translated_does_not_carry_the_others():
    """Above chance by that one language; two of three give one text."""
    after = same() | {("en", "fr"): SENTENCES["fr"]}
    found = results(same("?"), after)
    base, model = found.models
    assert found.find(model, "chrF++", direction="en-x", against=base).low > 0
    assert found.find(model, "chrF++_above_floor", direction="en-x").low > 0
    (one,) = verdict.verdicts(found)
    assert one.answers[-1].mark == "chance" and "No better translation all the same: 2 of 3 directions" in one.text
    marks = {line.label: line.cells[1].mark for line in tables.translation_directions(found, "chrF++").lines}
    assert marks == {"English to German": "chance", "English to French": "better", "English to Spanish": "chance"}


def test_a_translation_above_chance_is_better():
    found = results(same("?"), {("en", code): SENTENCES[code] for code in CODES})
    (one,) = verdict.verdicts(found)
    assert one.answers[-1].mark == "better" and "No better" not in one.text
    assert "With references shuffled among the sentences it is " in one.text
    assert [text.split()[0] for text in verdict.warnings(found)] == ["base"]


def test_outputs_are_compared_by_what_is_written_in_them():
    assert chance.distinct(["Ja!", "ja", "２", "2", "", "..."]) == 3 / 6
    for share, told in ((0.5, {}), (0.49, {"en-ar": 0.49})):
        found = examples.put(examples.results(), 1, "distinct", share, direction="en-ar")
        assert doubts.repeating(found, found.models[1]) == told
    (scores,) = scored({("en", "de"): SENTENCES["de"]}).floors.values()
    assert scores.value < 60
    alone = {code: lines[:1] for code, lines in SENTENCES.items()}
    result = translation_scores.score(
        {("en", "de"): alone["de"]}, alone, "en", TranslationConfig(), {("en", "de"): [False]}
    )
    got = translation_scores.scores(result)
    assert Place("chrF++", direction="en-de") in got and Place("chrF++_floor", direction="en-de") not in got
    found = examples.without(examples.results(), "chrF++_floor", "chrF++_above_floor")
    mark = doubts.mark(found, found.models[1], "en-de", "better")
    assert mark == "same", "of one sentence nothing is known"
    assert doubts.sentence(found, found.models[1], "en-de") == ""
