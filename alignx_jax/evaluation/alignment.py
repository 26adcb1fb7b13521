"""How close the languages are: bitext retrieval, layer by layer, on sentences encoded separately.

Inside the training prompt a target's states have attended to the source; any score taken there is inflated. Here each
sentence is a segment of its own, BOS and the bare text, and sees nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from alignx_jax import sharding
from alignx_jax.config import UserError
from alignx_jax.data import packing
from alignx_jax.data.tokenizer import Tokenizer
from alignx_jax.models.decoder import Decoder
from alignx_jax.objectives import pooling

_SLOTS = 16  # most sentences a row


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Accuracy@1 of one language against the pivot, for every layer; index l is the state after l layers."""

    language: str
    to_pivot: list[float]
    """Share of sentences whose nearest pivot sentence by cosine is their translation."""
    from_pivot: list[float]
    """The same from the pivot."""

    @property
    def mean(self) -> list[float]:
        """Of both directions."""
        return [(a + b) / 2 for a, b in zip(self.to_pivot, self.from_pivot, strict=True)]


def sentence_vectors(
    decoder: Decoder, tokenizer: Tokenizer, sentences: Sequence[str], mesh: Mesh, *, rows: int, row_length: int, dtype
) -> np.ndarray:
    """Mean states of each sentence's tokens (BOS left out) at every layer: [L+1,N,D] float32.

    Args:
      rows: rows of `row_length` tokens encoded at a time, a multiple of the mesh's data axes; sentences are packed.

    Raises:
      UserError: a sentence longer than a row.
    """
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = [np.array([*bos, *i], np.int32) for i, _ in tokenizer.encode_batch(list(sentences))]
    longest = max(range(len(ids)), key=lambda n: len(ids[n]))
    if len(ids[longest]) > row_length:
        raise UserError(
            f"evaluation sentence {longest + 1} has {len(ids[longest])} tokens, a row {row_length}; "
            "raise --data.row-length"
        )
    plan = packing.plan(np.array([len(i) for i in ids]), row_length, _SLOTS, np.arange(len(ids)))
    graph, params = nnx.split(decoder)
    vectors = np.zeros((decoder.config.num_layers + 1, len(ids), decoder.config.hidden_size), np.float32)
    for first in range(0, len(plan), rows):
        members = [plan[r] if r < len(plan) else [] for r in range(first, first + rows)]
        packed = [
            packing.assemble(
                [packing.PackedExample(ids[n], 1, (len(bos), len(ids[n])), (0, 0), (0, 0), (0, 0)) for n in row],
                row_length,
                _SLOTS,
            )
            for row in members
        ]
        arrays = (np.stack([getattr(p, name) for p in packed]) for name in _FIELDS)
        pooled_PxRxKxD = _pooled(params, *(sharding.place_rows(a, mesh) for a in arrays), graph=graph, dtype=dtype)
        host_PxRxKxD = np.asarray(pooled_PxRxKxD)
        for r, row in enumerate(members):
            vectors[:, row] = host_PxRxKxD[:, r, : len(row)]
    return vectors


def all_vectors(
    decoder: Decoder, tokenizer: Tokenizer, sentences: Mapping[str, Sequence[str]], mesh: Mesh, **options
) -> dict[str, np.ndarray]:
    """`sentence_vectors` of every language, [L+1,N,D] each, encoded in one go."""
    everything = [sentence for language in sentences.values() for sentence in language]
    vectors_LxNxD = sentence_vectors(decoder, tokenizer, everything, mesh, **options)
    ends = np.cumsum([len(language) for language in sentences.values()])[:-1]
    return dict(zip(sentences, np.split(vectors_LxNxD, ends, axis=1), strict=True))


_FIELDS = ("tokens", "positions", "segments", "source_span")


@functools.partial(jax.jit, static_argnames=("graph", "dtype"))
def _pooled(params, tokens_RxT, positions_RxT, segments_RxT, span_RxT, *, graph, dtype):
    decoder = nnx.merge(graph, params)
    out = decoder(
        tokens_RxT,
        positions_RxT,
        segments_RxT,
        compute_dtype=dtype,
        remat="none",
        pool_RxKxT=pooling.span_means(span_RxT, _SLOTS, jnp.float32),
        pooled_layers=tuple(range(decoder.config.num_layers + 1)),
    )
    return out.pooled_PxRxKxD


def accuracy_at_1(x_NxD: np.ndarray, y_NxD: np.ndarray) -> tuple[float, float]:
    """Share of rows of x whose most similar row of y by cosine has their number, and of y in x.

    Bitext retrieval as in Tatoeba (arXiv 1812.10464, section 4.3) without margin. A tie is no hit.
    """
    x, y = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-8) for v in (x_NxD, y_NxD))
    similar_NxN = x @ y.T
    own_N = np.diag(similar_NxN).copy()
    np.fill_diagonal(similar_NxN, -np.inf)
    return float((own_N > similar_NxN.max(axis=1)).mean()), float((own_N > similar_NxN.max(axis=0)).mean())


def retrieval(vectors: dict[str, np.ndarray], pivot: str) -> list[Retrieval]:
    """Retrieval between each language and the pivot, from `sentence_vectors` [L+1,N,D] of each."""
    found = []
    for language, x_LxNxD in vectors.items():
        if language != pivot:
            pairs = [accuracy_at_1(x, p) for x, p in zip(x_LxNxD, vectors[pivot], strict=True)]
            found.append(Retrieval(language, [a for a, _ in pairs], [b for _, b in pairs]))
    return found
