"""The measures of every layer are those of `metrics`, on any mesh; the projection is scikit-learn's PCA."""

import jax
import numpy as np
import pytest
from sklearn.decomposition import PCA

from alignx_jax import sharding
from alignx_jax.evaluation.measure import layers, metrics
from alignx_jax.evaluation.measure.alignment import SentenceVectors
from alignx_jax.evaluation.measure.scores import Place, Score

LANGUAGES = ["de", "en", "zh"]


@pytest.fixture(scope="module")
def vectors() -> SentenceVectors:
    """Of 5 layers, which divide among neither 2 nor 8 devices; the languages come closer in the middle."""
    rng = np.random.default_rng(0)
    meaning = rng.normal(size=(40, 8))
    noise = np.array([3.0, 1.0, 0.5, 1.0, 3.0])[:, None, None, None]
    mean = (meaning + noise * rng.normal(size=(5, 3, 40, 8))).astype(np.float32)
    few = mean[:, :, :20]
    return SentenceVectors(mean, few + 1, few - 1, few * 2)


@pytest.mark.parametrize("spec", ["1x1", "2x1", "4x2"])
def test_every_layer_is_measured_as_if_it_were_alone(vectors, spec):
    mesh = sharding.make_mesh(spec)
    with jax.set_mesh(mesh):
        found = layers.measure(vectors, LANGUAGES, "en", 0, mesh)
    assert found[Place("mexa")].n == 20 and found[Place("retrieval")].n == 40
    compared = set()

    def agree(value, layer: int, measure: str, **place) -> None:
        curve = found[Place(measure, **place)]
        assert curve.value_L.shape == (5,)
        assert curve.value_L[layer] == pytest.approx(float(value), rel=1e-4, abs=1e-5)
        compared.add(Place(measure, **place))

    for layer in range(5):
        x, weighted, last = vectors.mean[layer], vectors.weighted[layer], vectors.last[layer]
        hits, xsim = metrics.retrieval_hits(x), metrics.xsim_errors(x, 1)
        cosines, cka, collapse = metrics.cosines(x, 1), metrics.cka(x, 1), metrics.collapse(x)
        by_language = {
            "mexa": metrics.mexa_hits(weighted, 1).mean(axis=-1),
            "mexa_last": metrics.mexa_hits(last, 1).mean(axis=-1),
            "positive_cosine": cosines.positive,
            "negative_cosine": cosines.negative,
            "cosine_difference": cosines.positive - cosines.negative,
            "cka": cka.plain,
            "cka_debiased": cka.debiased,
            "retrieval": (hits[:, 1].mean(axis=-1) + hits[1].mean(axis=-1)) / 2,
            "xsim": xsim.mean(axis=(1, 2)),
        }
        for measure, value_K in by_language.items():
            for k, code in ((0, "de"), (2, "zh")):
                agree(value_K[k], layer, measure, language=code)
            agree((value_K[0] + value_K[2]) / 2, layer, measure)
        agree(min(by_language["retrieval"][0], by_language["retrieval"][2]), layer, "retrieval_lowest")
        for k, code in ((0, "de"), (2, "zh")):
            agree(hits[k, 1].mean(), layer, "retrieval", direction=f"{code}-en")
            agree(hits[1, k].mean(), layer, "retrieval", direction=f"en-{code}")
            agree(xsim[k, 0].mean(), layer, "xsim", direction=f"{code}-en")
            agree(xsim[k, 1].mean(), layer, "xsim", direction=f"en-{code}")
        for measure in ("total_variance", "random_cosine", "uniformity"):
            agree(getattr(collapse, measure), layer, measure)
        for name in ("language", "meaning"):
            agree(getattr(metrics.variance(x), name), layer, f"{name}_variance")
        probe_KxN = metrics.probe_hits(x, 0)
        agree(probe_KxN.mean(), layer, "language_probe")
        for k, code in enumerate(LANGUAGES):
            agree(probe_KxN[k].mean(), layer, "language_probe", language=code)
    assert compared == set(found)
    middle = found[Place("retrieval", direction="de-en")].value_L
    assert middle[2] > middle[0] and middle[2] > middle[4]


def test_the_sentences_behind_the_shares_are_those_of_every_layer(vectors):
    mesh = sharding.make_mesh("2x1")
    with jax.set_mesh(mesh):
        found = layers.measure(vectors, LANGUAGES, "en", 0, mesh)
    assert {place.measure for place, curve in found.items() if curve.parts_LxN} == {
        *("retrieval", "xsim", "mexa", "mexa_last", "language_probe")
    }
    for layer in range(5):
        x = vectors.mean[layer]
        hits, xsim = np.asarray(metrics.retrieval_hits(x), float), np.asarray(metrics.xsim_errors(x, 1), float)
        mexa, probe = metrics.mexa_hits(vectors.weighted[layer], 1), metrics.probe_hits(x, 0)
        for k, code in ((0, "de"), (2, "zh")):
            for measure, expected_N in (
                ("retrieval", (hits[k, 1] + hits[1, k]) / 2),
                ("xsim", (xsim[k, 0] + xsim[k, 1]) / 2),
                ("mexa", mexa[k]),
                ("language_probe", probe[k]),
            ):
                (of_sentences_LxN,) = found[Place(measure, language=code)].parts_LxN
                np.testing.assert_array_equal(of_sentences_LxN[layer], expected_N)
    both = [found[Place("mexa", language=code)].parts_LxN[0] for code in ("de", "zh")]
    np.testing.assert_array_equal(found[Place("mexa")].parts_LxN, both)


def test_every_value_of_a_curve_is_a_score_at_its_layer(vectors):
    curves = {
        Place("cka", language="de"): layers.Curve(np.array([0.25, 0.5]), 9),
        Place("mexa", language="de"): layers.of_means(np.array([[0, 1], [1, 1]])),
    }
    found = layers.scores(curves)
    assert found[Place("cka", 1, language="de")] == Score(0.5, 9)
    first, second = (found[Place("mexa", layer, language="de")] for layer in (0, 1))
    assert (first.value, first.n, second.value) == (0.5, 2, 1.0)
    np.testing.assert_array_equal(first.parts[0].sums_NxS, [[0], [1]])


def test_every_language_is_looked_for_in_every_other(vectors):
    found = layers.between_all(vectors.mean[2], LANGUAGES, 2)
    shares_KxK = metrics.retrieval_hits(vectors.mean[2]).mean(axis=-1)
    assert len(found) == 6
    for i, a in enumerate(LANGUAGES):
        for j, b in enumerate(LANGUAGES):
            if i != j:
                score = found[Place("retrieval", 2, f"{a}-{b}")]
                assert score.value == pytest.approx(float(shares_KxK[i, j]), rel=1e-5) and score.n == 40


def test_both_directions_of_pairs(vectors):
    found = layers.both_directions("in_prompt", {"de": (vectors.mean[:, 0], vectors.mean[:, 1])}, "en")
    for layer in range(5):
        hits = metrics.retrieval_hits(vectors.mean[layer, :2])
        to, back = float(hits[0, 1].mean()), float(hits[1, 0].mean())
        assert found[Place("in_prompt", direction="de-en")].value_L[layer] == pytest.approx(to, rel=1e-5)
        assert found[Place("in_prompt", direction="en-de")].value_L[layer] == pytest.approx(back, rel=1e-5)
        assert found[Place("in_prompt", language="de")].value_L[layer] == pytest.approx((to + back) / 2, rel=1e-5)
    assert layers.by_language(found, "in_prompt") == {"de": found[Place("in_prompt")].value_L.tolist()}


def test_the_projection_is_the_main_plane(vectors):
    found = layers.projection(vectors.mean, LANGUAGES, (0, 2, 2, 4))
    assert [one.layer for one in found] == [0, 2, 4]
    for one in found:
        x = vectors.mean[one.layer, :, :30].reshape(-1, 8).astype(np.float64)
        oracle = PCA(2).fit(x)
        ours = np.concatenate([np.array(one.x[code]) for code in LANGUAGES])
        assert ours.shape == (90, 2)
        np.testing.assert_allclose(np.abs(ours), np.abs(oracle.transform(x)), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(one.explained, oracle.explained_variance_ratio_, rtol=1e-4)
