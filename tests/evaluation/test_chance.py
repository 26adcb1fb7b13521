"""Translation and chance, against sacrebleu on shuffled references; one text for all is no translation."""

import functools

import numpy as np
import pytest
import sacrebleu

from alignx_jax.config import TranslationConfig
from alignx_jax.evaluation import chance, statistics, tables, translation_scores, verdict
from tests.evaluation import results_example

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


def counts_of(n):
    return statistics.bootstrap_counts(n, 200, 1)


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
    got = translation_scores.record(scored(outputs), scored(outputs), few)["averages"]["en-x"]
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
    assert got["chrF++_floor"] == pytest.approx(every[0, 1])
    above = every[:, 0] - every[:, 1]
    expected = [above[0], *np.quantile(above[1:], [0.025, 0.975])]
    np.testing.assert_allclose(got["chrF++_above_floor"], expected, rtol=1e-9)
    assert got["chrF++_above_floor"][1] > 0 and got["repeating"] == [0, 3]


def results(before, after):
    """Two models with these translations."""
    base, now = scored(before), scored(after)
    found = results_example.build(models=2, languages=4, layers=4)
    found["sentences"]["languages"] = ["en", *CODES]
    for model, of in zip(found["models"], (base, now), strict=True):
        model |= {"translation": translation_scores.record(of, base, counts_of), "unknown_rate": {}}
    return found


def test_one_text_for_all_is_not_better_though_its_score_rises():
    found = results({pair: ["?"] * N for pair in same()}, same())
    scores = found["models"][1]["translation"]["averages"]["en-x"]
    assert scores["chrF++_change"][1] > 0, "the interval of the change alone would call it better"
    assert scores["distinct"] == pytest.approx(1 / N) and scores["repeating"] == [3, 3]
    assert scores["chrF++_above_floor"][0] == pytest.approx(0, abs=1e-9), "sums over equal outputs know no order"
    (one,) = verdict.verdicts(found)
    assert one.answers[-1].mark == "chance"
    assert "No better than chance: with references shuffled among the sentences it is " in one.text
    assert "3 of 3 directions give most sentences a text that another one gets, too" in one.text
    for table in (tables.overview(found), tables.translation_averages(found)):
        marks = {row.label: row.cells[1].mark for row in table.rows if row.cells}
        assert {mark for label, mark in marks.items() if label.startswith("chrF++,") or label == "chrF++"} == {"chance"}
    assert {row.cells[1].mark for row in tables.translation_directions(found, "chrF++").rows} == {"chance"}
    base, model = verdict.warnings(found)
    assert base.startswith("base model gives most") and model.startswith("stage 1 gives most sentences a text that")
    assert "in 3 of 3 directions (fewest distinct outputs: English to German, 8.3%)" in model


def test_one_language_that_is_translated_does_not_carry_the_others():
    """Above chance by that one language; two of three give one text."""
    after = same() | {("en", "fr"): SENTENCES["fr"]}
    found = results(same("?"), after)
    scores = found["models"][1]["translation"]["averages"]["en-x"]
    assert scores["chrF++_change"][1] > 0 and scores["chrF++_above_floor"][1] > 0
    (one,) = verdict.verdicts(found)
    assert one.answers[-1].mark == "chance" and "No better translation all the same: 2 of 3 directions" in one.text
    marks = {row.label: row.cells[1].mark for row in tables.translation_directions(found, "chrF++").rows}
    assert marks == {"English to German": "chance", "English to French": "better", "English to Spanish": "chance"}


def test_a_translation_above_chance_is_better():
    found = results(same("?"), {("en", code): SENTENCES[code] for code in CODES})
    (one,) = verdict.verdicts(found)
    assert one.answers[-1].mark == "better" and "No better" not in one.text
    assert "With references shuffled among the sentences it is " in one.text
    assert [text.split()[0] for text in verdict.warnings(found)] == ["base"]


def test_outputs_are_compared_by_what_is_written_in_them():
    assert chance.distinct(["Ja!", "ja", "２", "2", "", "..."]) == 3 / 6
    assert not chance.is_repeating(0.5)
    (scores,) = scored({("en", "de"): SENTENCES["de"]}).floors.values()
    assert scores.value < 60
    alone = {code: lines[:1] for code, lines in SENTENCES.items()}
    result = translation_scores.score(
        {("en", "de"): alone["de"]}, alone, "en", TranslationConfig(), {("en", "de"): [False]}
    )
    got = translation_scores.record(result, result, counts_of)["directions"]["en-de"]
    assert "chrF++_floor" not in got and chance.mark(got, "better") == "same", "of one sentence nothing is known"
