"""The measures of every layer are those of `metrics`, on any mesh; the projection is scikit-learn's PCA."""

import jax
import numpy as np
import pytest
from sklearn.decomposition import PCA

from alignx_jax import sharding
from alignx_jax.evaluation import layers, metrics
from alignx_jax.evaluation.alignment import SentenceVectors

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
        found = layers.measure(vectors, LANGUAGES, "en", 2, 0, mesh)
    record = found.record
    assert len(record["language_probe"]) == 5
    assert record["mexa_sentences"] == 20
    for layer in range(5):
        x, weighted, last = vectors.mean[layer], vectors.weighted[layer], vectors.last[layer]
        hits, xsim = metrics.retrieval_hits(x), metrics.xsim_errors(x, 1)
        cosines, cka, collapse = metrics.cosines(x, 1), metrics.cka(x, 1), metrics.collapse(x)
        for k, code in ((0, "de"), (2, "zh")):
            expected = {
                "retrieval": {"to_pivot": hits[k, 1].mean(), "from_pivot": hits[1, k].mean()},
                "xsim": {"to_pivot": xsim[k, 0].mean(), "from_pivot": xsim[k, 1].mean()},
            }
            for name, ways in expected.items():
                for way, value in ways.items():
                    assert record[name][code][way][layer] == pytest.approx(float(value), rel=1e-5)
            for curve, value in (
                (record["mexa"]["weighted"], metrics.mexa_hits(weighted, 1).mean(axis=-1)),
                (record["mexa"]["last"], metrics.mexa_hits(last, 1).mean(axis=-1)),
                (record["positive_cosine"], cosines.positive),
                (record["negative_cosine"], cosines.negative),
                (record["cka"], cka.plain),
                (record["cka_debiased"], cka.debiased),
            ):
                assert set(curve) == {"de", "zh"}
                assert curve[code][layer] == pytest.approx(float(value[k]), rel=1e-4, abs=1e-5)
        for name in ("total_variance", "random_cosine", "uniformity"):
            assert record[name][layer] == pytest.approx(float(getattr(collapse, name)), rel=1e-4, abs=1e-5)
        for name in ("language", "meaning"):
            expected = float(getattr(metrics.variance(x), name))
            assert record[f"{name}_variance"][layer] == pytest.approx(expected, rel=1e-4)
        assert record["language_probe"][layer] == pytest.approx(float(metrics.probe_hits(x, 0).mean()), rel=1e-5)
    matrix_KxK = metrics.retrieval_hits(vectors.mean[2]).mean(axis=-1)
    np.testing.assert_allclose(record["retrieval_matrix"], matrix_KxK, rtol=1e-5)
    middle = record["retrieval"]["de"]["to_pivot"]
    assert middle[2] > middle[0] and middle[2] > middle[4]


def test_the_sentences_behind_the_shares_are_those_of_every_layer(vectors):
    mesh = sharding.make_mesh("2x1")
    with jax.set_mesh(mesh):
        found = layers.measure(vectors, LANGUAGES, "en", 2, 0, mesh).sentences
    assert {name: list(of) for name, of in found.items()} == {
        "retrieval": ["de", "zh"],
        "xsim": ["de", "zh"],
        "mexa": ["de", "zh"],
        "language_probe": LANGUAGES,
    }
    for layer in range(5):
        x = vectors.mean[layer]
        hits, xsim = np.asarray(metrics.retrieval_hits(x), float), np.asarray(metrics.xsim_errors(x, 1), float)
        mexa, probe = metrics.mexa_hits(vectors.weighted[layer], 1), metrics.probe_hits(x, 0)
        for k, code in ((0, "de"), (2, "zh")):
            np.testing.assert_array_equal(found["retrieval"][code][layer], (hits[k, 1] + hits[1, k]) / 2)
            np.testing.assert_array_equal(found["xsim"][code][layer], (xsim[k, 0] + xsim[k, 1]) / 2)
            np.testing.assert_array_equal(found["mexa"][code][layer], mexa[k])
            np.testing.assert_array_equal(found["language_probe"][code][layer], probe[k])


def test_both_directions_of_pairs(vectors):
    pairs = {"de": (vectors.mean[:, 0], vectors.mean[:, 1])}
    found = layers.both_directions(pairs)["de"]
    for layer in range(5):
        hits = metrics.retrieval_hits(vectors.mean[layer, :2])
        assert found["to_pivot"][layer] == pytest.approx(float(hits[0, 1].mean()), rel=1e-5)
        assert found["from_pivot"][layer] == pytest.approx(float(hits[1, 0].mean()), rel=1e-5)


def test_the_projection_is_the_main_plane(vectors):
    found = layers.projection(vectors.mean, LANGUAGES, (0, 2, 2, 4))
    assert list(found) == ["0", "2", "4"]
    for name, one in found.items():
        x = vectors.mean[int(name), :, :30].reshape(-1, 8).astype(np.float64)
        oracle = PCA(2).fit(x)
        ours = np.concatenate([np.array(one["x"][code]) for code in LANGUAGES])
        assert ours.shape == (90, 2)
        np.testing.assert_allclose(np.abs(ours), np.abs(oracle.transform(x)), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(one["explained"], oracle.explained_variance_ratio_, rtol=1e-4)
