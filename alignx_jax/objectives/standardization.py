"""Pooled states measured against the batch: each dimension less its mean, in units of its standard deviation.

The states of a pre-trained model share a direction that is many times longer than what tells sentences apart, so that
their cosines are all near 1 and the losses flat (docs/method.md). Here every dimension has mean 0 and deviation 1 over
the sentences that meet. The gradient flows through both statistics.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from alignx_jax.objectives import pooling

Standardize = Literal["batch", "none"]
_LEAST_DEVIATION = 1e-5  # of a dimension's root mean square: below it float32 holds nothing but rounding


def standardize(x_GxNxD: jax.Array, valid_GxN: jax.Array, scope: pooling.Scope) -> jax.Array:
    """`x` less its mean over the valid sentences that meet, by their deviation, dimension by dimension; [G,N,D].

    Sources and targets are given together, as two parts of N. A dimension in which all valid sentences agree becomes 0
    and passes no gradient; so one sentence, equal sentences and an empty batch give zeros.

    Args:
      x_GxNxD: pooled sentences, float32 or float64.
      valid_GxN: which slots hold a sentence; the others do not count, and are shifted and scaled like the rest.
      scope: the statistics are those of all groups (global), or of each group (micro-batch).
    """
    axes = (0, 1) if scope == "global" else (1,)
    counts = valid_GxN[:, :, None].astype(x_GxNxD.dtype)
    number = jnp.maximum(jnp.sum(counts, axis=axes, keepdims=True), 1)

    def mean(y_GxNxD: jax.Array) -> jax.Array:
        return jnp.sum(counts * y_GxNxD, axis=axes, keepdims=True) / number

    center = mean(x_GxNxD)
    centered_GxNxD = x_GxNxD - center
    variance = mean(jnp.square(centered_GxNxD))
    varies = variance > _LEAST_DEVIATION**2 * (variance + jnp.square(center))
    return centered_GxNxD * jnp.where(varies, jax.lax.rsqrt(jnp.where(varies, variance, 1)), 0)
