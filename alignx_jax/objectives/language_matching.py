"""Language feature integration (paper section 3.2): are the two sentences of an ordered pair in the same language?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from alignx_jax.objectives import blocks, pooling

BLOCK = 64
"""Sentences on either side whose pairs, [BLOCK, BLOCK, W] of each group, exist at a time: 2 MiB in float32, so that a
CPU has them in its caches (dev/decisions.md)."""


class Classifier(NamedTuple):
    """Weights of the gated pair classifier, without bias: down(act(gate [e_i; e_j]) * up [e_i; e_j])."""

    gate_2DxW: jax.Array
    up_2DxW: jax.Array
    down_Wx2: jax.Array

    @property
    def odds_W(self) -> jax.Array:
        """What a hidden unit adds to the log-odds of "same language"; the cross-entropy of two classes sees no more."""
        return self.down_Wx2[:, 1] - self.down_Wx2[:, 0]


def language_matching(
    embedding_GxNxD: jax.Array,
    language_GxN: jax.Array,
    valid_GxN: jax.Array,
    classifier: Classifier,
    *,
    activation: Callable[[jax.Array], jax.Array],
    scope: pooling.Scope,
) -> jax.Array:
    """Sum over ordered pairs (i, j), i = j included, of the cross-entropy of "same language"; divide it by `weight`.

    W [e_i; e_j] = W[:D] e_i + W[D:] e_j: the products cost O(N D W), the pairs O(N^2 W), and pairs exist only block
    by block, some of each group's rows against some of everyone.

    Args:
      embedding_GxNxD: pooled sentences, sources and targets alike, float32 or float64.
      language_GxN: language ids; only equality matters.
      valid_GxN: which slots hold a sentence.
    """
    first, second = halves(embedding_GxNxD, classifier)
    columns_GxMxW = tuple(pooling.meet(x, scope) for x in second)
    odds_GxW = jnp.broadcast_to(classifier.odds_W, (embedding_GxNxD.shape[0], classifier.odds_W.shape[0]))
    facts_GxN = language_GxN, valid_GxN
    facts_GxM = tuple(pooling.meet(x, scope) for x in facts_GxN)
    of_block = functools.partial(_of_block, activation=activation)

    def of_rows(rows_GxBxW, columns, facts_GxB, facts_GxM) -> jax.Array:
        columns_GxMxW, odds_GxW = columns
        return blocks.sum_over_blocks(of_block, BLOCK, columns_GxMxW, (rows_GxBxW, odds_GxW), facts_GxM, facts_GxB)

    return jnp.sum(blocks.sum_over_blocks(of_rows, BLOCK, first, (columns_GxMxW, odds_GxW), facts_GxN, facts_GxM))


def _of_block(columns_GxMxW, rows, facts_GxM, facts_GxB, *, activation) -> jax.Array:
    """[G] sums of the cross-entropies of every row with every column."""
    (rows_GxBxW, odds_GxW), (language_GxB, valid_GxB), (language_GxM, valid_GxM) = rows, facts_GxB, facts_GxM
    odds_GxBxM = log_odds(rows_GxBxW, columns_GxMxW, odds_GxW, activation)
    same_GxBxM = language_GxB[:, :, None] == language_GxM[:, None, :]
    loss_GxBxM = jax.nn.softplus(jnp.where(same_GxBxM, -odds_GxBxM, odds_GxBxM))
    counted_GxBxM = valid_GxB[:, :, None] & valid_GxM[:, None, :]
    return jnp.sum(jnp.where(counted_GxBxM, loss_GxBxM, 0), axis=(1, 2))


Halves = tuple[jax.Array, jax.Array]
"""Of gate and up, [...,W] each: what one sentence of a pair adds to them."""


def halves(embedding___xD: jax.Array, classifier: Classifier) -> tuple[Halves, Halves]:
    """What each sentence adds as the first of a pair, and as the second."""
    d = embedding___xD.shape[-1]
    kernels = classifier.gate_2DxW, classifier.up_2DxW
    # One product, so that its gradient is one array of the size of the embeddings, and not the sum of four.
    kernel_Dx4W = jnp.concatenate([k[:d] for k in kernels] + [k[d:] for k in kernels], axis=1)
    projected = jnp.einsum("...d,dw->...w", embedding___xD, kernel_Dx4W, precision=jax.lax.Precision.HIGHEST)
    gate, up, second_gate, second_up = jnp.split(projected, 4, axis=-1)
    return (gate, up), (second_gate, second_up)


def log_odds(
    first___xBxW: Sequence[jax.Array],
    second___xMxW: Sequence[jax.Array],
    odds___xW: jax.Array,
    activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """[...,B,M] log-odds of "same language" for every first sentence with every second."""
    gate, up = (x[..., :, None, :] + y[..., None, :, :] for x, y in zip(first___xBxW, second___xMxW, strict=True))
    return jnp.einsum("...bmw,...w->...bm", activation(gate) * up, odds___xW, precision="highest")


def weight(valid_GxN: jax.Array, scope: pooling.Scope) -> jax.Array:
    """What `language_matching` is divided by: the number of ordered pairs of valid sentences."""
    per_group_G = jnp.sum(valid_GxN, axis=1, dtype=float)  # a global batch can have more than 2^31 ordered pairs
    return jnp.sum(per_group_G) ** 2 if scope == "global" else jnp.sum(per_group_G**2)
