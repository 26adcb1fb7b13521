"""Intervals and changes of a model against resampling written out; and between which layers a change is."""

import dataclasses

import numpy as np
import pytest

from alignx_jax.config import EvaluationConfig
from alignx_jax.evaluation import comparison, statistics
from alignx_jax.evaluation.measured import Measured
from alignx_jax.evaluation.scoring import Perplexity

OPTIONS = EvaluationConfig(pivot="en", resamples=100)
SEED = 3


def measured(seed: int, layers: int = 4, align: int = 2) -> Measured:
    """Two languages beside the pivot; 20 sentences, of which MEXA has 8 and the probe's test 4; items 6 and 9."""
    rng = np.random.default_rng(seed)

    def hits(n, codes=("de", "zh")):
        return {code: (rng.random((layers + 1, n)) < 0.5).astype(np.float32) for code in codes}

    return Measured(
        name=f"model {seed}",
        record={"name": f"model {seed}", "layers": layers, "align_layer": align},
        alignment={
            "retrieval": hits(20),
            "xsim": hits(20),
            "mexa": hits(8),
            "language_probe": hits(4, ("en", "de", "zh")),
        },
        text={
            code: Perplexity(rng.gamma(9, 2, 20), np.arange(20) % 5 + 3, np.arange(20) % 7 + 9)
            for code in ("en", "de", "zh")
        },
        endings={code: rng.random(20) < 0.5 for code in ("en", "de", "zh")} | {"th": np.zeros(0, bool)},
        choices={"de": rng.random(6) < 0.5, "zh": rng.random(9) < 0.5},
        translation=None,
    )


def drawn(n: int) -> list[np.ndarray]:
    """The sentence numbers of all, then of each resample."""
    counts = statistics.bootstrap_counts(n, 100, SEED)
    return [np.arange(n), *(np.repeat(np.arange(n), row) for row in counts)]


def triple(series) -> list[float]:
    return [series[0], *np.percentile(series[1:], [2.5, 97.5])]


def series(of: dict[str, np.ndarray]) -> np.ndarray:
    """The mean over languages of the share of each, on all sentences and on each resample."""
    return np.mean([[hits[places].mean(dtype=float) for places in drawn(len(hits))] for hits in of.values()], axis=0)


def at(one: Measured, measure: str, layer: int) -> dict[str, np.ndarray]:
    return {code: x[layer] for code, x in one.alignment[measure].items()}


def test_shares_and_their_paired_changes_are_resampled_with_their_sentences():
    base, one = measured(0), measured(1)
    found = comparison.record(one, base, OPTIONS, SEED)["intervals"]
    places = [(name, name, 2) for name in ("retrieval", "xsim", "mexa", "language_probe")]
    for key, measure, layer in [*places, ("language_probe_last", "language_probe", 4)]:
        after, before = at(one, measure, layer), at(base, measure, layer)
        for code, codes in (("de", ["de"]), ("mean", list(after))):
            now, old = (series({c: of[c] for c in codes}) for of in (after, before))
            np.testing.assert_allclose(found[key][code], triple(now), rtol=1e-12)
            np.testing.assert_allclose(found[f"{key}_change"][code], triple(now - old), rtol=1e-12, atol=1e-12)
    assert set(found["language_probe"]) == {"en", "de", "zh", "mean"} and set(found["mexa"]) == {"de", "zh", "mean"}


def test_text_has_the_mean_of_the_languages_but_english_from_the_same_resamples():
    base, one = measured(0), measured(1)
    record = comparison.record(one, base, OPTIONS, SEED)
    found = record["intervals"]

    def bits(model, codes):
        texts = [model.text[code] for code in codes]
        each = [[p.nll[d].sum() / np.log(2) / p.bytes[d].sum() for d in drawn(20)] for p in texts]
        return np.mean(each, axis=0)

    np.testing.assert_allclose(record["perplexity"]["en"]["bits_per_byte"], triple(bits(one, ["en"])), rtol=1e-12)
    np.testing.assert_allclose(found["bits_per_byte"]["others"], triple(bits(one, ["de", "zh"])), rtol=1e-12)
    change = triple(bits(one, ["de", "zh"]) - bits(base, ["de", "zh"]))
    np.testing.assert_allclose(found["bits_per_byte_change"]["others"], change, rtol=1e-12)
    np.testing.assert_allclose(record["choices"]["zh"], triple(series({"zh": one.choices["zh"]})), rtol=1e-12)
    after, before = series(one.choices), series(base.choices)  # of 6 and of 9 items
    np.testing.assert_allclose(found["choices_change"]["others"], triple(after - before), rtol=1e-12, atol=1e-12)
    assert set(record["continuation_choice"]) == {"en", "de", "zh"} and "others" not in record["choices"]


@pytest.mark.parametrize("layers, align, before", [(4, 2, 2), (4, 3, 3), (8, 6, 1)])
def test_a_change_is_between_equal_layers(layers, align, before):
    """The baseline is looked at after layer 1; of a model of another depth no layer is the same."""
    base, one = measured(0, align=1), measured(1, layers, align)
    found = comparison.record(one, base, OPTIONS, SEED)
    assert found["baseline_layer"] == before
    for name in ("retrieval", "mexa"):
        change = series(at(one, name, align)) - series(at(base, name, before))
        np.testing.assert_allclose(found["intervals"][f"{name}_change"]["mean"], triple(change), rtol=1e-12, atol=1e-12)
    last = series(at(one, "language_probe", layers)) - series(at(base, "language_probe", 4))
    np.testing.assert_allclose(
        found["intervals"]["language_probe_last_change"]["mean"], triple(last), rtol=1e-12, atol=1e-12
    )


def test_perplexities_of_a_token_are_compared_where_the_tokens_are_the_same():
    base, one = measured(0), measured(1)

    def perplexity(model):
        p = model.text["de"]
        return np.array([np.exp(p.nll[d].sum() / p.tokens[d].sum()) for d in drawn(20)])

    found = comparison.record(one, base, OPTIONS, SEED)["intervals"]
    change = triple(perplexity(one) - perplexity(base))
    np.testing.assert_allclose(found["perplexity_change"]["de"], change, rtol=1e-12)
    other = one.text | {"zh": dataclasses.replace(one.text["zh"], tokens=one.text["zh"].tokens[::-1])}
    found = comparison.record(dataclasses.replace(one, text=other), base, OPTIONS, SEED)["intervals"]
    assert "perplexity_change" not in found and "bits_per_byte_change" in found


def test_the_baseline_changes_from_nothing():
    base = measured(0)
    found = comparison.record(base, base, OPTIONS, SEED)
    assert not any(name.endswith("_change") for name in found["intervals"]) and found["baseline_layer"] == 2


def test_a_model_is_compared_with_its_control_as_with_a_baseline():
    base, one, control = measured(0), measured(1), measured(2)
    found = comparison.against(
        dataclasses.replace(one, name="a"), dataclasses.replace(control, name="b"), OPTIONS, SEED
    )
    assert (found["model"], found["control"], found["translation"]) == ("a", "b", None)
    for name in ("retrieval", "mexa"):
        change = series(at(one, name, 2)) - series(at(control, name, 2))
        np.testing.assert_allclose(found["intervals"][f"{name}_change"]["mean"], triple(change), rtol=1e-12, atol=1e-12)
    assert all(name.endswith("_change") for name in found["intervals"])
    assert comparison.record(one, base, OPTIONS, SEED)["intervals"]["retrieval_change"] != found["intervals"]
