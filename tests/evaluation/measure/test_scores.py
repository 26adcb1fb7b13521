"""Scores: functions of sums over sentences, and their means, on every resample."""

import functools

import numpy as np

from alignx_jax.evaluation.measure import scores, statistics
from alignx_jax.evaluation.measure.scores import Place, Score, Sums

counts = functools.partial(statistics.bootstrap_counts, resamples=30, seed=2)


def on_resamples(values_N, of):
    return [of(np.repeat(values_N, drawn, axis=0)) for drawn in counts(len(values_N))]


def test_a_function_of_sums_is_that_of_the_sentences_of_each_resample():
    sums_NxS = np.random.default_rng(0).gamma(3, size=(7, 2))
    score = scores.of_sums(Sums(0.5, sums_NxS, lambda sums: sums[..., 0] / sums[..., 1]))
    expected = on_resamples(sums_NxS, lambda x: x[:, 0].sum() / x[:, 1].sum())
    np.testing.assert_allclose(score.resampled(counts).resampled_Bx___, expected, rtol=1e-12)
    assert (score.value, score.n, score.resampled(counts).value) == (0.5, 7, 0.5)


def test_a_mean_of_languages_has_the_same_sentences_in_each_resample():
    hits = np.random.default_rng(0).random((2, 9)) < 0.5
    mean = scores.mean(scores.of_sums(scores.mean_of(x)) for x in hits)
    np.testing.assert_allclose(mean.resampled(counts).resampled_Bx___, on_resamples(hits.T, np.mean), rtol=1e-12)
    assert mean.value == hits.mean() and mean.n == 9


def test_a_mean_is_resampled_where_all_of_its_parts_are():
    one = scores.of_sums(scores.mean_of(np.array([0.0, 1.0])))
    mixed = scores.mean([one, Score(1.0, 3)])
    assert (mixed.value, mixed.n, mixed.parts, mixed.resampled(counts)) == (0.75, None, (), None)


def test_a_place_is_of_no_layer_direction_or_language_unless_said():
    assert Place("retrieval") == ("retrieval", None, None, None)
