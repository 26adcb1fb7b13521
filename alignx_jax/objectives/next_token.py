"""Next-token cross-entropy, chunk by chunk: [R,T,V] logits never exist."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from alignx_jax import sharding


def next_token(
    hidden_RxTxD: jax.Array,
    embedding_VxD: jax.Array,
    tokens_RxT: jax.Array,
    loss_weights_RxT: jax.Array,
    *,
    vocab_size: int,
    chunk: int,
    cap: float | None = None,
) -> jax.Array:
    """Sum over t of loss_weights[t] * -log p(tokens[t] | state t-1); divide it by the sum of the weights.

    The weights alone decide what counts (0 for a segment's first token and for padding), never a pad id.
    Logits are formed once, for `chunk` positions of each row at a time, in float32 (float64 if the states are): where
    a gradient is wanted it is taken of each chunk while its logits are there, so that nothing is computed again and
    memory does not grow with vocabulary times length. Positions without weight, such as those of sentences encoded by
    themselves, cost next to nothing: each row's others come first, and chunks without any are passed over.

    Args:
      hidden_RxTxD: states after the final norm, in the compute dtype.
      embedding_VxD: output embedding in the master dtype, cast chunk by chunk; its gradient is summed in that dtype.
        Rows from `vocab_size` on are padding and get no probability.
      cap: c of logits c tanh(states . embedding / c); None: as the products are.
    """
    labels_RxT, weights_RxT = (jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (tokens_RxT, loss_weights_RxT))
    # What counts goes to the front of its row, so that chunks of nothing else need no logits.
    order_RxT = jnp.argsort(weights_RxT == 0, axis=1, stable=True)
    labels_RxT, weights_RxT = (jnp.take_along_axis(x, order_RxT, axis=1) for x in (labels_RxT, weights_RxT))
    hidden_RxTxD = jnp.take_along_axis(hidden_RxTxD, order_RxT[:, :, None], axis=1)
    chunk = min(chunk, labels_RxT.shape[1])
    return _cross_entropy(hidden_RxTxD, embedding_VxD, labels_RxT, weights_RxT, vocab_size, chunk, cap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _cross_entropy(hidden_RxTxD, embedding_VxD, labels_RxT, weights_RxT, vocab_size, chunk, cap) -> jax.Array:
    cast_VxD = sharding.constrain_vocabulary(embedding_VxD.astype(hidden_RxTxD.dtype))

    def add_chunk(total, xs):
        def add(total):
            states_NxD, labels_N, weights_N = map(sharding.constrain_to_vocabulary, xs)
            return total + _of_chunk(states_NxD, cast_VxD, labels_N, weights_N, vocab_size, cap)[0]

        return jax.lax.cond(jnp.any(xs[2] != 0), add, lambda total: total, total), None

    xs = [_in_chunks(x, chunk) for x in (hidden_RxTxD, labels_RxT, weights_RxT)]
    return jax.lax.scan(add_chunk, jnp.zeros((), _high(hidden_RxTxD)), xs)[0]


def _forward(hidden_RxTxD, embedding_VxD, labels_RxT, weights_RxT, vocab_size: int, chunk: int, cap: float | None):
    cast_VxD, high = sharding.constrain_vocabulary(embedding_VxD.astype(hidden_RxTxD.dtype)), _high(hidden_RxTxD)

    def add_chunk(carry, xs):
        nothing = jnp.zeros_like(xs[0])
        return jax.lax.cond(jnp.any(xs[2] != 0), add, lambda *same: (same[0], nothing), carry, xs)

    def add(carry, xs):
        total, of_embedding_VxD = carry
        states_NxD, labels_N, weights_N = map(sharding.constrain_to_vocabulary, xs)
        loss, of_logits_VxN = _of_chunk(states_NxD, cast_VxD, labels_N, weights_N, vocab_size, cap)
        of_logits_VxN = of_logits_VxN.astype(states_NxD.dtype)
        of_states_NxD = jnp.einsum("vn,vd->nd", of_logits_VxN, cast_VxD, preferred_element_type=high)
        of_embedding_VxD += jnp.einsum(
            "vn,nd->vd", of_logits_VxN, states_NxD, preferred_element_type=of_embedding_VxD.dtype
        )
        of_states_NxD = sharding.constrain(of_states_NxD, "rows").astype(states_NxD.dtype)
        return (total + loss, sharding.constrain_vocabulary(of_embedding_VxD)), of_states_NxD

    xs = [_in_chunks(x, chunk) for x in (hidden_RxTxD, labels_RxT, weights_RxT)]
    start = jnp.zeros((), high), sharding.constrain_vocabulary(jnp.zeros_like(embedding_VxD))
    (total, of_embedding_VxD), of_states = jax.lax.scan(add_chunk, start, xs)
    of_embedding_VxD = sharding.constrain_vocabulary(of_embedding_VxD)
    rows, length, d = hidden_RxTxD.shape
    of_hidden_RxTxD = jnp.moveaxis(of_states.reshape(-1, rows, chunk, d), 0, 1).reshape(rows, -1, d)[:, :length]
    return total, (of_hidden_RxTxD, of_embedding_VxD)


def _backward(vocab_size: int, chunk: int, cap: float | None, gradients, scale: jax.Array):
    return (*(g * scale.astype(g.dtype) for g in gradients), None, None)


_cross_entropy.defvjp(_forward, _backward)


def _of_chunk(states_NxD, cast_VxD, labels_N, weights_N, vocab_size: int, cap: float | None):
    """The weighted sum of a chunk's losses, and its gradient by the products of states and embedding [V,N].

    The vocabulary leads: in that order a CPU forms the three products faster (dev/decisions.md).
    """
    high, padded = _high(states_NxD), cast_VxD.shape[0]
    logits_VxN = jnp.einsum("vd,nd->vn", cast_VxD, states_NxD, preferred_element_type=high)
    if cap is not None:
        bent_VxN = jnp.tanh(logits_VxN / cap)
        logits_VxN = cap * bent_VxN
    row_Vx1 = jnp.arange(padded)[:, None]
    if padded > vocab_size:
        logits_VxN = jnp.where(row_Vx1 < vocab_size, logits_VxN, -jnp.inf)
    normalizer_N = jax.nn.logsumexp(logits_VxN, axis=0)
    label_N = jnp.take_along_axis(logits_VxN, labels_N[None], axis=0)[0]
    weights_N = weights_N.astype(high)
    of_logits_VxN = jnp.exp(logits_VxN - normalizer_N[None]) - (row_Vx1 == labels_N[None])
    if cap is not None:
        of_logits_VxN *= 1 - jnp.square(bent_VxN)
    return jnp.sum((normalizer_N - label_N) * weights_N), of_logits_VxN * weights_N[None]


def _high(states: jax.Array) -> jnp.dtype:
    return jnp.promote_types(states.dtype, jnp.float32)


def _in_chunks(x_RxTx___: jax.Array, chunk: int) -> jax.Array:
    """[chunks,N,...], N = R * chunk tokens, padded with zeros at the end of the rows, which have no weight."""
    rows, length, *rest = x_RxTx___.shape
    chunks = -(-length // chunk)
    padded = jnp.pad(x_RxTx___, ((0, 0), (0, chunks * chunk - length)) + ((0, 0),) * len(rest))
    return jnp.moveaxis(padded.reshape(rows, chunks, chunk, *rest), 1, 0).reshape(chunks, rows * chunk, *rest)


def weight(loss_weights_RxT: jax.Array) -> jax.Array:
    """What `next_token` is divided by. A row's first token has no predecessor and never counts."""
    return jnp.sum(loss_weights_RxT[:, 1:])
