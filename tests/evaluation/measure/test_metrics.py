"""Every measure against its definition, written out in float64 loops; ties, zero, equal and nearly equal vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignx_jax.evaluation.measure import metrics
from alignx_jax.exits import UserError
from alignx_jax.objectives.language_matching import Classifier

PIVOT = 1


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def sentences(n=37, d=24, languages=4, common=0.0, noise=1.0, seed=0):
    """Meaning + language + noise, around a vector of length `common` that all share; retrieval finds about half."""
    rng = np.random.default_rng(seed)
    meaning, language = rng.normal(size=(1, n, d)), rng.normal(size=(languages, 1, d))
    shared = common * rng.normal(size=d) / np.sqrt(d)
    spread = noise * np.arange(1, languages + 1)[:, None, None] / languages
    x = meaning + 0.5 * language + 2 * spread * rng.normal(size=(languages, n, d)) + shared
    return x.astype(np.float32)


def cosine(u, v):
    u, v = (np.asarray(a, np.float64) for a in (u, v))
    length = np.linalg.norm(u) * np.linalg.norm(v)
    return u @ v / length if length else 0.0


def matrix(x, y):
    """Exact enough for vectors that differ in the sixth digit: in extended precision."""
    x, y = (np.asarray(a, np.longdouble) for a in (x, y))
    norms = [np.sqrt((a * a).sum(axis=1)) for a in (x, y)]
    u, v = (a / np.where(norm == 0, 1, norm)[:, None] for a, norm in zip((x, y), norms, strict=True))
    return np.array([[(a * b).sum() for b in v] for a in u])


def dense_hits(c):
    return np.array([all(c[i, i] > c[i, j] for j in range(len(c)) if j != i) for i in range(len(c))])


def dense_xsim(c, k=4, candidates=None):
    """LASER's definition; `candidates` other than k is not it."""
    k = min(k, len(c))
    to, back = (np.argsort(-a, axis=1, kind="stable") for a in (c, c.T))
    mean_to = [np.mean([c[i, j] for j in to[i, :k]]) for i in range(len(c))]
    mean_back = [np.mean([c[i, j] for i in back[j, :k]]) for j in range(len(c))]
    errors = np.zeros(len(c), bool)
    for i in range(len(c)):
        margin = {j: c[i, j] / ((mean_to[i] + mean_back[j]) / 2) for j in to[i, : candidates or k]}
        errors[i] = not (i in margin and all(margin[i] > m for j, m in margin.items() if j != i))
    return errors


def test_retrieval_mexa_and_xsim_are_their_definitions():
    x = sentences(seed=1)
    hits, errors = metrics.retrieval_hits(x), metrics.xsim_errors(x, PIVOT)
    assert hits.shape == (4, 4, 37) and hits.dtype == bool and errors.shape == (4, 2, 37)
    others = []
    for a in range(4):
        for b in range(4):
            np.testing.assert_array_equal(hits[a, b], dense_hits(matrix(x[a], x[b])) if a != b else True)
        c = matrix(x[a], x[PIVOT])
        np.testing.assert_array_equal(metrics.pivot_hits(x, PIVOT)[a], [dense_hits(c), dense_hits(c.T)])
        np.testing.assert_array_equal(metrics.mexa_hits(x, PIVOT)[a], dense_hits(c) & dense_hits(c.T))
        np.testing.assert_array_equal(errors[a], [dense_xsim(c), dense_xsim(c.T)])
        definitions = dense_xsim(c), dense_xsim(c, k=3), dense_xsim(c, candidates=37), ~dense_hits(c)
        others.append([found.mean() for found in definitions])
    shares = np.mean(hits[0, 1:], axis=1)
    assert 0.1 < shares.min() < shares.max() < 0.98
    assert len(np.unique(others, axis=1).T) == 4  # the data tell these four definitions apart
    assert metrics.mexa_hits(x, PIVOT)[PIVOT].all() and not errors[PIVOT].any()


@pytest.mark.parametrize("common", [30, 30000])
def test_a_large_common_vector_costs_no_digits(common):
    x = sentences(n=60, d=64, common=common, noise=2.5)
    assert np.mean([cosine(a, b) for a in x[0, :5] for b in x[0, 5:10]]) > 0.8
    exact = [matrix(y, x[PIVOT]) for y in x]
    expected = np.array([[dense_hits(c), dense_hits(c.T)] for c in exact])
    np.testing.assert_array_equal(metrics.pivot_hits(x, PIVOT), expected)
    np.testing.assert_array_equal(metrics.mexa_hits(x, PIVOT), expected.all(axis=1))
    xsim = [[dense_xsim(c), dense_xsim(c.T)] for c in exact]
    np.testing.assert_array_equal(metrics.xsim_errors(x, PIVOT), xsim)
    if common == 30000:  # where products of unit vectors are not enough
        u = x / np.linalg.norm(x, axis=2, keepdims=True)
        assert any((dense_hits(y @ u[PIVOT].T) != e[0]).any() for y, e in zip(u, expected, strict=True))
    different = ~np.eye(60, dtype=bool)
    uniformity = np.mean([np.log(np.exp(-4 * (1 - matrix(y, y)))[different].mean()) for y in x])
    np.testing.assert_allclose(metrics.collapse(x).uniformity, float(uniformity), rtol=1e-4)


def test_a_tie_is_no_hit():
    """Sentences 2 and 4 mean the same: in both languages, and in one of them only."""
    x = np.random.default_rng(0).normal(size=(1, 6, 8)).repeat(2, axis=0).astype(np.float32)
    x[:, 4] = x[:, 2]
    alone = np.array([True, True, False, True, False, True])
    np.testing.assert_array_equal(metrics.pivot_hits(x, 0)[1], [alone, alone])
    np.testing.assert_allclose(metrics.mexa_hits(x, 0).mean(axis=-1), 4 / 6, rtol=1e-6)
    np.testing.assert_allclose(metrics.xsim_errors(x, 0).mean(axis=-1), 2 / 6, rtol=1e-6)
    x[0, 4] += 0.1
    hits = metrics.retrieval_hits(x)
    np.testing.assert_array_equal(hits[0, 1], alone)
    np.testing.assert_array_equal(hits[1, 0], [True, True, True, True, False, True])
    np.testing.assert_allclose(metrics.mexa_hits(x, 0)[1].mean(), 4 / 6, rtol=1e-6)


@pytest.mark.parametrize("n,d", [(5, 3), (37, 100), (130, 17), (257, 64)])
def test_equal_vectors_tie_wherever_they_stand(n, d):
    """Products of equal vectors have to be equal in every place of the matrix."""
    rng = np.random.default_rng(n)
    x = np.repeat(rng.normal(size=(1, n, d)), 2, axis=0).astype(np.float32)
    pairs = rng.permutation(n)[: n // 2 * 2].reshape(2, -1)
    x[:, pairs[1]] = x[:, pairs[0]]
    expected = np.setdiff1d(np.arange(n), pairs)
    np.testing.assert_array_equal(np.flatnonzero(metrics.retrieval_hits(x)[0, 1]), expected)
    np.testing.assert_allclose(metrics.mexa_hits(x, 0).mean(axis=-1), len(expected) / n, atol=1e-6)


def test_collapsed_and_zero_vectors_score_nothing_and_never_nan():
    x = np.broadcast_to(sentences(n=1, languages=1), (4, 37, 24))
    for same in (x, 0 * x):
        assert not metrics.retrieval_hits(same)[0, 1:].any()
        assert not metrics.mexa_hits(same, PIVOT).any()
        assert metrics.xsim_errors(same, PIVOT).all()
        np.testing.assert_array_equal(metrics.cka(same, PIVOT), 0)
        np.testing.assert_allclose(metrics.probe_hits(same, 0).mean(), 1 / 4, rtol=1e-6)
        np.testing.assert_array_equal(metrics.dali(same[0, :, None].repeat(2, 1), same[1, :, None].repeat(2, 1)), False)
    one = sentences()
    one[:, 3] = 0
    c = np.array([[cosine(a, b) for b in one[PIVOT]] for a in one[0]])
    np.testing.assert_array_equal(metrics.retrieval_hits(one)[0, PIVOT], dense_hits(c))
    with np.errstate(invalid="ignore"):  # 0/0 of the zero vectors: not greater than anything, an error
        expected = [dense_xsim(c), dense_xsim(c.T)]
    np.testing.assert_array_equal(metrics.xsim_errors(one, PIVOT)[0], expected)
    for value in jax.tree.leaves((metrics.cosines(one, PIVOT), metrics.cka(one, PIVOT), metrics.collapse(one))):
        assert np.isfinite(value).all()


def test_two_sentences():
    x = np.array([[[1, 0], [0, 1]], [[1, 0.1], [0.2, 1]], [[0, 1], [1, 0]]], np.float32)
    np.testing.assert_array_equal(metrics.retrieval_hits(x).all(axis=2), [[1, 1, 0], [1, 1, 0], [0, 0, 1]])
    np.testing.assert_array_equal(metrics.mexa_hits(x, 0).mean(axis=-1), [1, 1, 0])
    np.testing.assert_array_equal(metrics.xsim_errors(x, 0).mean(axis=-1), [[0, 0], [0, 0], [1, 1]])
    negative = [0, np.mean([0.1 / 1.01**0.5, 0.2 / 1.04**0.5]), 1]
    np.testing.assert_allclose(metrics.cosines(x, 0).negative, negative, rtol=1e-6)
    assert 0 <= metrics.probe_hits(x, 0).mean() <= 1
    with pytest.raises(UserError, match=r"--evaluation.sentences has 2 sentences, and debiased CKA needs 4"):
        metrics.cka(x, 0)


def test_xsim_of_fewer_sentences_than_neighbours():
    x = sentences(n=3, noise=2.0, seed=3)
    expected = [[dense_xsim(c), dense_xsim(c.T)] for c in (matrix(y, x[0]) for y in x)]
    assert 0 < np.mean(expected) < 1
    np.testing.assert_array_equal(metrics.xsim_errors(x, 0), expected)


def test_cosines_of_all_pairs():
    x = sentences(common=3)
    found = metrics.cosines(x, PIVOT)
    for k in range(4):
        c = np.array([[cosine(a, b) for b in x[PIVOT]] for a in x[k]])
        np.testing.assert_allclose(found.positive[k], np.diag(c).mean(), rtol=1e-5)
        np.testing.assert_allclose(found.negative[k], c[~np.eye(37, dtype=bool)].mean(), rtol=1e-5)
    np.testing.assert_allclose(found.positive[PIVOT], 1, rtol=1e-6)


def dense_cka(x, y):
    """Gram matrices, centred by H; Song et al.'s estimator with its traces and its vectors of ones."""
    k, m = (np.asarray(a, np.float64) @ np.asarray(a, np.float64).T for a in (x, y))
    n, one = len(k), np.ones(len(k))
    h = np.eye(n) - 1 / n

    def debiased(k, m):
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        return (np.trace(k @ m) + middle - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))

    def plain(k, m):
        return np.trace(k @ h @ m @ h) / (n - 1) ** 2

    return [hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m)) for hsic in (plain, debiased)]


@pytest.mark.parametrize("n,d", [(37, 24), (24, 100), (4, 4)])
@pytest.mark.parametrize("common", [0, 30])
def test_cka_by_either_product(n, d, common):
    x = sentences(n=n, d=d, common=common)
    expected = np.array([dense_cka(y, x[PIVOT]) for y in x])
    np.testing.assert_allclose(np.stack(metrics.cka(x, PIVOT), axis=1), expected, rtol=2e-4)
    np.testing.assert_allclose(expected[PIVOT], 1)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(d, d)))[0].astype(np.float32)
    turned = np.concatenate([1e9 * x[:1] @ rotation, x[1:]])
    np.testing.assert_allclose(metrics.cka(turned, PIVOT).debiased, expected[:, 1], rtol=1e-3)


def test_debiased_cka_of_unrelated_vectors_is_about_zero():
    x = np.random.default_rng(0).normal(size=(2, 60, 1000)).astype(np.float32)
    found = metrics.cka(x, 0)
    assert found.plain[1] > 0.9 and abs(found.debiased[1]) < 0.03


def test_float64_stays_float64(x64):
    x = jnp.asarray(sentences(common=5), jnp.float64)
    found = metrics.cka(x, PIVOT)
    assert found.plain.dtype == jnp.float64
    np.testing.assert_allclose(np.stack(found, axis=1), [dense_cka(y, x[PIVOT]) for y in x], rtol=1e-10)
    positive = [np.mean([cosine(a, b) for a, b in zip(y, x[PIVOT], strict=True)]) for y in x]
    np.testing.assert_allclose(metrics.cosines(x, PIVOT).positive, positive, rtol=1e-12)


def test_collapse_over_every_pair():
    x = sentences(common=2)
    found = metrics.collapse(x)
    variance, pairs, potential = [], [], []
    for y in x.astype(np.float64):
        variance.append(np.trace(np.cov(y.T)))
        u = y / np.linalg.norm(y, axis=1, keepdims=True)
        different = [(i, j) for i in range(37) for j in range(37) if i < j]
        pairs.append(np.mean([u[i] @ u[j] for i, j in different]))
        potential.append(np.log(np.mean([np.exp(-2 * np.sum((u[i] - u[j]) ** 2)) for i, j in different])))
    np.testing.assert_allclose(found, [np.mean(a) for a in (variance, pairs, potential)], rtol=2e-5)
    same = metrics.collapse(np.broadcast_to(x[:, :1], x.shape))
    np.testing.assert_allclose(same, [0, 1, 0], atol=2e-6)


def test_variance_is_divided_between_language_and_meaning():
    x = sentences(common=2)
    wide = x.astype(np.float64)
    centre = wide.mean(axis=(0, 1))
    every = sum(np.sum((wide[k, n] - centre) ** 2) for k in range(4) for n in range(37))
    language = sum(37 * np.sum((wide[k].mean(axis=0) - centre) ** 2) for k in range(4))
    meaning = sum(4 * np.sum((wide[:, n].mean(axis=0) - centre) ** 2) for n in range(37))
    np.testing.assert_allclose(metrics.variance(x), [language / every, meaning / every], rtol=1e-5)
    means = np.random.default_rng(0).normal(size=(1, 37, 24)).astype(np.float32)
    np.testing.assert_allclose(metrics.variance(np.repeat(means, 4, axis=0)), [0, 1], atol=1e-5)
    languages = np.repeat(means[:, :4].reshape(4, 1, 24), 37, axis=1)
    np.testing.assert_allclose(metrics.variance(languages), [1, 0], atol=1e-5)
    np.testing.assert_array_equal(metrics.variance(np.ones((4, 37, 24), np.float32)), 0)


def test_the_probe_is_scikit_learns_logistic_regression():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x = sentences(n=60, d=12, languages=5, common=20)
    x[..., 3], x[..., 4] = 0, 7  # features that never change
    train, test = metrics.probe_split(60, seed=5)
    assert len(train) == 48 and sorted([*train, *test]) == list(range(60))
    assert not np.array_equal(train, np.sort(train))
    np.testing.assert_array_equal(metrics.probe_split(60, seed=5)[0], train)
    assert not np.array_equal(metrics.probe_split(60, seed=6)[0], train)

    x[:, test[:2], 0] *= 100  # not to be seen in training
    scaler = StandardScaler().fit(x[:, train].reshape(-1, 12).astype(np.float64))
    features = scaler.transform(x.reshape(-1, 12)).reshape(x.shape)
    language = np.arange(5)[:, None]
    theirs = LogisticRegression(C=1, tol=1e-8, max_iter=5000).fit(
        features[:, train].reshape(-1, 12), np.broadcast_to(language, (5, 48)).ravel()
    )
    accuracy = theirs.score(features[:, test].reshape(-1, 12), np.broadcast_to(language, (5, 12)).ravel())
    assert 0.3 < accuracy < 0.95
    np.testing.assert_allclose(metrics.probe_hits(x, 5).mean(), accuracy, rtol=1e-6)

    kernel, bias = metrics.fit_probe(jnp.asarray(features[:, train], jnp.float32))

    def loss(kernel, bias):
        scores = features[:, train] @ kernel + bias
        own = np.take_along_axis(scores, np.broadcast_to(language[..., None], (5, 48, 1)), axis=2)[..., 0]
        return np.mean(np.log(np.exp(scores).sum(axis=2)) - own) + np.sum(kernel**2) / (2 * 5 * 48)

    least = loss(theirs.coef_.T, theirs.intercept_)
    np.testing.assert_allclose(loss(np.asarray(kernel, np.float64), np.asarray(bias, np.float64)), least, rtol=1e-5)
    np.testing.assert_allclose(kernel, theirs.coef_.T, atol=5e-3)


def test_the_probe_is_at_chance_where_languages_are_alike_and_sure_where_they_differ():
    rng = np.random.default_rng(0)
    alike = rng.normal(size=(4, 300, 8)).astype(np.float32)
    assert abs(metrics.probe_hits(alike, 0).mean() - 0.25) < 0.1
    apart = alike + 20 * np.eye(4, 8, dtype=np.float32)[:, None]
    assert metrics.probe_hits(apart, 0).mean() == 1


def test_dali_compares_matched_with_mismatched_options():
    rng = np.random.default_rng(0)
    meaning = rng.normal(size=(200, 2, 6))
    english, other = (meaning + 0.7 * rng.normal(size=meaning.shape) + shift for shift in (0.0, rng.normal(size=6)))
    found = metrics.dali(english.astype(np.float32), other.astype(np.float32))
    for n in range(200):
        e, o = english[n], other[n]
        matched, mismatched = [cosine(e[i], o[i]) for i in (0, 1)], [cosine(e[i], o[1 - i]) for i in (0, 1)]
        aligned = all(m > w for m in matched for w in mismatched)
        strict = aligned and all(m > w for m in matched for w in (cosine(*e), cosine(*o)))
        assert (found.aligned[n], found.strict[n]) == (aligned, strict)
    assert 0.2 < found.strict.mean() < found.aligned.mean() - 0.05 < 0.95


def test_dali_of_equal_options_is_zero():
    english = np.ones((1, 2, 3), np.float32)
    assert not metrics.dali(english, english).aligned[0]
    apart = np.array([[[1, 0, 0], [0, 1, 0]]], np.float32)
    assert metrics.dali(apart, apart).strict[0]
    assert not metrics.dali(apart, apart[:, ::-1]).aligned[0]


@pytest.mark.parametrize("block", [2**25, 23 * 5 * 4, 1])
def test_the_matching_head_on_every_ordered_pair(monkeypatch, block):
    monkeypatch.setattr(metrics, "_PAIR_ELEMENTS", block)
    rng = np.random.default_rng(0)
    embedding, language = rng.normal(size=(23, 6)).astype(np.float32), rng.integers(0, 3, 23)
    classifier = Classifier(*(rng.normal(size=shape).astype(np.float32) for shape in ((12, 5), (12, 5), (5, 2))))
    gate, up, down = (w.astype(np.float64) for w in classifier)
    right = {True: [], False: []}
    for i in range(23):
        for j in range(23):
            if i != j:
                pair = np.concatenate([embedding[i], embedding[j]]).astype(np.float64)
                scores = (pair @ gate / (1 + np.exp(-(pair @ gate))) * (pair @ up)) @ down
                same = bool(language[i] == language[j])
                right[same].append((scores[1] > scores[0]) == same)
    metrics.matching_accuracy.clear_cache()
    found = metrics.matching_accuracy(embedding, language, classifier, jax.nn.silu)
    same, different = np.mean(right[True]), np.mean(right[False])
    expected = np.mean(right[True] + right[False]), (same + different) / 2, same, different
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    alone = metrics.matching_accuracy(embedding[:4], np.arange(4), classifier, jax.nn.silu)
    assert alone.same == 0 and alone.accuracy == alone.different


def test_results_stay_on_the_device_of_the_vectors():
    device = jax.devices()[3]
    x = jax.device_put(sentences(n=8), device)
    found = metrics.pivot_hits(x, PIVOT), metrics.cka(x, PIVOT), metrics.probe_hits(x, 0)
    assert all(value.devices() == {device} for value in jax.tree.leaves(found))
