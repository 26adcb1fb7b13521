"""Standardized states against dense NumPy in float64, values and gradients; and what is degenerate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignx_jax.objectives.contrastive import contrastive
from alignx_jax.objectives.language_matching import Classifier, language_matching
from alignx_jax.objectives.standardization import standardize
from tests.objectives.test_objectives import central_difference, dense_contrastive, dense_matching, x64  # noqa: F401


def dense(x_NxD):
    """Every sentence counts once."""
    return (x_NxD - x_NxD.mean(axis=0)) / x_NxD.std(axis=0)


@pytest.fixture
def pooled():
    """Sources and targets of 3 groups of 4 slots, 9 of them pairs; a long common direction, as real models have one.
    Empty slots hold numbers that must not count."""
    rng = np.random.default_rng(0)
    valid = np.array([[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 0]], bool)
    vectors = 100 * rng.normal(size=6) + rng.normal(size=(2, 3, 4, 6)) * [1, 0.1, 10, 1, 3, 1]
    return vectors, valid


def together(vectors, valid):
    return np.concatenate(list(vectors), axis=1), np.tile(valid, (1, 2))


@pytest.mark.parametrize("scope", ["global", "micro-batch"])
def test_mean_and_deviation_of_the_sentences_that_meet(x64, pooled, scope):  # noqa: F811
    x_GxNxD, valid_GxN = together(*pooled)
    got = np.asarray(standardize(jnp.asarray(x_GxNxD), jnp.asarray(valid_GxN), scope))
    if scope == "global":
        np.testing.assert_allclose(got[valid_GxN], dense(x_GxNxD[valid_GxN]), rtol=1e-10)
    else:
        for x_NxD, valid_N, ours_NxD in zip(x_GxNxD, valid_GxN, got, strict=True):
            np.testing.assert_allclose(ours_NxD[valid_N], dense(x_NxD[valid_N]), rtol=1e-10)


def losses_of(vectors, valid, scope):
    """Both losses of standardized states, as functions of the vectors alone; ours and the dense formula."""
    rng = np.random.default_rng(1)
    weights = Classifier(*(rng.normal(size=shape) for shape in ((12, 5), (12, 5), (5, 2))))
    languages = rng.integers(3, size=(2, *valid.shape))
    ids = jnp.arange(2 * valid.size).reshape(2, *valid.shape)

    def ours(vectors):
        both = jnp.tile(valid, (1, 2))
        x = standardize(jnp.concatenate(list(vectors), axis=1), both, scope)
        pairs = *jnp.split(x, 2, axis=1), valid, ids[0], ids[1]
        total = contrastive(*pairs, temperature=0.5, form="published", scope=scope, duplicates="keep")
        codes = jnp.concatenate(list(languages), axis=1)
        return total + language_matching(x, codes, both, weights, activation=jax.nn.silu, scope=scope)

    def of_group(vectors, valid, languages):
        n = valid.sum()
        x = dense(np.concatenate([of[valid] for of in vectors]))
        codes = np.concatenate([of[valid] for of in languages])
        return dense_contrastive(x[:n], x[n:], 0.5, np.ones((n, n), bool)) + dense_matching(x, codes, weights)

    def by_hand(vectors):
        if scope == "global":
            return of_group(vectors, valid, languages)
        return sum(of_group(vectors[:, g], valid[g], languages[:, g]) for g in range(len(valid)))

    return ours, by_hand


@pytest.mark.parametrize("scope", ["global", "micro-batch"])
def test_both_losses_and_their_gradients(x64, pooled, scope):  # noqa: F811
    vectors, valid = pooled
    ours, by_hand = losses_of(vectors, valid, scope)
    value, gradient = jax.value_and_grad(ours)(jnp.asarray(vectors))
    np.testing.assert_allclose(value, by_hand(vectors), rtol=1e-10)
    assert not gradient[:, ~valid].any(), "an empty slot takes no part"
    for entry in ((0, 0, 0, 0), (1, 0, 3, 1), (0, 1, 2, 2), (1, 2, 1, 5)):
        slope = central_difference(lambda arrays: by_hand(arrays[0]), [vectors], 0, entry)
        np.testing.assert_allclose(gradient[entry], slope, rtol=1e-5, atol=1e-8)


def test_scale_and_common_direction_change_nothing(x64, pooled):  # noqa: F811
    x_GxNxD, valid_GxN = together(*pooled)
    moved = x_GxNxD * 7 + np.arange(6.0)
    a, b = (standardize(jnp.asarray(x), jnp.asarray(valid_GxN), "global") for x in (x_GxNxD, moved))
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("which", ["a constant dimension", "equal vectors", "one sentence", "an empty batch"])
def test_what_does_not_vary_is_zero_and_has_no_gradient(pooled, which):
    """In float32, with values that it cannot hold exactly."""
    x_GxNxD, valid_GxN = (np.array(x) for x in together(*pooled))
    x_GxNxD = x_GxNxD.astype(np.float32)
    flat = np.ones(6, bool)
    match which:
        case "a constant dimension":
            x_GxNxD[..., 2], flat = 1234.567, np.arange(6) == 2
        case "equal vectors":
            x_GxNxD[:] = 0.1 + 1000 * np.arange(6, dtype=np.float32)
        case "one sentence":
            valid_GxN[:] = np.arange(24).reshape(3, 8) == 5
        case "an empty batch":
            valid_GxN[:] = False
    weight = np.random.default_rng(2).normal(size=x_GxNxD.shape).astype(np.float32) * valid_GxN[..., None]

    def some(x):
        return jnp.sum(weight * standardize(x, jnp.asarray(valid_GxN), "global"))

    got = np.asarray(standardize(jnp.asarray(x_GxNxD), jnp.asarray(valid_GxN), "global"))
    gradient = np.asarray(jax.grad(some)(jnp.asarray(x_GxNxD)))
    assert not got[valid_GxN][:, flat].any() and not gradient[..., flat].any()
    assert np.isfinite(got).all() and np.isfinite(gradient).all()
    assert flat.all() or gradient[..., ~flat].any()
