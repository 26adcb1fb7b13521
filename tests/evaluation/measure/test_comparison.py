"""Intervals and changes of a model against resampling written out; and between which layers a change is."""

import numpy as np
import pytest

from alignx_jax.evaluation.measure import comparison, layers, measured, scores, statistics
from alignx_jax.evaluation.measure.measured import Measured
from alignx_jax.evaluation.measure.scores import Place, Score
from alignx_jax.evaluation.measure.scoring import Perplexity
from alignx_jax.evaluation.rows import OTHERS, Model, Row

SEED, RESAMPLES = 3, 100
CODES = ("en", "de", "zh")


class Example:
    """A model with two languages beside the pivot; 20 sentences, of which MEXA has 8; items 6 and 9."""

    def __init__(self, seed: int, depth: int = 4, align: int = 2, flip_tokens: bool = False):
        rng = np.random.default_rng(seed)
        self.hits = {
            name: {code: (rng.random((depth + 1, n)) < 0.5).astype(np.float32) for code in codes}
            for name, n, codes in (("retrieval", 20, CODES[1:]), ("mexa", 8, CODES[1:]), ("language_probe", 4, CODES))
        }
        tokens = np.arange(20) % 5 + 3
        self.text = {code: Perplexity(rng.gamma(9, 2, 20), tokens, np.arange(20) % 7 + 9) for code in CODES}
        if flip_tokens:
            self.text["zh"] = Perplexity(self.text["zh"].nll, tokens[::-1], self.text["zh"].bytes)
        self.endings = {code: rng.random(20) < 0.5 for code in CODES} | {"th": np.zeros(0, bool)}
        self.choices = {"de": rng.random(6) < 0.5, "zh": rng.random(9) < 0.5}
        curves = {Place("cka"): layers.Curve(rng.random(depth + 1), 20)}
        for name, of in self.hits.items():
            curves |= layers.with_mean({Place(name, language=code): layers.of_means(x) for code, x in of.items()})
        self.cka = curves[Place("cka")].value_L
        model = Model(f"model {seed}", "path", None, "0af0", "llama", 9, depth, align, [], None)
        text = measured.of_text(self.text, self.endings, self.choices, "en")
        self.measured = Measured(model, layers.scores(curves) | text, None, None)


def compare(one: Example, *others: Example) -> dict[tuple, Row]:
    found = comparison.rows(one.measured, [other.measured for other in others], RESAMPLES, SEED)
    assert {row.model for row in found} == {one.measured.model.name}
    return {(row.measure, row.layer, row.language, row.against): row for row in found}


def drawn(n: int) -> list[np.ndarray]:
    """The sentence numbers of all, then of each resample."""
    counts = statistics.bootstrap_counts(n, RESAMPLES, SEED)
    return [np.arange(n), *(np.repeat(np.arange(n), row) for row in counts)]


def share(of: dict[str, np.ndarray], layer: int | None = None) -> np.ndarray:
    """The mean over languages of the share of each, on all sentences and on each resample."""
    values = [hits if layer is None else hits[layer] for hits in of.values()]
    return np.mean([[hits[places].mean(dtype=float) for places in drawn(len(hits))] for hits in values], axis=0)


def agree(row: Row, series: np.ndarray) -> None:
    expected = [series[0], *np.percentile(series[1:], [2.5, 97.5])]
    np.testing.assert_allclose([row.value, row.low, row.high], expected, rtol=1e-12, atol=1e-12)


def test_shares_and_their_paired_changes_are_resampled_with_their_sentences():
    base, one = Example(0), Example(1)
    found = compare(one, base)
    for measure, of in one.hits.items():
        for layer in (2, 4):  # the aligned and the last
            for code, codes in (("de", ["de"]), (None, list(of))):
                now, old = (share({c: x.hits[measure][c] for c in codes}, layer) for x in (one, base))
                agree(found[measure, layer, code, None], now)
                agree(found[measure, layer, code, "model 0"], now - old)
        assert found[measure, 2, "de", None].n == of["de"].shape[1]


def test_of_other_layers_there_are_values_alone():
    base, one = Example(0), Example(1)
    found = compare(one, base)
    row = found["retrieval", 1, "zh", None]
    assert (row.value, row.low, row.high) == (one.hits["retrieval"]["zh"][1].mean(), None, None)
    assert ("retrieval", 1, "zh", "model 0") not in found


def test_what_cannot_be_resampled_has_a_plain_change():
    base, one = Example(0), Example(1)
    change = compare(one, base)["cka", 2, None, "model 0"]
    assert (change.value, change.low, change.high) == (one.cka[2] - base.cka[2], None, None)


def test_text_has_the_mean_of_the_languages_but_english_from_the_same_resamples():
    base, one = Example(0), Example(1)
    found = compare(one, base)

    def bits(model, codes):
        texts = [model.text[code] for code in codes]
        each = [[p.nll[d].sum() / np.log(2) / p.bytes[d].sum() for d in drawn(20)] for p in texts]
        return np.mean(each, axis=0)

    agree(found["bits_per_byte", None, "en", None], bits(one, ["en"]))
    agree(found["bits_per_byte", None, OTHERS, None], bits(one, ["de", "zh"]))
    agree(found["bits_per_byte", None, OTHERS, "model 0"], bits(one, ["de", "zh"]) - bits(base, ["de", "zh"]))
    agree(found["choices", None, "zh", None], share({"zh": one.choices["zh"]}))
    agree(found["choices", None, OTHERS, "model 0"], share(one.choices) - share(base.choices))  # of 6 and of 9 items
    assert {code for measure, _, code, _ in found if measure == "continuation_choice"} == {"en", "de", "zh", OTHERS}
    assert ("perplexity", None, OTHERS, None) not in found, "a mean of perplexities says nothing"


@pytest.mark.parametrize("depth, align, before, last", [(4, 2, 2, 4), (4, 3, 3, 4), (8, 6, 1, 4)])
def test_a_change_is_between_equal_layers(depth, align, before, last):
    """The baseline is looked at after layer 1; of a model of another depth no layer is the same."""
    base, one = Example(0, align=1), Example(1, depth, align)
    found = compare(one, base)
    assert one.measured.model.layer_of(base.measured.model) == before
    for measure in ("retrieval", "mexa"):
        change = share(one.hits[measure], align) - share(base.hits[measure], before)
        agree(found[measure, align, None, "model 0"], change)
    change = share(one.hits["language_probe"], depth) - share(base.hits["language_probe"], last)
    agree(found["language_probe", depth, None, "model 0"], change)


def test_perplexities_of_a_token_are_compared_where_the_tokens_are_the_same():
    base, one = Example(0), Example(1)

    def perplexity(model):
        p = model.text["de"]
        return np.array([np.exp(p.nll[d].sum() / p.tokens[d].sum()) for d in drawn(20)])

    agree(compare(one, base)["perplexity", None, "de", "model 0"], perplexity(one) - perplexity(base))
    found = compare(Example(1, flip_tokens=True), base)
    assert ("perplexity", None, "zh", "model 0") not in found and ("perplexity", None, "zh", None) in found
    assert ("perplexity", None, "de", "model 0") in found and ("bits_per_byte", None, "zh", "model 0") in found


def test_a_baseline_changes_from_nothing_and_another_model_from_each():
    base, one, control = Example(0), Example(1), Example(2)
    assert {against for *_, against in compare(base)} == {None}
    found = compare(one, base, control)
    agree(found["mexa", 2, None, "model 2"], share(one.hits["mexa"], 2) - share(control.hits["mexa"], 2))
    assert found["mexa", 2, None, "model 2"] != found["mexa", 2, None, "model 0"]


def test_numbers_with_intervals_of_their_own_keep_these():
    """As those of tasks; their changes are of independent samples."""
    place, model = Place("tasks/arc/acc,none"), Example(1).measured.model
    one, base = (
        Measured(m, {place: Score(value, ends=(value - 0.1, value + 0.2))}, None, None)
        for m, value in ((model, 0.6), (Example(0).measured.model, 0.5))
    )
    own, change = comparison.rows(one, [base], RESAMPLES, SEED)
    assert (own.value, own.low, own.high, own.n) == (0.6, 0.5, 0.8, None)
    expected = statistics.difference((0.6, 0.5, 0.8), (0.5, 0.4, 0.7))
    np.testing.assert_allclose([change.value, change.low, change.high], expected, rtol=1e-12)


def test_what_is_not_finite_is_no_number():
    place, model = Place("total_variance", 2), Example(1).measured.model
    (row,) = comparison.rows(Measured(model, {place: scores.Score(float("nan"), 3)}, None, None), [], RESAMPLES, SEED)
    assert (row.value, row.low, row.high, row.n) == (None, None, None, 3)
