"""Language feature integration (paper section 3.2): are the two sentences of an ordered pair in the same language?"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from alignx_jax.objectives import pooling

_BLOCK_ELEMENTS = 2**25  # of [rows, N, W] at a time on one device: 128 MiB in float32


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
    groups, n, d = embedding_GxNxD.shape
    width = classifier.down_Wx2.shape[0]

    def project(kernel_DxW: jax.Array) -> jax.Array:
        return jnp.einsum("gnd,dw->gnw", embedding_GxNxD, kernel_DxW, precision=jax.lax.Precision.HIGHEST)

    columns = (
        pooling.meet(project(classifier.gate_2DxW[d:]), scope),
        pooling.meet(project(classifier.up_2DxW[d:]), scope),
        pooling.meet(language_GxN, scope),
        pooling.meet(valid_GxN, scope),
    )
    met = columns[0].shape[1]
    block = max(1, min(n, _BLOCK_ELEMENTS // (met * width)))
    blocks = -(-n // block)

    def in_blocks(x_GxNx___: jax.Array) -> jax.Array:
        padded = jnp.pad(x_GxNx___, ((0, 0), (0, blocks * block - n)) + ((0, 0),) * (x_GxNx___.ndim - 2))
        return jnp.moveaxis(padded.reshape(groups, blocks, block, *x_GxNx___.shape[2:]), 1, 0)

    rows = tuple(
        in_blocks(x)
        for x in (project(classifier.gate_2DxW[:d]), project(classifier.up_2DxW[:d]), language_GxN, valid_GxN)
    )

    @jax.checkpoint
    def add_block(total, row):
        gate, up, language, valid = (
            (r[:, :, None], c[:, None, :]) for r, c in zip(row, columns, strict=True)
        )  # rows against columns: [G,block,M] and, for gate and up, [...,W]
        hidden_GxBxMxW = activation(gate[0] + gate[1]) * (up[0] + up[1])
        logits_GxBxMx2 = jnp.einsum("gbmw,wc->gbmc", hidden_GxBxMxW, classifier.down_Wx2, precision="highest")
        same_GxBxM = language[0] == language[1]
        chosen_GxBxM = jnp.where(same_GxBxM, logits_GxBxMx2[..., 1], logits_GxBxMx2[..., 0])
        loss_GxBxM = jax.nn.logsumexp(logits_GxBxMx2, axis=-1) - chosen_GxBxM
        return total + jnp.sum(jnp.where(valid[0] & valid[1], loss_GxBxM, 0)), None

    return jax.lax.scan(add_block, jnp.zeros((), embedding_GxNxD.dtype), rows)[0]


def weight(valid_GxN: jax.Array, scope: pooling.Scope) -> jax.Array:
    """What `language_matching` is divided by: the number of ordered pairs of valid sentences."""
    per_group_G = jnp.sum(valid_GxN, axis=1, dtype=float)  # a global batch can have more than 2^31 ordered pairs
    return jnp.sum(per_group_G) ** 2 if scope == "global" else jnp.sum(per_group_G**2)
