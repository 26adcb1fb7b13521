"""Multilingual semantic alignment (paper section 3.1): InfoNCE between the two sentences of a pair."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from alignx_jax.objectives import blocks, pooling

BLOCK = 256
"""Anchors of each group whose similarities to all others exist at a time."""
_SMALLEST_NORM = 1e-8  # the published code's clamp


def _unit(x_GxNxD: jax.Array) -> jax.Array:
    squares = jnp.sum(x_GxNxD * x_GxNxD, axis=-1, keepdims=True)
    # The maximum is taken before the root: its gradient is 0, not NaN, at an empty slot's zero vector.
    return x_GxNxD / jnp.sqrt(jnp.maximum(squares, _SMALLEST_NORM**2))


def contrastive(
    source_GxNxD: jax.Array,
    target_GxNxD: jax.Array,
    valid_GxN: jax.Array,
    *ids_GxN: jax.Array,
    temperature: float,
    form: Literal["published", "symmetric"],
    scope: pooling.Scope,
    duplicates: Literal["mask", "keep"],
) -> jax.Array:
    """Sum over pairs j of -1/2 log softmax_i(cos(target_i, source_j) / tau) at i = j; divide it by the number of pairs.

    One direction and halved, as the published code computes it (each source against all targets); `symmetric` adds
    the other direction, so that the sum is the mean of both. With `duplicates="mask"` a pair i that shares an id
    with pair j (its source, its target or its line, in any of the arrays) is no negative of j: it says what j says.

    Args:
      source_GxNxD: pooled source sentences, float32 or float64.
      target_GxNxD: pooled target sentences.
      valid_GxN: which slots hold a pair; the others neither count nor act as negatives.
      ids_GxN: ids of each pair's source, of its target, of its line: equal numbers mean the same, across the arrays.
    """
    groups, n, _ = source_GxNxD.shape
    facts_GxN = valid_GxN, *ids_GxN
    row_facts = pooling.places(groups, n, scope), *facts_GxN
    column_facts = tuple(pooling.meet(x, scope) for x in facts_GxN)
    of_block = functools.partial(_of_block, temperature=temperature, duplicates=duplicates)

    def one_direction(anchor_GxNxD: jax.Array, other_GxNxD: jax.Array) -> jax.Array:
        others_GxMxD = pooling.meet(other_GxNxD, scope)
        return jnp.sum(blocks.sum_over_blocks(of_block, BLOCK, anchor_GxNxD, others_GxMxD, row_facts, column_facts))

    source_GxNxD, target_GxNxD = _unit(source_GxNxD), _unit(target_GxNxD)
    total = one_direction(source_GxNxD, target_GxNxD)
    if form == "symmetric":
        total += one_direction(target_GxNxD, source_GxNxD)
    return total


def cosines(
    source_GxNxD: jax.Array,
    target_GxNxD: jax.Array,
    valid_GxN: jax.Array,
    *ids_GxN: jax.Array,
    scope: pooling.Scope,
    duplicates: Literal["mask", "keep"],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean cosine of a source with its target, mean with the other targets that it meets, and their deviation.

    Arguments are those of `contrastive`. The mean of nothing is 0.
    """
    facts_GxN = valid_GxN, *ids_GxN
    row_facts = pooling.places(*valid_GxN.shape, scope), *facts_GxN
    others_GxMxD = pooling.meet(_unit(target_GxNxD), scope)
    cosine_GxNxM = _products(_unit(source_GxNxD), others_GxMxD)
    same_GxNxM, other_GxNxM = _meetings(row_facts, tuple(pooling.meet(x, scope) for x in facts_GxN), duplicates)

    def mean(x_GxNxM: jax.Array, where_GxNxM: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(where_GxNxM, x_GxNxM, 0)) / jnp.maximum(jnp.sum(where_GxNxM), 1)

    of_others = mean(cosine_GxNxM, other_GxNxM)
    deviation = jnp.sqrt(mean(jnp.square(cosine_GxNxM - of_others), other_GxNxM))
    return mean(cosine_GxNxM, same_GxNxM & valid_GxN[:, :, None]), of_others, deviation


def _products(anchor_GxBxD: jax.Array, other_GxMxD: jax.Array) -> jax.Array:
    return jnp.einsum("gbd,gmd->gbm", anchor_GxBxD, other_GxMxD, precision=jax.lax.Precision.HIGHEST)


def _meetings(row_facts, column_facts, duplicates: str) -> tuple[jax.Array, jax.Array]:
    """[G,B,M] twice: where an anchor meets its own pair, and where a pair that is a negative of it."""
    place_GxB, valid_GxB, *ids_GxB = row_facts
    valid_GxM, *ids_GxM = column_facts
    same_GxBxM = place_GxB[:, :, None] == jnp.arange(valid_GxM.shape[1])[None, None, :]
    negative_GxBxM = valid_GxB[:, :, None] & valid_GxM[:, None, :] & ~same_GxBxM
    if duplicates == "mask":
        for own_GxB in ids_GxB:
            for others_GxM in ids_GxM:
                negative_GxBxM &= own_GxB[:, :, None] != others_GxM[:, None, :]
    return same_GxBxM, negative_GxBxM


def _of_block(anchor_GxBxD, other_GxMxD, row_facts, column_facts, *, temperature: float, duplicates: str) -> jax.Array:
    """[G] sums of the losses of some anchors, which may be at any place among those that they meet."""
    valid_GxB = row_facts[1]
    same_GxBxM, negative_GxBxM = _meetings(row_facts, column_facts, duplicates)
    allowed_GxBxM = same_GxBxM | negative_GxBxM | ~valid_GxB[:, :, None]  # no softmax is empty, also without a pair
    logits_GxBxM = jnp.where(allowed_GxBxM, _products(anchor_GxBxD, other_GxMxD) / temperature, -jnp.inf)
    positive_GxB = jnp.sum(jnp.where(same_GxBxM, logits_GxBxM, 0), axis=-1)
    loss_GxB = jax.nn.logsumexp(logits_GxBxM, axis=-1) - positive_GxB
    return jnp.sum(jnp.where(valid_GxB, loss_GxB, 0), axis=-1) / 2


def weight(valid_GxN: jax.Array) -> jax.Array:
    """What `contrastive` is divided by: the number of pairs."""
    return jnp.sum(valid_GxN)
