"""Multilingual semantic alignment (paper section 3.1): InfoNCE between the two sentences of a pair."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from alignx_jax.objectives import pooling

_SMALLEST_NORM = 1e-8  # the published code's clamp


def _unit(x_GxNxD: jax.Array) -> jax.Array:
    squares = jnp.sum(x_GxNxD * x_GxNxD, axis=-1, keepdims=True)
    # The maximum is taken before the root: its gradient is 0, not NaN, at an empty slot's zero vector.
    return x_GxNxD / jnp.sqrt(jnp.maximum(squares, _SMALLEST_NORM**2))


def contrastive(
    source_GxNxD: jax.Array,
    target_GxNxD: jax.Array,
    valid_GxN: jax.Array,
    source_hash_GxN: jax.Array,
    target_hash_GxN: jax.Array,
    *,
    temperature: float,
    form: Literal["published", "symmetric"],
    scope: pooling.Scope,
    duplicates: Literal["mask", "keep"],
) -> jax.Array:
    """Sum over pairs j of -1/2 log softmax_i(cos(target_i, source_j) / tau) at i = j; divide it by the number of pairs.

    One direction and halved, as the published code computes it (each source against all targets); `symmetric` adds
    the other direction, so that the sum is the mean of both. With `duplicates="mask"` a pair i that shares a sentence
    with pair j (its source or its target, on either side) is no negative of j: its target, too, renders j's meaning.

    Args:
      source_GxNxD: pooled source sentences, float32 or float64.
      target_GxNxD: pooled target sentences.
      valid_GxN: which slots hold a pair; the others neither count nor act as negatives.
      source_hash_GxN: equal numbers mean equal sentences, across both hash arrays.
      target_hash_GxN: the same of the targets.
    """
    groups, n, _ = source_GxNxD.shape
    same_GxNxM = pooling.itself(groups, n, scope)
    allowed_GxNxM = pooling.meet(valid_GxN, scope)[:, None, :]
    if duplicates == "mask":
        others = [pooling.meet(h, scope)[:, None, :] for h in (source_hash_GxN, target_hash_GxN)]
        own = [h[:, :, None] for h in (source_hash_GxN, target_hash_GxN)]
        allowed_GxNxM &= ~(
            (own[0] == others[0]) | (own[0] == others[1]) | (own[1] == others[0]) | (own[1] == others[1])
        )
    allowed_GxNxM |= same_GxNxM  # an invalid slot keeps itself, so that no softmax is empty

    def one_direction(anchor_GxNxD: jax.Array, other_GxNxD: jax.Array) -> jax.Array:
        logits_GxNxM = jnp.einsum(
            "gnd,gmd->gnm",
            _unit(anchor_GxNxD),
            pooling.meet(_unit(other_GxNxD), scope),
            precision=jax.lax.Precision.HIGHEST,
        )
        logits_GxNxM = jnp.where(allowed_GxNxM, logits_GxNxM / temperature, -jnp.inf)
        positive_GxN = jnp.sum(jnp.where(same_GxNxM, logits_GxNxM, 0), axis=-1)
        loss_GxN = jax.nn.logsumexp(logits_GxNxM, axis=-1) - positive_GxN
        return jnp.sum(jnp.where(valid_GxN, loss_GxN, 0)) / 2

    total = one_direction(source_GxNxD, target_GxNxD)
    if form == "symmetric":
        total += one_direction(target_GxNxD, source_GxNxD)
    return total


def weight(valid_GxN: jax.Array) -> jax.Array:
    """What `contrastive` is divided by: the number of pairs."""
    return jnp.sum(valid_GxN)
