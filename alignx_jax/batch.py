"""The one struct that flows from the data to the step."""

from __future__ import annotations

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """R packed rows of T tokens with at most S examples a row. NumPy arrays on the host, jax.Arrays in the step.

    Within a row the examples have slot numbers 1..S in order; slot s of a row owns column s-1 of the [R,S] arrays.
    In stage 2 no token belongs to a span and no slot is valid.
    """

    tokens: jax.Array
    """[R,T] int32 token ids; 0 where there is none."""
    positions: jax.Array
    """[R,T] int32 position of the token in its own example."""
    segments: jax.Array
    """[R,T] int32 attention stays inside: an example's slot number, 0 for padding. Sentences that an example encodes
    once more by themselves have segments of their own, S and 2S above its slot number."""
    loss_weights: jax.Array
    """[R,T] float32 weight of the token as a LABEL of the next-token loss; 0 for a segment's first token."""
    source_span: jax.Array
    """[R,T] int32 slot number where the token is part of that example's source sentence, else 0."""
    target_span: jax.Array
    """[R,T] int32 the same for the target sentence."""
    source_language: jax.Array
    """[R,S] int32 language id of each slot's source sentence; only equality matters."""
    target_language: jax.Array
    """[R,S] int32"""
    source_hash: jax.Array
    """[R,S] int32 hash of the source sentence's text: equal sentences are equal, whatever side they are on."""
    target_hash: jax.Array
    """[R,S] int32"""
    line_hash: jax.Array
    """[R,S] int32 hash of the sentence that stands for the meaning of the pair's line, in any language: the pairs of a
    multi-way line share it, and a pair with that very sentence has it as one of its own."""
    valid: jax.Array
    """[R,S] bool: the slot holds a pair with a non-empty source and target span."""
