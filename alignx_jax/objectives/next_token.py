"""Next-token cross-entropy, chunk by chunk: [R,T,V] logits never exist."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def next_token(
    hidden_RxTxD: jax.Array,
    kernel_DxV: jax.Array,
    tokens_RxT: jax.Array,
    loss_weights_RxT: jax.Array,
    *,
    vocab_size: int,
    chunk: int,
) -> jax.Array:
    """Sum over t of loss_weights[t] * -log p(tokens[t] | state t-1); divide it by the sum of the weights.

    The weights alone decide what counts (0 for a segment's first token and for padding), never a pad id.
    Logits are formed for `chunk` positions of each row at a time, accumulated in float32 (float64 if the states are)
    and computed again in the backward pass, so that memory depends on neither vocabulary times length.

    Args:
      hidden_RxTxD: states after the final norm, in the compute dtype.
      kernel_DxV: output weights in the master dtype, cast chunk by chunk so that their gradient sums in it;
        columns from `vocab_size` on are padding and get no probability.
    """
    rows, length, _ = hidden_RxTxD.shape
    chunk = min(chunk, length)
    chunks = -(-length // chunk)
    high = jnp.promote_types(hidden_RxTxD.dtype, jnp.float32)

    def in_chunks(x_RxTx___: jax.Array) -> jax.Array:
        padded = jnp.pad(x_RxTx___, ((0, 0), (0, chunks * chunk - length)) + ((0, 0),) * (x_RxTx___.ndim - 2))
        return jnp.moveaxis(padded.reshape(rows, chunks, chunk, *x_RxTx___.shape[2:]), 1, 0)

    def shifted(x_RxT: jax.Array) -> jax.Array:
        return jnp.pad(x_RxT[:, 1:], ((0, 0), (0, 1)))

    @jax.checkpoint
    def add_chunk(total, xs):
        states_RxCxD, labels_RxC, weights_RxC = xs
        logits_RxCxV = jnp.einsum(
            "rcd,dv->rcv", states_RxCxD, kernel_DxV.astype(states_RxCxD.dtype), preferred_element_type=high
        )
        if kernel_DxV.shape[1] > vocab_size:
            real_V = jnp.arange(kernel_DxV.shape[1]) < vocab_size
            logits_RxCxV = jnp.where(real_V[None, None, :], logits_RxCxV, -jnp.inf)
        label_RxC = jnp.take_along_axis(logits_RxCxV, labels_RxC[..., None], axis=-1)[..., 0]
        loss_RxC = jax.nn.logsumexp(logits_RxCxV, axis=-1) - label_RxC
        return total + jnp.sum(loss_RxC * weights_RxC.astype(high)), None

    xs = (in_chunks(hidden_RxTxD), in_chunks(shifted(tokens_RxT)), in_chunks(shifted(loss_weights_RxT)))
    return jax.lax.scan(add_chunk, jnp.zeros((), high), xs)[0]


def weight(loss_weights_RxT: jax.Array) -> jax.Array:
    """What `next_token` is divided by. A row's first token has no predecessor and never counts."""
    return jnp.sum(loss_weights_RxT[:, 1:])
