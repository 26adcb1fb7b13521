"""Measures of alignment: vectors of separately encoded parallel sentences in, numbers out; one layer at a time.

Arrays stay where they are committed and nothing waits for a result, so that a caller can give each device a layer.
Everything is computed in float32 (float64 where that is given), products in full precision, one pair of languages at a
time. At least two sentences are taken for granted.

A zero vector has cosine 0 with every vector; what would be 0/0 is 0, never NaN.

Shapes: K languages, N sentences (row n means the same in every language), D hidden size; M sentences of any language;
W width of the pair classifier.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignx_jax.exits import UserError
from alignx_jax.objectives import language_matching
from alignx_jax.objectives.language_matching import Classifier

_NEIGHBOURS = 4  # xSIM's k
_PROBE_SHARE = 0.8  # of the sentence numbers that the probe is trained on
_PROBE_STEPS = 200
_PROBE_TOLERANCE = 1e-4  # scikit-learn's, on the largest entry of the gradient
_PAIR_ELEMENTS = 2**25  # of [rows, M, W] of the pair classifier at a time: 128 MiB in float32

_einsum = functools.partial(jnp.einsum, precision="highest")


class Cosines(NamedTuple):
    """Of each language with the pivot, [K] each."""

    positive: jax.Array
    """Mean over sentences and their translations."""
    negative: jax.Array
    """Mean over all pairs of sentences that are no translations of each other."""


class CKA(NamedTuple):
    """Of each language with the pivot, [K] each."""

    plain: jax.Array
    debiased: jax.Array


class Collapse(NamedTuple):
    """Scalars; what they look like where all vectors have become one is in brackets."""

    total_variance: jax.Array
    """Trace of the covariance matrix (divisor N - 1) of a language's vectors, mean over languages [0]."""
    random_cosine: jax.Array
    """Mean cosine of all pairs of different sentences of one language, mean over languages [1]."""
    uniformity: jax.Array
    """log mean exp(-2 |u - v|^2) over the same pairs, of unit vectors, mean over languages [0]; at least -8."""


class Variance(NamedTuple):
    """Shares of the variance of all vectors."""

    language: jax.Array
    """Between the means of the languages."""
    meaning: jax.Array
    """Between the means, over languages, of sentences that say the same."""


class DALI(NamedTuple):
    """Of each item, [N] bool each."""

    aligned: jax.Array
    strict: jax.Array


class MatchingAccuracy(NamedTuple):
    """Shares of ordered pairs of two sentences that the pair classifier is right about."""

    accuracy: jax.Array
    """Over all pairs: of K languages with as many sentences each, "different" alone has about (K - 1) / K."""
    balanced: jax.Array
    """Mean of the next two; chance is 1/2."""
    same: jax.Array
    """Over pairs in the same language; 0 where there are none."""
    different: jax.Array
    """Over pairs in different languages; 0 where there are none."""


def _wide(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))


def _units(x___xD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Unit vectors [...,D], and which of them are zero vectors instead, [...] bool."""
    norm___x1 = jnp.linalg.norm(x___xD, axis=-1, keepdims=True)
    return x___xD / jnp.where(norm___x1 == 0, 1, norm___x1), norm___x1[..., 0] == 0


def _distances(x_NxD: jax.Array, y_MxD: jax.Array) -> jax.Array:
    """[N,M] 1 - cosine, exact where cosines are close to 1.

    States of LLMs have a large common part, and 1 - uv loses its digits. For unit vectors 1 - uv = |u - v|^2 / 2, from
    which any common vector can be taken first.
    """
    (u_NxD, no_u_N), (v_MxD, no_v_M) = _units(x_NxD), _units(y_MxD)
    common_D = (jnp.mean(u_NxD, axis=0) + jnp.mean(v_MxD, axis=0)) / 2
    u_NxD, v_MxD = u_NxD - common_D[None, :], v_MxD - common_D[None, :]
    of_u_N, of_v_M = (jnp.sum(jnp.square(a), axis=1) + no for a, no in ((u_NxD, no_u_N), (v_MxD, no_v_M)))
    return (of_u_N[:, None] + of_v_M[None, :]) / 2 - _einsum("nd,md->nm", u_NxD, v_MxD)


def _nearest(distance_NxN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the diagonal is strictly the least of its row, [N], and of its column, [N]."""
    own_N = jnp.diagonal(distance_NxN)
    others_NxN = jnp.where(jnp.eye(len(own_N), dtype=bool), jnp.inf, distance_NxN)
    return own_N < jnp.min(others_NxN, axis=1), own_N < jnp.min(others_NxN, axis=0)


@jax.jit
def retrieval_hits(x_KxNxD: jax.Array) -> jax.Array:
    """[K,K,N] bool: is sentence n of language b, by cosine, the nearest of b's sentences to sentence n of language a?

    A tie is no hit. [a,a] is True. The mean over n is the accuracy of bitext retrieval (arXiv 1812.10464, its Tatoeba
    test set; XTREME, arXiv 2003.11080).
    """
    k, n, _ = x_KxNxD.shape
    x_KxNxD = _wide(x_KxNxD)
    a_P, b_P = np.triu_indices(k, 1)
    found_PxN, back_PxN = jax.lax.map(lambda p: _nearest(_distances(x_KxNxD[p[0]], x_KxNxD[p[1]])), (a_P, b_P))
    return jnp.ones((k, k, n), bool).at[a_P, b_P].set(found_PxN).at[b_P, a_P].set(back_PxN)


@jax.jit
def pivot_hits(x_KxNxD: jax.Array, pivot: int) -> jax.Array:
    """[K,2,N] bool: as `retrieval_hits`, to the pivot and from the pivot; the pivot itself is retrieved from itself."""
    x_KxNxD = _wide(x_KxNxD)
    return jax.lax.map(lambda x_NxD: jnp.stack(_nearest(_distances(x_NxD, x_KxNxD[pivot]))), x_KxNxD)


@jax.jit
def xsim_errors(x_KxNxD: jax.Array, pivot: int) -> jax.Array:
    """[K,2,N] bool: xSIM's errors with ratio margin, k = 4, to the pivot and from the pivot (LASER's source/xsim.py).

    Candidates for a sentence x are its k nearest y of the other language by cosine; the one with the largest ratio
    margin is taken (arXiv 1811.01136): cos(x, y) over the mean of two means, that of x with its k nearest y and that
    of y with its k nearest x. A tie is an error; LASER takes one of the tied. Of fewer than k sentences, all are near.
    The mean over n is the error rate.
    """
    x_KxNxD = _wide(x_KxNxD)

    def errors(x_NxD: jax.Array) -> jax.Array:
        distance_NxN = _distances(x_NxD, x_KxNxD[pivot])
        to, back = _neighbours(distance_NxN), _neighbours(distance_NxN.T)
        return jnp.stack([_margin_errors(to, back), _margin_errors(back, to)])

    return jax.lax.map(errors, x_KxNxD)


def _neighbours(distance_NxN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Distances [N,k] and indices [N,k] of the nearest in each row."""
    near_Nxk, index_Nxk = jax.lax.top_k(-distance_NxN, min(_NEIGHBOURS, len(distance_NxN)))
    return -near_Nxk, index_Nxk


def _margin_errors(to: tuple[jax.Array, jax.Array], back: tuple[jax.Array, jax.Array]) -> jax.Array:
    """[N] bool, of one direction, from the `_neighbours` of both."""
    (near_Nxk, index_Nxk), (back_Nxk, _) = to, back
    mean_Nxk = (jnp.mean(near_Nxk, axis=1)[:, None] + jnp.mean(back_Nxk, axis=1)[index_Nxk]) / 2
    margin_Nxk = (mean_Nxk - near_Nxk) / (1 - mean_Nxk)  # the ratio of cosines, less 1: digits survive near 1
    own_Nxk = index_Nxk == jnp.arange(len(index_Nxk))[:, None]
    translation_N, others_N = (jnp.max(jnp.where(a, margin_Nxk, -jnp.inf), axis=1) for a in (own_Nxk, ~own_Nxk))
    return ~(translation_N > others_N)


@jax.jit
def mexa_hits(x_KxNxD: jax.Array, pivot: int) -> jax.Array:
    """[K,N] bool: is the cosine of sentence n with its pivot translation strictly greater than every other cosine of
    either of the two? MEXA is the mean over n (arXiv 2410.05873; cisnlp/MEXA's compute_mexa.py); it falls as N grows.
    """
    return jnp.all(pivot_hits(x_KxNxD, pivot), axis=1)


@jax.jit
def cosines(x_KxNxD: jax.Array, pivot: int) -> Cosines:
    """Mean cosine of translations, and of all other pairs of a sentence with one of the pivot's."""
    u_KxNxD, _ = _units(_wide(x_KxNxD))
    n, mean_KxD = u_KxNxD.shape[1], jnp.mean(u_KxNxD, axis=1)
    positive_K = _einsum("knd,nd->k", u_KxNxD, u_KxNxD[pivot]) / n
    return Cosines(positive_K, (n * _einsum("kd,d->k", mean_KxD, mean_KxD[pivot]) - positive_K) / (n - 1))


@jax.jit
def cka(x_KxNxD: jax.Array, pivot: int) -> CKA:
    """Linear CKA of each language's vectors with the pivot's: HSIC(X,Y) / sqrt(HSIC(X,X) HSIC(Y,Y)).

    Plain: HSIC is |X^T Y|_F^2 of centred columns (arXiv 1905.00414). Debiased: HSIC is the unbiased estimator (Song et
    al. 2012, Feature Selection via Dependence Maximization; in CKA: arXiv 2010.15327), so that unrelated vectors have
    about 0 however large D is. It can be negative. Both are 0 where the vectors of a language are all the same.

    Raises:
      UserError: fewer than 4 sentences, for which the unbiased estimator is not defined.
    """
    n = x_KxNxD.shape[1]
    if n < 4:
        raise UserError(f"--evaluation.sentences has {n} sentences, and debiased CKA needs 4 or more; give more")
    x_KxNxD = jax.lax.map(_centred, _wide(x_KxNxD))
    own_Kx2 = jax.lax.map(lambda x_NxD: _hsic(x_NxD, x_NxD), x_KxNxD)
    with_pivot_Kx2 = jax.lax.map(lambda x_NxD: _hsic(x_NxD, x_KxNxD[pivot]), x_KxNxD)
    square_Kx2 = own_Kx2 * own_Kx2[pivot][None, :]
    return CKA(*jnp.where(square_Kx2 > 0, with_pivot_Kx2 / jnp.sqrt(jnp.where(square_Kx2 > 0, square_Kx2, 1)), 0).T)


def _centred(x_NxD: jax.Array) -> jax.Array:
    """With mean 0 and sum of squares 1 (CKA does not depend on scale, float32 does); 0 where only rounding varies."""
    centred_NxD = x_NxD - jnp.mean(x_NxD, axis=0, keepdims=True)
    spread, rounding = jnp.sum(jnp.square(centred_NxD)), 8 * jnp.finfo(x_NxD.dtype).eps
    varies = spread > rounding**2 * jnp.sum(jnp.square(x_NxD))
    return jnp.where(varies, centred_NxD / jnp.sqrt(jnp.where(varies, spread, 1)), 0)


def _hsic(x_NxD: jax.Array, y_NxD: jax.Array) -> jax.Array:
    """[2] plain and debiased HSIC of centred vectors, less the factors that cancel in CKA.

    With K = X X^T and L = Y Y^T, |X^T Y|_F^2 is the sum of K * L: the smaller of the two products is formed. The rows
    of K sum to 0, so those of K without its diagonal, which the unbiased estimator takes, to minus that diagonal.
    """
    n, d = x_NxD.shape
    if n < d:
        every = jnp.sum(_einsum("nd,md->nm", x_NxD, x_NxD) * _einsum("nd,md->nm", y_NxD, y_NxD))
    else:
        every = jnp.sum(jnp.square(_einsum("nd,ne->de", x_NxD, y_NxD)))
    of_x_N, of_y_N = jnp.sum(jnp.square(x_NxD), axis=1), jnp.sum(jnp.square(y_NxD), axis=1)
    diagonal = jnp.sum(of_x_N * of_y_N)
    sums = jnp.sum(of_x_N) * jnp.sum(of_y_N) / ((n - 1) * (n - 2))
    return jnp.stack([every, every - diagonal * n / (n - 2) + sums])


@jax.jit
def collapse(x_KxNxD: jax.Array) -> Collapse:
    """Have the vectors of different sentences become one? Retrieval can rise while they do, and cosines always do.

    Nothing is sampled. Mean cosine of random pairs: the anisotropy of arXiv 1909.00512. Uniformity: L_uniform of
    arXiv 2005.10242 with t = 2.
    """
    x_KxNxD = _wide(x_KxNxD)
    n = x_KxNxD.shape[1]
    variance = jnp.mean(jnp.sum(jnp.var(x_KxNxD, axis=1, ddof=1), axis=1))
    u_KxNxD, _ = _units(x_KxNxD)
    pairs_K = jnp.sum(jnp.square(jnp.sum(u_KxNxD, axis=1)), axis=1) - jnp.sum(jnp.square(u_KxNxD), axis=(1, 2))

    def uniformity(x_NxD: jax.Array) -> jax.Array:
        less_1_NxN = jnp.expm1(-4 * _distances(x_NxD, x_NxD))  # |u - v|^2 is twice the distance
        return jnp.log1p(jnp.sum(jnp.where(jnp.eye(n, dtype=bool), 0, less_1_NxN)) / (n * (n - 1)))

    return Collapse(variance, jnp.mean(pairs_K) / (n * (n - 1)), jnp.mean(jax.lax.map(uniformity, x_KxNxD)))


@jax.jit
def variance(x_KxNxD: jax.Array) -> Variance:
    """How much of what vectors differ in is their language, and how much their meaning.

    The sums of squares of a two-way analysis of variance without replication (Fisher 1925, chapter 7), summed over D;
    what is left to 1 is neither. A probe tells languages apart long before language is most of the variance.
    """
    x_KxNxD = _wide(x_KxNxD)
    x_KxNxD = x_KxNxD - jnp.mean(x_KxNxD, axis=(0, 1), keepdims=True)
    every = jnp.mean(jnp.sum(jnp.square(x_KxNxD), axis=2))
    of_language, of_meaning = (jnp.mean(jnp.sum(jnp.square(jnp.mean(x_KxNxD, axis=a)), axis=1)) for a in (1, 0))
    every = jnp.where(every > 0, every, 1)
    return Variance(of_language / every, of_meaning / every)


def probe_split(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sentence numbers that the language probe is trained on, and those that it is tested on: a random 80 and 20 %."""
    order = np.random.default_rng(seed).permutation(n)
    train = min(max(round(_PROBE_SHARE * n), 1), n - 1)
    return order[:train], order[train:]


@functools.partial(jax.jit, static_argnames="seed")
def probe_hits(x_KxNxD: jax.Array, seed: int) -> jax.Array:
    """[K,n] bool: does a linear classifier tell the language of the n held-out sentences? Chance is 1/K.

    A sentence number is on one side of the split in every language, so no translation of a test sentence was trained
    on. Features have mean 0 and deviation 1 over the training sentences.
    """
    train, test = probe_split(x_KxNxD.shape[1], seed)
    x_KxNxD = _wide(x_KxNxD)
    mean_1x1xD, deviation_1x1xD = (f(x_KxNxD[:, train], axis=(0, 1), keepdims=True) for f in (jnp.mean, jnp.std))
    x_KxNxD = (x_KxNxD - mean_1x1xD) / jnp.where(deviation_1x1xD == 0, 1, deviation_1x1xD)
    kernel_DxK, bias_K = fit_probe(x_KxNxD[:, train])
    scores_KxNxK = _einsum("knd,dc->knc", x_KxNxD[:, test], kernel_DxK) + bias_K[None, None, :]
    return jnp.argmax(scores_KxNxK, axis=2) == jnp.arange(len(x_KxNxD))[:, None]


@jax.jit
def fit_probe(x_KxNxD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Kernel [D,K] and bias [K] of a multinomial logistic regression that tells the K languages apart.

    The minimum of the mean cross-entropy + |kernel|^2 / (2 K N), which is scikit-learn's LogisticRegression with C = 1;
    by L-BFGS, until no entry of the gradient exceeds 1e-4, for 200 steps at most.
    """
    k, n, d = x_KxNxD.shape

    def loss(params: tuple[jax.Array, jax.Array]) -> jax.Array:
        kernel_DxK, bias_K = params
        scores_KxNxK = _einsum("knd,dc->knc", x_KxNxD, kernel_DxK) + bias_K[None, None, :]
        own_KxN = jnp.diagonal(scores_KxNxK, axis1=0, axis2=2).T
        penalty = jnp.sum(jnp.square(kernel_DxK)) / (2 * k * n)
        return jnp.mean(jax.nn.logsumexp(scores_KxNxK, axis=2) - own_KxN) + penalty

    solver, value_and_grad = optax.lbfgs(), optax.value_and_grad_from_state(loss)

    def unfinished(carry) -> jax.Array:
        count, grad = (optax.tree.get(carry[1], name) for name in ("count", "grad"))
        largest = functools.reduce(jnp.maximum, (jnp.max(jnp.abs(g)) for g in grad))
        return (count == 0) | ((count < _PROBE_STEPS) & (largest > _PROBE_TOLERANCE))

    def step(carry):
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(params, updates), state

    start = jnp.zeros((d, k), x_KxNxD.dtype), jnp.zeros(k, x_KxNxD.dtype)
    return jax.lax.while_loop(unfinished, step, (start, solver.init(start)))[0]


@jax.jit
def dali(english_Nx2xD: jax.Array, other_Nx2xD: jax.Array) -> DALI:
    """Discriminative Alignment Index of two-option items; the vectors are those of a premise with each option (its
    authors take position-weighted means, and last tokens).

    Aligned: both cosines of an option with its translation are strictly greater than both of an option with the
    translation of the other option (arXiv 2504.09378; the comparisons are those of the authors' code,
    Kartik21/DALI_MATS, compute_alignment_xcopa.py, one more direction than the formula). Strict: they are strictly
    greater too than the cosine of the two options in English, and in the other language. (The authors' `_strict`
    scripts compute something else, with the label.) The mean over items is the language's index.
    """
    x_Nx4xD = jnp.concatenate([_wide(english_Nx2xD), _wide(other_Nx2xD)], axis=1)
    u_Nx4xD, no_Nx4 = _units(x_Nx4xD)

    def distance(a: int, b: int) -> jax.Array:  # 1 - cosine, as in `_distances`
        squares_N = jnp.sum(jnp.square(u_Nx4xD[:, a] - u_Nx4xD[:, b]), axis=1)
        return (squares_N + no_Nx4[:, a] + no_Nx4[:, b]) / 2

    matched_N = jnp.maximum(distance(0, 2), distance(1, 3))
    mismatched_N = jnp.minimum(distance(0, 3), distance(1, 2))
    within_N = jnp.minimum(distance(0, 1), distance(2, 3))
    aligned_N = matched_N < mismatched_N
    return DALI(aligned_N, aligned_N & (matched_N < within_N))


@functools.partial(jax.jit, static_argnames="activation")
def matching_accuracy(
    embedding_MxD: jax.Array,
    language_M: jax.Array,
    classifier: Classifier,
    activation: Callable[[jax.Array], jax.Array],
) -> MatchingAccuracy:
    """How often the trained pair classifier (arXiv 2509.24338, section 3.2) tells "same language" from "different".

    Every ordered pair of two sentences counts, as in the loss but without pairs of a sentence with itself. Equal scores
    mean "different".
    """
    first, second = language_matching.halves(_wide(embedding_MxD), classifier)
    m, width = first[0].shape

    def row(x: tuple[jax.Array, ...]) -> jax.Array:
        gate_W, up_W, language, place = x
        (odds_M,) = language_matching.log_odds((gate_W[None], up_W[None]), second, classifier.odds_W, activation)
        same_M, other_M = language_M == language, jnp.arange(m) != place
        right_M = (odds_M > 0) == same_M
        return jnp.stack([jnp.sum(a & other_M) for a in (right_M & same_M, right_M & ~same_M, same_M, ~same_M)])

    block = max(1, min(m, _PAIR_ELEMENTS // (m * width)))
    counts_Mx4 = jax.lax.map(row, (*first, language_M, jnp.arange(m)), batch_size=block)
    same, different, all_same, all_different = jnp.sum(counts_Mx4.astype(first[0].dtype), axis=0)
    of_same, of_different = same / jnp.maximum(all_same, 1), different / jnp.maximum(all_different, 1)
    return MatchingAccuracy((same + different) / (m * (m - 1)), (of_same + of_different) / 2, of_same, of_different)
