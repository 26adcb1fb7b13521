"""A sum over pairs, formed block by block and never whole."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from alignx_jax import sharding

Arrays = Any
"""A tree of arrays [G,...], G groups."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sum_over_blocks(
    loss: Callable[[Arrays, Arrays, Arrays, Arrays], jax.Array],
    size: int,
    rows: Arrays,
    columns: Arrays,
    row_facts: Arrays,
    column_facts: Arrays,
) -> jax.Array:
    """`loss(rows, columns, row_facts, column_facts)`, a sum over rows for each group [G], `size` rows at a time.

    Where a gradient is wanted it is taken of each block while that block exists, as in `next_token`: what follows is
    linear in the sum. So nothing is computed again, and nothing of the size of all pairs is kept.

    Args:
      rows: float arrays [G,n,...], of which `loss` gets blocks.
      columns: float arrays, of which it gets all every time.
      row_facts: arrays [G,n,...] that no gradient is wanted of. Rows may be added, of zeros and False in all arrays:
        they must cost nothing.
      column_facts: the same of the columns.
    """
    groups, block, _ = _blocks(size, rows, row_facts)

    def add(total_G: jax.Array, xs) -> tuple[jax.Array, None]:
        return total_G + loss(xs[0], columns, xs[1], column_facts), None

    return jax.lax.scan(add, jnp.zeros(groups, _dtype(rows)), block)[0]


def _forward(loss, size: int, rows, columns, row_facts, column_facts):
    groups, block, n = _blocks(size, rows, row_facts)

    def add(carry, xs):
        (total_G, of_columns), (some_rows, some_facts) = carry, xs
        value_G, pull = jax.vjp(lambda r, c: loss(r, c, some_facts, column_facts), some_rows, columns)
        of_rows, also_of_columns = jax.tree.map(sharding.constrain_groups, pull(jnp.ones_like(value_G)))
        return (total_G + value_G, jax.tree.map(jnp.add, of_columns, also_of_columns)), of_rows

    start = jnp.zeros(groups, _dtype(rows)), jax.tree.map(jnp.zeros_like, columns)
    (total_G, of_columns), of_rows = jax.lax.scan(add, start, block)
    whole = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(groups, -1, *x.shape[3:])[:, :n], of_rows)
    return total_G, (whole, of_columns)


def _backward(loss, size: int, gradients, scale_G: jax.Array):
    def scaled(x_Gx___: jax.Array) -> jax.Array:
        return x_Gx___ * scale_G.reshape(-1, *(1,) * (x_Gx___.ndim - 1))

    return (*jax.tree.map(scaled, gradients), None, None)


sum_over_blocks.defvjp(_forward, _backward)


def _blocks(size: int, rows: Arrays, row_facts: Arrays) -> tuple[int, Arrays, int]:
    """Number of groups, everything of the rows as [blocks,G,B,...] with blocks as even as they can be, and n."""
    groups, n = jax.tree.leaves(rows)[0].shape[:2]
    blocks = -(-n // size)
    size = -(-n // blocks)

    def cut(x_GxNx___: jax.Array) -> jax.Array:
        padded = jnp.pad(x_GxNx___, ((0, 0), (0, blocks * size - n)) + ((0, 0),) * (x_GxNx___.ndim - 2))
        return jnp.moveaxis(padded.reshape(groups, blocks, size, *x_GxNx___.shape[2:]), 1, 0)

    return groups, jax.tree.map(cut, (rows, row_facts)), n


def _dtype(rows: Arrays) -> jnp.dtype:
    return jax.tree.leaves(rows)[0].dtype
