"""Means over spans as linear weights, compaction of the slots that hold pairs, and who meets whom."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

Scope = Literal["global", "micro-batch"]


def span_means(span_RxT: jax.Array, slots: int, dtype=jnp.float32) -> jax.Array:
    """Weights [R,S,T] whose product with hidden states [R,T,D] is the mean over each slot's span; 0 for an empty span.

    `span_RxT` holds slot numbers 1..S, 0 for none.
    """
    member_RxSxT = span_RxT[:, None, :] == jnp.arange(1, slots + 1, dtype=span_RxT.dtype)[None, :, None]
    count_RxSx1 = jnp.sum(member_RxSxT, axis=2, keepdims=True)
    return member_RxSxT.astype(dtype) / jnp.maximum(count_RxSx1, 1).astype(dtype)


def predicting(span_RxT: jax.Array, segments_RxT: jax.Array) -> jax.Array:
    """Moves a span one token to the left: the states that PREDICT its tokens, as the language matching loss pools them.

    A state of the segment before never stands for a span.
    """
    moved_RxT, next_RxT = (jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (span_RxT, segments_RxT))
    return jnp.where(next_RxT == segments_RxT, moved_RxT, 0)


def compact(valid_GxN: jax.Array, size: int) -> jax.Array:
    """Indices [G,size] that gather each group's valid slots to the front; the rest points at invalid ones.

    The pair losses cost n^2: gathering pays where most slots are empty. `size` has to cover the fullest group.
    """
    return jnp.argsort(~valid_GxN, axis=1, stable=True)[:, :size]


def meet(x_GxNx___: jax.Array, scope: Scope) -> jax.Array:
    """What each group's pairs meet: [G,M,...] with M = G n (global) or M = n (its own group)."""
    groups, n, *rest = x_GxNx___.shape
    if scope == "micro-batch":
        return x_GxNx___
    return jnp.broadcast_to(x_GxNx___.reshape(1, groups * n, *rest), (groups, groups * n, *rest))


def places(groups: int, n: int, scope: Scope) -> jax.Array:
    """[G,n] int: the place of each pair in what `meet` returns."""
    own_Gxn = jnp.arange(groups * n).reshape(groups, n)
    return own_Gxn if scope == "global" else own_Gxn % n
