"""Next-token cross-entropy, chunk by chunk: [R,T,V] logits never exist."""

from __future__ import annotations

import functools

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
    Logits are formed once, for `chunk` positions of each row at a time, in float32 (float64 if the states are): where
    a gradient is wanted it is taken of each chunk while its logits are there, so that nothing is computed again and
    memory depends on neither vocabulary times length.

    Args:
      hidden_RxTxD: states after the final norm, in the compute dtype.
      kernel_DxV: output weights in the master dtype, cast chunk by chunk; their gradient is summed in that dtype.
        Columns from `vocab_size` on are padding and get no probability.
    """
    labels_RxT, weights_RxT = (jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (tokens_RxT, loss_weights_RxT))
    return _cross_entropy(
        hidden_RxTxD, kernel_DxV, labels_RxT, weights_RxT, vocab_size, min(chunk, labels_RxT.shape[1])
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(hidden_RxTxD, kernel_DxV, labels_RxT, weights_RxT, vocab_size: int, chunk: int) -> jax.Array:
    def add_chunk(total, xs):
        states_RxCxD, labels_RxC, weights_RxC = xs
        return total + _of_chunk(states_RxCxD, kernel_DxV, labels_RxC, weights_RxC, vocab_size)[0], None

    xs = [_in_chunks(x, chunk) for x in (hidden_RxTxD, labels_RxT, weights_RxT)]
    return jax.lax.scan(add_chunk, jnp.zeros((), _high(hidden_RxTxD)), xs)[0]


def _forward(hidden_RxTxD, kernel_DxV, labels_RxT, weights_RxT, vocab_size: int, chunk: int):
    def add_chunk(carry, xs):
        (total, of_kernel_DxV), (states_RxCxD, labels_RxC, weights_RxC) = carry, xs
        loss, of_logits_RxCxV = _of_chunk(states_RxCxD, kernel_DxV, labels_RxC, weights_RxC, vocab_size)
        kernel, of_logits_RxCxV = (x.astype(states_RxCxD.dtype) for x in (kernel_DxV, of_logits_RxCxV))
        of_states_RxCxD = jnp.einsum("rcv,dv->rcd", of_logits_RxCxV, kernel)
        of_kernel_DxV += jnp.einsum(
            "rcd,rcv->dv", states_RxCxD, of_logits_RxCxV, preferred_element_type=of_kernel_DxV.dtype
        )
        return (total + loss, of_kernel_DxV), of_states_RxCxD

    xs = [_in_chunks(x, chunk) for x in (hidden_RxTxD, labels_RxT, weights_RxT)]
    start = jnp.zeros((), _high(hidden_RxTxD)), jnp.zeros_like(kernel_DxV)
    (total, of_kernel_DxV), of_states = jax.lax.scan(add_chunk, start, xs)
    rows, length, d = hidden_RxTxD.shape
    of_hidden_RxTxD = jnp.moveaxis(of_states, 0, 1).reshape(rows, -1, d)[:, :length]
    return total, (of_hidden_RxTxD, of_kernel_DxV)


def _backward(vocab_size: int, chunk: int, gradients, scale: jax.Array):
    return (*(g * scale.astype(g.dtype) for g in gradients), None, None)


_cross_entropy.defvjp(_forward, _backward)


def _of_chunk(states_RxCxD, kernel_DxV, labels_RxC, weights_RxC, vocab_size: int) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of a chunk's losses, and its gradient by the logits [R,C,V]."""
    high, padded = _high(states_RxCxD), kernel_DxV.shape[1]
    kernel = kernel_DxV.astype(states_RxCxD.dtype)
    logits_RxCxV = jnp.einsum("rcd,dv->rcv", states_RxCxD, kernel, preferred_element_type=high)
    column_V = jnp.arange(padded)
    if padded > vocab_size:
        logits_RxCxV = jnp.where((column_V < vocab_size)[None, None, :], logits_RxCxV, -jnp.inf)
    normalizer_RxC = jax.nn.logsumexp(logits_RxCxV, axis=-1)
    label_RxC = jnp.take_along_axis(logits_RxCxV, labels_RxC[..., None], axis=-1)[..., 0]
    weights_RxC = weights_RxC.astype(high)
    probability_RxCxV = jnp.exp(logits_RxCxV - normalizer_RxC[..., None])
    hit_RxCxV = labels_RxC[..., None] == column_V[None, None, :]
    return jnp.sum((normalizer_RxC - label_RxC) * weights_RxC), (probability_RxCxV - hit_RxCxV) * weights_RxC[..., None]


def _high(states: jax.Array) -> jnp.dtype:
    return jnp.promote_types(states.dtype, jnp.float32)


def _in_chunks(x_RxTx___: jax.Array, chunk: int) -> jax.Array:
    """[chunks,R,C,...], padded with zeros at the end, which have no weight."""
    rows, length, *rest = x_RxTx___.shape
    chunks = -(-length // chunk)
    padded = jnp.pad(x_RxTx___, ((0, 0), (0, chunks * chunk - length)) + ((0, 0),) * len(rest))
    return jnp.moveaxis(padded.reshape(rows, chunks, chunk, *rest), 1, 0)


def weight(loss_weights_RxT: jax.Array) -> jax.Array:
    """What `next_token` is divided by. A row's first token has no predecessor and never counts."""
    return jnp.sum(loss_weights_RxT[:, 1:])
