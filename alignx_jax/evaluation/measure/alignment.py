"""Sentences as vectors, at every layer, in one pass; and the layer to align, chosen from them.

Inside the training prompt a target's states have attended to the source; any score taken there is inflated. So each
sentence is a segment of its own, the bare text behind BOS where the tokenizer adds it, and sees nothing else;
`in_prompt_vectors` are the inflated.

Shapes: L layers, K languages, N sentences, D hidden size; R rows, T tokens, S sentences a row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from alignx_jax import sharding
from alignx_jax.batch import Batch
from alignx_jax.config import Config
from alignx_jax.data import packing, pipeline, spans
from alignx_jax.data.prompts import Template
from alignx_jax.data.tokenizer import Tokenizer
from alignx_jax.evaluation.measure import metrics
from alignx_jax.exits import UserError
from alignx_jax.models.decoder import Decoder
from alignx_jax.objectives import pooling

_SLOTS = 16  # most sentences a row
_CHOOSING_PAIRS = 500  # held-out pairs that the layer is chosen by
MEXA_SENTENCES = 100
"""Sentences that MEXA is taken over: its value falls as they become more, and 100 is the number of its authors."""

Progress = Callable[[int], None]
"""Called with the number of sentences that were encoded since the last call."""

Pool = Literal["source", "target", "weighted", "last", "predicting"]
"""Of a row's examples: the mean over the source, or the target; over all tokens, token i with weight i from 1 on
(arXiv 2202.08904, equation 1; BOS counts, as in MEXA's code); the last token; the states that predict the source."""


@dataclasses.dataclass(frozen=True)
class SentenceVectors:
    """Vectors of sentences that mean the same in every language, float32; index l is the state after l layers."""

    mean: np.ndarray
    """[L+1,K,N,D] mean over the sentence's tokens, BOS left out."""
    weighted: np.ndarray
    """[L+1,K,n,D] position-weighted mean, BOS counted, of the first n = min(N, MEXA_SENTENCES) sentences."""
    last: np.ndarray
    """[L+1,K,n,D] state of the last token."""
    predicting: np.ndarray
    """[L+1,K,n,D] mean of the states that predict the sentence's tokens, as the language matching loss pools."""


@dataclasses.dataclass(frozen=True)
class LayerChoice:
    """The layer to align, and the curve it was chosen from."""

    layer: int
    retrieval: list[float]
    """[L+1] accuracy@1 among the pairs of the same languages, mean of both directions."""
    pairs: int


def encode(
    decoder: Decoder,
    examples: Sequence[packing.PackedExample],
    pools: Sequence[Pool],
    mesh: Mesh,
    *,
    rows: int,
    row_length: int,
    dtype: jnp.dtype,
    progress: Progress = lambda count: None,
) -> dict[Pool, np.ndarray]:
    """The pooled states of every example at every layer, [L+1,N,D] float32 each.

    Args:
      rows: rows of `row_length` tokens encoded at a time, a multiple of the mesh's data axes; examples are packed.

    Raises:
      UserError: an example longer than the model's context.
    """
    context = decoder.config.max_positions
    if long := [len(e.tokens) for e in examples if len(e.tokens) > context]:
        raise UserError(
            f"{len(long)} of {len(examples)} evaluation texts are longer than the model's context of {context} tokens, "
            f"the longest has {max(long)}; leave them out"
        )
    plan = packing.plan(np.array([len(e.tokens) for e in examples]), row_length, _SLOTS, np.arange(len(examples)))
    graph, params = nnx.split(decoder)
    shape = decoder.config.num_layers + 1, len(examples), decoder.config.hidden_size
    vectors = {pool: np.zeros(shape, np.float32) for pool in pools}
    for first in range(0, len(plan), rows):
        members = [plan[r] if r < len(plan) else [] for r in range(first, first + rows)]
        packed = [packing.assemble([examples[n] for n in row], row_length, _SLOTS) for row in members]
        batch = jax.tree.map(lambda *x: sharding.place_rows(np.stack(x), mesh), *packed)
        pooled_PxRxKxD = sharding.to_host(_pooled(params, batch, graph=graph, pools=tuple(pools), dtype=dtype))
        for place, pool in enumerate(pools):
            for r, row in enumerate(members):
                vectors[pool][:, row] = pooled_PxRxKxD[:, r, place * _SLOTS :][:, : len(row)]
        progress(sum(map(len, members)))
    return vectors


def _weights(batch: Batch, pool: Pool) -> jax.Array:
    """[R,S,T] whose product with the states [R,T,D] is the pool of each example."""
    segments_RxT = batch.segments
    match pool:
        case "source" | "target":
            span_RxT = batch.source_span if pool == "source" else batch.target_span
        case "predicting":
            span_RxT = pooling.predicting(batch.source_span, segments_RxT)
        case "last":
            next_RxT = jnp.pad(segments_RxT[:, 1:], ((0, 0), (0, 1)))
            span_RxT = jnp.where(next_RxT != segments_RxT, segments_RxT, 0)
        case "weighted":
            weights_RxSxT = pooling.span_means(segments_RxT, _SLOTS) * (1.0 + batch.positions)[:, None, :]
            return weights_RxSxT / jnp.maximum(jnp.sum(weights_RxSxT, axis=2, keepdims=True), 1e-9)
    return pooling.span_means(span_RxT, _SLOTS)


@functools.partial(jax.jit, static_argnames=("graph", "pools", "dtype"))
def _pooled(params, batch: Batch, *, graph, pools: tuple[Pool, ...], dtype) -> jax.Array:
    decoder = nnx.merge(graph, params)
    out = decoder(
        batch.tokens,
        batch.positions,
        batch.segments,
        compute_dtype=dtype,
        remat="none",
        pool_RxKxT=jnp.concatenate([_weights(batch, pool) for pool in pools], axis=1),
        pooled_layers=tuple(range(decoder.config.num_layers + 1)),
    )
    return out.pooled_PxRxKxD


def sentence_vectors(
    decoder: Decoder, tokenizer: Tokenizer, sentences: Mapping[str, Sequence[str]], mesh: Mesh, **options
) -> SentenceVectors:
    """Every sentence of every language, encoded by itself; `options` are those of `encode`.

    Raises:
      UserError: a sentence longer than a row.
    """
    every = [sentence for language in sentences.values() for sentence in language]
    examples = _alone(tokenizer, every, options["row_length"])
    number = np.arange(len(every)) % (len(every) // len(sentences))
    few, rest = np.flatnonzero(number < MEXA_SENTENCES), np.flatnonzero(number >= MEXA_SENTENCES)
    pools = ("source", "weighted", "last", "predicting")
    found = encode(decoder, [examples[n] for n in few], pools, mesh, **options)
    mean_LxMxD = np.zeros((decoder.config.num_layers + 1, len(every), decoder.config.hidden_size), np.float32)
    mean_LxMxD[:, few] = found.pop("source")
    if len(rest):
        mean_LxMxD[:, rest] = encode(decoder, [examples[n] for n in rest], ("source",), mesh, **options)["source"]

    def by_language(x_LxMxD: np.ndarray) -> np.ndarray:
        return x_LxMxD.reshape(len(x_LxMxD), len(sentences), -1, x_LxMxD.shape[-1])

    return SentenceVectors(by_language(mean_LxMxD), **{pool: by_language(x) for pool, x in found.items()})


def text_vectors(
    decoder: Decoder, tokenizer: Tokenizer, texts: Sequence[str], mesh: Mesh, pool: Pool = "source", **options
) -> np.ndarray:
    """A pool of each text, encoded by itself, [L+1,N,D]: the mean over its tokens, BOS left out, unless said otherwise.

    `options` are those of `encode`.

    Raises:
      UserError: a text longer than a row.
    """
    examples = _alone(tokenizer, texts, options["row_length"])
    return encode(decoder, examples, (pool,), mesh, **options)[pool]


def in_prompt_vectors(
    decoder: Decoder,
    tokenizer: Tokenizer,
    template: Template,
    sentences: Mapping[str, Sequence[str]],
    pivot: str,
    mesh: Mesh,
    **options,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each language's sentences and their pivot translations, pooled inside the training prompt: ([L+1,N,D], same).

    The prompt asks for a translation into the pivot, so the pivot's states have seen the sentence: inflated.

    Raises:
      UserError: a prompt longer than a row, or a sentence that the tokenizer writes with no token of its own.
    """
    codes, template = [c for c in sentences if c != pivot], template.with_controls(tokenizer.controls.mark)
    prompts = [
        template.render_translation(source, target, code, pivot)
        for code in codes
        for source, target in zip(sentences[code], sentences[pivot], strict=True)
    ]
    examples = []
    for n, (encoding, prompt) in enumerate(
        zip(tokenizer.encode_batch([p.text for p in prompts]), prompts, strict=True)
    ):
        marking = {"cutoff": options["row_length"], "overlong": "drop", "min_target_tokens": 1, "loss_on": "sequence"}
        example = spans.mark(encoding, prompt, tokenizer, **marking)
        if not isinstance(example, spans.Example):
            count = len(sentences[pivot])
            raise UserError(
                f"evaluation sentence {n % count + 1} ({codes[n // count]}) cannot be pooled in its prompt "
                f"({example}); raise --data.row-length, or leave out --evaluation.in-prompt"
            )
        examples.append(_example(example.tokens, example.source, example.target))
    found = encode(decoder, examples, ("source", "target"), mesh, **options)
    source, target = (np.split(found[pool], len(codes), axis=1) for pool in ("source", "target"))
    return {code: (x, y) for code, x, y in zip(codes, source, target, strict=True)}


def choose_layer(
    decoder: Decoder,
    tokenizer: Tokenizer,
    pairs: Mapping[tuple[str, str], Sequence[tuple[str, str]]],
    mesh: Mesh,
    **options,
) -> LayerChoice:
    """The layer inside the model (neither embeddings nor the last) where the two sentences of a pair find each other.

    That is where retrieval among the pairs of the same two languages is most accurate, both directions, of all pairs
    together; of equals the one nearest the middle. `options` are those of `encode`.

    Args:
      pairs: by two languages, texts in these. Those that share a text with an earlier one of theirs are left out.

    Raises:
      UserError: the model has fewer than two layers, or no two languages have two pairs.
    """
    depth = decoder.config.num_layers
    distinct = [of for of in map(_distinct, pairs.values()) if len(of) > 1]  # one alone is always found
    if depth < 2 or not distinct:
        most = max(map(len, pairs.values()), default=0)
        raise UserError(
            f"--objective.contrastive.layer=auto: there are {depth} layers and at most {most} held-out pairs of two "
            "languages to choose by, and both have to be 2 or more; raise --data.validation or give a number"
        )
    texts = [text for of in distinct for pair in of for text in pair]
    vectors_LxMxD = text_vectors(decoder, tokenizer, texts, mesh, **options)
    ends = np.cumsum([2 * len(of) for of in distinct])
    found = [
        [metrics.retrieval_hits(np.stack([x[::2], x[1::2]])) for x in np.split(layer_MxD, ends[:-1])]
        for layer_MxD in vectors_LxMxD
    ]
    hits = [[h[n, 1 - n] for h in of for n in (0, 1)] for of in sharding.to_host(found)]
    curve = [float(np.concatenate(of).mean()) for of in hits]
    layer = max(range(1, depth), key=lambda n: (curve[n], -abs(n - depth / 2)))
    return LayerChoice(layer, curve, int(ends[-1]) // 2)


def with_layer(
    config: Config, decoder: Decoder, tokenizer: Tokenizer, data: pipeline.Data, mesh: Mesh
) -> tuple[Config, LayerChoice]:
    """`config` with a number for `--objective.contrastive.layer=auto`, by `choose_layer` on held-out pairs, and what it
    was chosen from.

    Raises:
      UserError: as `choose_layer`.
    """
    choice = choose_layer(
        decoder,
        tokenizer,
        data.validation.pairs(_CHOOSING_PAIRS),
        mesh,
        rows=config.evaluation.rows,
        row_length=config.data.row_length,
        dtype=jnp.dtype(config.training.compute_dtype),
    )
    contrastive = dataclasses.replace(config.objective.contrastive, layer=choice.layer)
    return dataclasses.replace(config, objective=dataclasses.replace(config.objective, contrastive=contrastive)), choice


def _distinct(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    seen: set[str] = set()
    return [pair for pair in pairs if seen.isdisjoint(pair) and not seen.update(pair)]


def _alone(tokenizer: Tokenizer, texts: Sequence[str], row_length: int) -> list[packing.PackedExample]:
    """The bare text behind BOS where the tokenizer adds it; its span leaves BOS out."""
    bos = tokenizer.prefix
    ids = [np.array([*bos, *i], np.int32) for i, _ in tokenizer.encode_batch(list(texts))]
    for n, i in enumerate(ids):
        if len(i) > row_length:
            raise UserError(
                f"evaluation text {texts[n]!r:.60} has {len(i)} tokens, a row {row_length}; raise --data.row-length"
            )
    return [_example(i, (len(bos), len(i)), (0, 0)) for i in ids]


def _example(tokens: np.ndarray, source: tuple[int, int], target: tuple[int, int]) -> packing.PackedExample:
    return packing.PackedExample(tokens, np.ones(len(tokens), bool), source, target, languages=(0, 0), hashes=(0, 0, 0))
