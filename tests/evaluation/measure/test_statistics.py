"""Bootstrap intervals against normal theory, scipy and exact properties of the resamples."""

import math

import numpy as np
import pytest
import scipy.stats

from alignx_jax.evaluation.measure import statistics


def test_counts_are_draws_with_replacement():
    counts = statistics.bootstrap_counts(50, 4000, seed=3)
    assert counts.shape == (4000, 50)
    np.testing.assert_array_equal(counts.sum(axis=1), 50)
    np.testing.assert_array_equal(counts, statistics.bootstrap_counts(50, 4000, seed=3))
    assert not np.array_equal(counts, statistics.bootstrap_counts(50, 4000, seed=4))
    covariance = np.cov(counts.T)  # multinomial: 1 - 1/n, and -1/n between two sentences
    np.testing.assert_allclose(counts.mean(axis=0), 1, atol=0.06)
    np.testing.assert_allclose(np.diag(covariance), 1 - 1 / 50, atol=0.12)
    np.testing.assert_allclose(covariance[~np.eye(50, dtype=bool)].mean(), -1 / 50, atol=0.002)


def test_a_mean_of_many_sentences_has_its_normal_theory_interval():
    hits = np.random.default_rng(0).random(1000) < 0.3
    found = statistics.mean(hits, statistics.bootstrap_counts(1000, 10000, seed=0)).interval()
    half = 1.959964 * hits.std() / np.sqrt(1000)
    assert found.value == hits.mean()
    np.testing.assert_allclose([found.low, found.high], [hits.mean() - half, hits.mean() + half], atol=0.05 * 2 * half)


def test_the_interval_is_scipys_percentile_interval():
    values = np.random.default_rng(1).exponential(size=40)  # skewed: the two ends lie differently far
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20000, rng=0
    ).confidence_interval
    found = statistics.mean(values, statistics.bootstrap_counts(40, 20000, seed=0)).interval()
    np.testing.assert_allclose([found.low, found.high], theirs, atol=0.03 * (theirs.high - theirs.low))


def test_every_mean_of_an_array_has_its_own_interval():
    counts = statistics.bootstrap_counts(30, 200, seed=0)
    values = np.random.default_rng(0).normal(size=(2, 3, 30))
    found = statistics.mean(values, counts).interval()
    assert found.value.shape == found.low.shape == found.high.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            means = [np.mean(np.repeat(values[i, j], row)) for row in counts]
            expected = [values[i, j].mean(), np.percentile(means, 2.5), np.percentile(means, 97.5)]
            np.testing.assert_allclose([f[i, j] for f in (found.value, found.low, found.high)], expected, rtol=1e-12)


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    before = rng.normal(size=200)
    counts = statistics.bootstrap_counts(200, 1000, seed=0)
    exact = (statistics.mean(before + 0.25, counts) - statistics.mean(before, counts)).interval()
    np.testing.assert_allclose([exact.value, exact.low, exact.high], 0.25, rtol=1e-12)
    hits = rng.random((2, 200)) < 0.5
    found = (statistics.mean(hits[1], counts) - statistics.mean(hits[0], counts)).interval()
    means = [np.mean(np.repeat(hits[1], row)) - np.mean(np.repeat(hits[0], row)) for row in counts]
    np.testing.assert_allclose([found.low, found.high], np.percentile(means, [2.5, 97.5]), rtol=1e-12)
    np.testing.assert_allclose(found.value, hits[1].mean() - hits[0].mean(), rtol=1e-12)


def test_an_average_is_taken_on_each_resample():
    """Two languages whose sentences are hit in turn: the mean of both is the same whatever is drawn."""
    hits, counts = np.arange(40) % 2, statistics.bootstrap_counts(40, 300, seed=0)
    found = statistics.average([statistics.mean(hits, counts), statistics.mean(1 - hits, counts)])
    np.testing.assert_allclose(found.triple(), 0.5, rtol=1e-12)
    assert statistics.mean(hits, counts).triple()[1] < 0.4


def test_resamples_on_which_a_score_is_not_defined_are_left_out():
    """A rate of the sentences with text, of which there are two of ten: every ninth resample has neither."""
    counts, hits, text = statistics.bootstrap_counts(10, 300, seed=0), np.zeros(10), np.zeros(10)
    hits[3], text[3:5] = 1, 1
    drawn = [np.repeat(np.arange(10), row) for row in counts]
    there = [d for d in drawn if text[d].any()]
    assert 20 < len(drawn) - len(there) < 60
    with np.errstate(invalid="ignore"):
        found = statistics.Resampled(0.5, (counts @ hits) / (counts @ text))
    expected = [0.5, *np.percentile([hits[d].sum() / text[d].sum() for d in there], [2.5, 97.5])]
    np.testing.assert_allclose(found.triple(), expected)
    twice = statistics.average([found, statistics.mean(np.arange(10), counts)])
    means = [(hits[d].sum() / text[d].sum() + d.mean()) / 2 for d in there]
    np.testing.assert_allclose(twice.triple()[1:], np.percentile(means, [2.5, 97.5]))
    assert statistics.Resampled(0.5, np.full(300, np.nan)).triple() is None


def test_a_score_of_sums_by_hand():
    """Bits per byte: a ratio of two sums over sentences, each sentence of a resample as often as it was drawn."""
    rng = np.random.default_rng(0)
    bits, size = rng.gamma(2, size=80), rng.integers(1, 50, 80)
    counts = statistics.bootstrap_counts(80, 300, seed=7)
    sums = counts @ np.stack([bits, size], axis=1)
    found = statistics.Resampled(bits.sum() / size.sum(), sums[:, 0] / sums[:, 1]).interval()
    drawn = [np.repeat(np.arange(80), row) for row in counts]
    low, high = np.percentile([bits[d].sum() / size[d].sum() for d in drawn], [2.5, 97.5])
    np.testing.assert_allclose([found.low, found.high], [low, high], rtol=1e-12)
    assert found.low < found.value < found.high


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = statistics.mean(rng.exponential(size=(2000, 100)), statistics.bootstrap_counts(100, 500, seed=0)).interval()
    covered = np.mean((found.low <= 1) & (found.high >= 1))
    assert 0.90 < covered < 0.96


def _wilson(hits, n, z=1.959963984540054):
    p = hits / n
    half = z * math.sqrt(z * z + 4 * n * p * (1 - p))
    return p, (2 * n * p + z * z - half) / (2 * (n + z * z)), (2 * n * p + z * z + half) / (2 * (n + z * z))


@pytest.mark.parametrize(
    "after, before, published", [((56, 70), (48, 80), (0.0524, 0.3339)), ((9, 10), (3, 10), (0.1705, 0.8090))]
)
def test_the_interval_of_a_difference_is_newcombes_method_10(after, before, published):
    """The values of his Table II, cases a and b."""
    change, low, high = statistics.difference(_wilson(*after), _wilson(*before))
    assert change == after[0] / after[1] - before[0] / before[1]
    assert (round(low, 4), round(high, 4)) == published
