"""Language feature integration (paper section 3.2): are the two sentences of an ordered pair in the same language?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from alignx_jax.objectives import pooling

BLOCK_ELEMENTS = 2**25  # of [rows, N, W] at a time on one device: 128 MiB in float32


class Classifier(NamedTuple):
    """Weights of the gated pair classifier, without bias: down(act(gate [e_i; e_j]) * up [e_i; e_j])."""

    gate_2DxW: jax.Array
    up_2DxW: jax.Array
    down_Wx2: jax.Array


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
    by block (rows of each group against everyone), computed again in the backward pass.

    Args:
      embedding_GxNxD: pooled sentences, sources and targets alike, float32 or float64.
      language_GxN: language ids; only equality matters.
      valid_GxN: which slots hold a sentence.
    """
    groups, n, _ = embedding_GxNxD.shape
    width = classifier.down_Wx2.shape[0]
    first, second = halves(embedding_GxNxD, classifier)
    columns_GxMxW = tuple(pooling.meet(x, scope) for x in second)
    language_GxM, valid_GxM = pooling.meet(language_GxN, scope), pooling.meet(valid_GxN, scope)
    block = max(1, min(n, BLOCK_ELEMENTS // (language_GxM.shape[1] * width)))
    blocks = -(-n // block)

    def in_blocks(x_GxNx___: jax.Array) -> jax.Array:
        padded = jnp.pad(x_GxNx___, ((0, 0), (0, blocks * block - n)) + ((0, 0),) * (x_GxNx___.ndim - 2))
        return jnp.moveaxis(padded.reshape(groups, blocks, block, *x_GxNx___.shape[2:]), 1, 0)

    @jax.checkpoint
    def add_block(total, row):
        *rows_GxBxW, language_GxB, valid_GxB = row
        logits_GxBxMx2 = pair_logits(rows_GxBxW, columns_GxMxW, classifier, activation)
        same_GxBxM = language_GxB[:, :, None] == language_GxM[:, None, :]
        chosen_GxBxM = jnp.where(same_GxBxM, logits_GxBxMx2[..., 1], logits_GxBxMx2[..., 0])
        loss_GxBxM = jax.nn.logsumexp(logits_GxBxMx2, axis=-1) - chosen_GxBxM
        counted_GxBxM = valid_GxB[:, :, None] & valid_GxM[:, None, :]
        return total + jnp.sum(jnp.where(counted_GxBxM, loss_GxBxM, 0)), None

    rows = tuple(map(in_blocks, (*first, language_GxN, valid_GxN)))
    return jax.lax.scan(add_block, jnp.zeros((), embedding_GxNxD.dtype), rows)[0]


Halves = tuple[jax.Array, jax.Array]
"""Of gate and up, [...,W] each: what one sentence of a pair adds to them."""


def halves(embedding___xD: jax.Array, classifier: Classifier) -> tuple[Halves, Halves]:
    """What each sentence adds as the first of a pair, and as the second."""
    d = embedding___xD.shape[-1]

    def project(kernel_DxW: jax.Array) -> jax.Array:
        return jnp.einsum("...d,dw->...w", embedding___xD, kernel_DxW, precision=jax.lax.Precision.HIGHEST)

    kernels = classifier.gate_2DxW, classifier.up_2DxW
    return tuple(project(k[:d]) for k in kernels), tuple(project(k[d:]) for k in kernels)


def pair_logits(
    first___xBxW: Sequence[jax.Array],
    second___xMxW: Sequence[jax.Array],
    classifier: Classifier,
    activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """[...,B,M,2] scores of "different" and "same language" of every first sentence with every second."""
    gate, up = (x[..., :, None, :] + y[..., None, :, :] for x, y in zip(first___xBxW, second___xMxW, strict=True))
    return jnp.einsum("...mw,wc->...mc", activation(gate) * up, classifier.down_Wx2, precision="highest")


def weight(valid_GxN: jax.Array, scope: pooling.Scope) -> jax.Array:
    """What `language_matching` is divided by: the number of ordered pairs of valid sentences."""
    per_group_G = jnp.sum(valid_GxN, axis=1, dtype=float)  # a global batch can have more than 2^31 ordered pairs
    return jnp.sum(per_group_G) ** 2 if scope == "global" else jnp.sum(per_group_G**2)
