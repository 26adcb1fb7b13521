"""Generation with a cache of keys and values: greedy, beam search, sampling.

The beams of a row are computed where the tokens of a row are in training, and share one cache: the slots of the prompt,
then one for each beam of each step. A mask says which slots a beam descends from. Beams that change places take their
parents' masks with them; the cache is only ever added to.

Shapes: as in `decoder`; S slots of the cache, P of them the prompt's, B beams (1 unless beam search), C candidates to
continue them, N tokens generated at most, E end tokens, V padded vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from alignx_jax import sharding
from alignx_jax.models.attention import attend, masked, soft_cap
from alignx_jax.models.decoder import Decoder, of_kind

_MIN_PROMPT = 32  # slots; longer prompts get a power of two, so that few programs are compiled
_NONE = -1  # in the place of a token that is not there
_HALVINGS, _RANGE = 40, 128.0  # of the logits that top-p looks for its threshold in: found to less than 1e-9


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How the next token is chosen."""

    method: Literal["greedy", "beam", "sample"] = "greedy"
    beams: int = 4
    """Hypotheses that beam search continues, and finished ones that it keeps."""
    length_penalty: float = 1.0
    """p of a hypothesis' score in beam search: its log probability / n^p, n its tokens with the end token."""
    temperature: float = 1.0
    """Sampling divides the logits by it."""
    top_k: int = 0
    """Sampling takes one of this many most probable tokens; 0: of all."""
    top_p: float = 1.0
    """Sampling then takes one of the fewest most probable tokens that together have at least this probability."""


class Cache(NamedTuple):
    """Rotated keys, and values, of every layer, in the compute dtype."""

    keys_LxRxKxSxh: jax.Array
    values_LxRxKxSxh: jax.Array


class _Beams(NamedTuple):
    tokens_RxBxN: jax.Array
    log_probability_RxB: jax.Array
    finished_RxB: jax.Array  # scores of the best finished hypotheses, best first; -inf where there are fewer


class _Search(NamedTuple):
    """What has been chosen so far."""

    token_RxB: jax.Array  # the last of each hypothesis that goes on
    parent_RxB: jax.Array  # the beam that it continues
    best_RxN: jax.Array  # the result as far as it is known
    done_R: jax.Array
    keys_R: jax.Array  # of the random numbers of each prompt
    beams: _Beams | None


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    mesh: Mesh,
    *,
    max_tokens: int,
    eos_ids: Sequence[int],
    rows: int,
    dtype: jnp.dtype,
    decoding: Decoding = Decoding(),
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """The tokens that the model adds to each prompt, in the order given, without the end token.

    Prompts of similar length are decoded together, padded on the left to a power of two; batch and padding change a
    result by rounding only. Logits and scores are float32 (float64 under float64 compute).

    Greedy search, beam search, and what sampling leaves out are those of `generate` of transformers 5.23 with
    `early_stopping=False` (generation/utils.py, logits_process.py); but of tokens that are equally probable at the edge
    of `top_p`, all stay. The random numbers of a token depend on `seed`, the prompt's place in `prompts` and the
    token's place in the result alone: not on the prompts beside it, nor on `rows` or the mesh.

    Args:
      prompts: token ids, with BOS where the model wants it.
      max_tokens: most new tokens a prompt, the end token counted.
      eos_ids: any of these ends a sequence.
      rows: sequences at a time over all devices, a multiple of the mesh's data shards.
      dtype: of activations, cache and products; a copy of the weights is held in it if it is not theirs.
      progress: called after every batch with the numbers of prompts done and given.

    Raises:
      ValueError: a prompt is empty.
    """
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt is empty; it needs one token at least")
    graph, params = nnx.split(decoder)
    params, eos_E = nnx.to_pure_dict(params), np.array(eos_ids, np.int32)
    order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))  # what does not fit into memory fails at once
    results: list[list[int]] = [[] for _ in prompts]
    for first in range(0, len(order), rows):
        members = order[first : first + rows]
        slots = max(_MIN_PROMPT, 1 << (len(prompts[members[0]]) - 1).bit_length())
        tokens_RxP, lengths_R, numbers_R = (np.zeros(shape, np.int32) for shape in ((rows, slots), rows, rows))
        for row, n in enumerate(members):
            lengths_R[row], numbers_R[row] = len(prompts[n]), n
            tokens_RxP[row, slots - lengths_R[row] :] = prompts[n]
        with jax.set_mesh(mesh):
            arrays = [sharding.place_rows(a, mesh) for a in (tokens_RxP, lengths_R, numbers_R)]
            key = jax.random.key(seed)  # in here, or its sharding would depend on the caller's mesh
            best_RxN = _search(
                params, *arrays, key, eos_E, graph=graph, dtype=dtype, max_tokens=max_tokens, decoding=decoding
            )
        for n, best_N in zip(members, sharding.to_host(best_RxN).tolist(), strict=False):  # the last batch is filled up
            end = next((i for i, token in enumerate(best_N) if token in (_NONE, *eos_ids)), max_tokens)
            results[n] = best_N[:end]
        if progress:
            progress(first + len(members), len(prompts))
    return results


@functools.partial(jax.jit, static_argnames=("graph", "dtype", "max_tokens", "decoding"))
def _search(
    params: dict[str, Any],
    tokens_RxP: jax.Array,
    lengths_R: jax.Array,
    numbers_R: jax.Array,
    key: jax.Array,
    eos_E: jax.Array,
    *,
    graph: nnx.GraphDef,
    dtype: jnp.dtype,
    max_tokens: int,
    decoding: Decoding,
) -> jax.Array:
    """[R,N], `_NONE` after the last token; a row of length 0 is no prompt."""
    decoder = nnx.merge(graph, _cast(params, dtype))
    (rows, prompt), beams = tokens_RxP.shape, decoding.beams if decoding.method == "beam" else 1
    choose_by_row = _choose_beams if decoding.method == "beam" else _choose_one

    def choose(search: _Search, logits_RxBxV: jax.Array, count: jax.Array) -> _Search:
        function = functools.partial(choose_by_row, count=count, eos_E=eos_E, decoding=decoding)
        return sharding.map_rows(function)(search, logits_RxBxV)

    def body(carry):
        count, cache, visible_RxBxS, search = carry
        slot = prompt + (count - 1) * beams
        visible_RxBxS = jnp.take_along_axis(visible_RxBxS, search.parent_RxB[:, :, None], axis=1)
        own_RxBxB = jnp.broadcast_to(jnp.eye(beams, dtype=bool)[None], (rows, beams, beams))
        visible_RxBxS = jax.lax.dynamic_update_slice(visible_RxBxS, own_RxBxB, (0, 0, slot))
        positions_R = lengths_R + count - 1
        logits_RxBxV, cache = step(decoder, search.token_RxB, positions_R, visible_RxBxS, cache, slot, dtype=dtype)
        return count + 1, cache, visible_RxBxS, choose(search, logits_RxBxV, count)

    def unfinished(carry):
        count, *_, search = carry
        return (count < max_tokens) & ~jnp.all(search.done_R)

    logits_RxV, cache = prefill(decoder, tokens_RxP, lengths_R, slots=prompt + max_tokens * beams, dtype=dtype)
    logits_RxBxV = jnp.broadcast_to(logits_RxV[:, None], (rows, beams, logits_RxV.shape[-1]))
    slot_S = jnp.arange(prompt + max_tokens * beams)
    visible_RxS = (slot_S[None] >= prompt - lengths_R[:, None]) & (slot_S < prompt)[None]
    visible_RxBxS = jnp.broadcast_to(visible_RxS[:, None], (rows, beams, len(slot_S)))

    # Beams begin equal: only the first may be continued.
    nothing_RxB = jnp.full((rows, beams), -jnp.inf, logits_RxV.dtype)
    none_RxBxN, zeros_RxB = jnp.full((rows, beams, max_tokens), _NONE, jnp.int32), jnp.zeros((rows, beams), jnp.int32)
    running = _Beams(none_RxBxN, nothing_RxB.at[:, 0].set(0), nothing_RxB) if decoding.method == "beam" else None
    keys_R = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers_R)
    search = _Search(zeros_RxB, zeros_RxB, none_RxBxN[:, 0], lengths_R == 0, keys_R, running)
    start = jnp.array(1), cache, visible_RxBxS, choose(search, logits_RxBxV, jnp.array(0))
    return jax.lax.while_loop(unfinished, body, start)[-1].best_RxN


def _cast(params: dict[str, Any], dtype: jnp.dtype) -> dict[str, Any]:
    """Every weight in the type it is used in, once and not at every token; norms are applied as they are."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x if path[-1].key.endswith("norm") else x.astype(dtype), params
    )


def prefill(
    decoder: Decoder, tokens_RxP: jax.Array, lengths_R: jax.Array, *, slots: int, dtype: jnp.dtype
) -> tuple[jax.Array, Cache]:
    """Logits of the token after each prompt, [R,V], and a cache of `slots` slots, the prompts in the first P of them.

    Args:
      tokens_RxP: prompts, padded on the left.
      lengths_R: tokens of each.
    """
    length = tokens_RxP.shape[1]
    positions_RxP = jnp.arange(length)[None] + (lengths_R - length)[:, None]
    mask_RxPxP = (positions_RxP >= 0)[:, None, :] & jnp.tri(length, dtype=bool)[None]
    rotations = decoder.rotations(jnp.maximum(positions_RxP, 0), dtype)
    graph, stacked = nnx.split(decoder.layers)
    attention = masked(mask_RxPxP, decoder.scores, decoder.windows)

    def body(x_RxPxD, layer_and_kind):
        layer, kind = layer_and_kind

        def mix(q_RxPxHxh: jax.Array, k_RxPxKxh: jax.Array, v_RxPxKxh: jax.Array) -> tuple[jax.Array, Cache]:
            kept = Cache(*(jnp.moveaxis(a, 1, 2) for a in (k_RxPxKxh, v_RxPxKxh)))
            return attention(q_RxPxHxh, k_RxPxKxh, v_RxPxKxh, kind), kept

        return nnx.merge(graph, layer)(x_RxPxD, of_kind(rotations, kind), mix)

    x_RxPxD, cache = jax.lax.scan(body, decoder.embed(tokens_RxP, dtype), (stacked, decoder.kind_of_layer))
    to_slots = ((0, 0),) * 3 + ((0, slots - length), (0, 0))
    cache = Cache(*(sharding.constrain(jnp.pad(a, to_slots), None, "rows", "model") for a in cache))
    return _logits(decoder, x_RxPxD[:, -1:])[:, 0], cache


def step(
    decoder: Decoder,
    tokens_RxB: jax.Array,
    positions_R: jax.Array,
    visible_RxBxS: jax.Array,
    cache: Cache,
    slot: jax.Array,
    *,
    dtype: jnp.dtype,
) -> tuple[jax.Array, Cache]:
    """Logits of the token after each of `tokens`, [R,B,V], and the cache with these in the B slots from `slot` on.

    Args:
      positions_R: of the tokens, in their sequences.
      visible_RxBxS: the slots that each token descends from, its own one of them.
    """
    # A sequence's tokens are in the order of their slots, so that those within a window are the last visible ones.
    windows, length = decoder.windows, visible_RxBxS.shape[2]
    seen = [visible_RxBxS]
    if any(windows):
        back_RxBxS = jnp.cumsum(visible_RxBxS, axis=2, dtype=jnp.int32)
        back_RxBxS = back_RxBxS[:, :, -1:] - back_RxBxS
        seen = [visible_RxBxS & (back_RxBxS < (window or length)) for window in windows]
    rotations = decoder.rotations(positions_R[:, None], dtype)
    graph, stacked = nnx.split(decoder.layers)

    def body(carry, of_layer):
        (x_RxBxD, cache), (layer, index, kind) = carry, of_layer

        def mix(q_RxBxHxh: jax.Array, k_RxBxKxh: jax.Array, v_RxBxKxh: jax.Array) -> tuple[jax.Array, Cache]:
            added = (
                jax.lax.dynamic_update_slice(old, jnp.moveaxis(new, 1, 2)[None], (index, 0, 0, slot, 0))
                for old, new in zip(cache, (k_RxBxKxh, v_RxBxKxh), strict=True)
            )
            # In the carry of both loops, and so in place: as the scan's outputs, all of it would be copied each time.
            written = Cache(*(sharding.constrain(a, None, "rows", "model") for a in added))
            k_RxKxSxh, v_RxKxSxh = (jax.lax.dynamic_index_in_dim(a, index, keepdims=False) for a in written)
            rows, beams, heads, size = q_RxBxHxh.shape
            kv_heads = k_RxKxSxh.shape[1]
            q_RxKxGxBxh = jnp.moveaxis(q_RxBxHxh.reshape(rows, beams, kv_heads, heads // kv_heads, size), 1, 3)
            mixed_RxKxGxBxh = attend(q_RxKxGxBxh, k_RxKxSxh, v_RxKxSxh, of_kind(seen, kind), decoder.scores)
            return jnp.moveaxis(mixed_RxKxGxBxh, 3, 1).reshape(q_RxBxHxh.shape), written

        return nnx.merge(graph, layer)(x_RxBxD, of_kind(rotations, kind), mix), None

    inputs = stacked, jnp.arange(decoder.config.num_layers), decoder.kind_of_layer
    (x_RxBxD, cache), _ = jax.lax.scan(body, (decoder.embed(tokens_RxB, dtype), cache), inputs)
    return _logits(decoder, x_RxBxD), cache


def _logits(decoder: Decoder, x_RxBxD: jax.Array) -> jax.Array:
    """[R,B,V] of what the last layer gives, float32 at least; -inf for the padding of the vocabulary."""
    high, embedding_VxD = jnp.promote_types(x_RxBxD.dtype, jnp.float32), decoder.output_embedding.astype(x_RxBxD.dtype)
    hidden_RxBxD = sharding.constrain_to_table(decoder.normalize(x_RxBxD))
    logits_RxBxV = jnp.einsum("rbd,vd->rbv", hidden_RxBxD, embedding_VxD, preferred_element_type=high)
    logits_RxBxV = soft_cap(logits_RxBxV, decoder.config.logit_cap)
    real_V = jnp.arange(embedding_VxD.shape[0]) < decoder.config.vocab_size
    return sharding.constrain(jnp.where(real_V[None, None], logits_RxBxV, -jnp.inf), "rows", None, "model")


def _choose_one(
    search: _Search, logits_Rx1xV: jax.Array, *, count: jax.Array, eos_E: jax.Array, decoding: Decoding
) -> _Search:
    """Token number `count` of each row: the most probable one, or a sample."""
    logits_RxV = logits_Rx1xV[:, 0]
    if decoding.method == "greedy":
        token_R = jnp.argmax(logits_RxV, axis=-1)
    else:
        keys_R = jax.vmap(jax.random.fold_in, (0, None))(search.keys_R, count)
        token_R = jax.vmap(jax.random.categorical)(keys_R, truncate(logits_RxV, decoding))
    token_R = token_R.astype(jnp.int32)
    best_RxN = search.best_RxN.at[:, count].set(jnp.where(search.done_R, _NONE, token_R))
    done_R = search.done_R | jnp.isin(token_R, eos_E)
    return search._replace(token_RxB=token_R[:, None], best_RxN=best_RxN, done_R=done_R)


def truncate(logits_RxV: jax.Array, decoding: Decoding) -> jax.Array:
    """The logits that are sampled from: divided by the temperature, then -inf for what top-k, then top-p leave out.

    Top-p (arXiv 1904.09751, section 3.1) leaves out a token if the more probable ones have `top_p` without it.
    """
    logits_RxV = logits_RxV / decoding.temperature
    if decoding.top_k:
        least_Rx1 = jax.lax.top_k(logits_RxV, min(decoding.top_k, logits_RxV.shape[-1]))[0][:, -1:]
        logits_RxV = jnp.where(logits_RxV < least_Rx1, -jnp.inf, logits_RxV)
    if decoding.top_p < 1:
        probability_RxV = jax.nn.softmax(logits_RxV, axis=-1)

        def halve(_, bounds):
            """What is above the lower bound has `top_p` together, what is above the upper one has not."""
            low_Rx1, high_Rx1 = bounds
            middle_Rx1 = (low_Rx1 + high_Rx1) / 2
            above_Rx1 = jnp.where(logits_RxV > middle_Rx1, probability_RxV, 0).sum(axis=-1, keepdims=True)
            enough_Rx1 = above_Rx1 >= decoding.top_p
            return jnp.where(enough_Rx1, middle_Rx1, low_Rx1), jnp.where(enough_Rx1, high_Rx1, middle_Rx1)

        # Sorting the vocabulary would take longer than all layers do (dev/decisions.md).
        most_Rx1 = logits_RxV.max(axis=-1, keepdims=True)
        low_Rx1, _ = jax.lax.fori_loop(0, _HALVINGS, halve, (most_Rx1 - _RANGE, most_Rx1))
        logits_RxV = jnp.where(logits_RxV > low_Rx1, logits_RxV, -jnp.inf)
    return logits_RxV


def _choose_beams(
    search: _Search, logits_RxBxV: jax.Array, *, count: jax.Array, eos_E: jax.Array, decoding: Decoding
) -> _Search:
    """Token number `count` of each beam, as `_beam_search` of transformers has it.

    A candidate that ends is finished if it is one of the B best; of the others, the B best go on. A row is done when
    its best running hypothesis, scored as if it ended here, is no better than the worst of B finished ones.
    """
    beams, before, length = decoding.beams, search.beams, count + 1
    rows, max_tokens = search.best_RxN.shape
    total_RxBxV = before.log_probability_RxB[:, :, None] + jax.nn.log_softmax(logits_RxBxV, axis=-1)
    # So many that B of them go on, whatever ends.
    total_RxC, place_RxC = jax.lax.top_k(total_RxBxV.reshape(rows, -1), max(2, 1 + eos_E.size) * beams)
    parent_RxC, token_RxC = jnp.divmod(place_RxC, total_RxBxV.shape[-1])
    tokens_RxCxN = jnp.take_along_axis(before.tokens_RxBxN, parent_RxC[:, :, None], axis=1)
    tokens_RxCxN = tokens_RxCxN.at[:, :, count].set(token_RxC)
    ends_RxC = jnp.isin(token_RxC, eos_E) | (length == max_tokens)
    norm = length.astype(total_RxC.dtype) ** decoding.length_penalty

    ended_RxB = jnp.where(ends_RxC & ~search.done_R[:, None], total_RxC / norm, -jnp.inf)[:, :beams]
    finished_RxB, _ = jax.lax.top_k(jnp.concatenate([before.finished_RxB, ended_RxB], axis=1), beams)
    ended_RxN = jnp.take_along_axis(tokens_RxCxN, ended_RxB.argmax(axis=1)[:, None, None], axis=1)[:, 0]
    better_R = ended_RxB.max(axis=1) > before.finished_RxB[:, 0]
    best_RxN = jnp.where(better_R[:, None], ended_RxN, search.best_RxN)

    running_RxB, chosen_RxB = jax.lax.top_k(jnp.where(ends_RxC, -jnp.inf, total_RxC), beams)
    token_RxB, parent_RxB = (jnp.take_along_axis(a, chosen_RxB, axis=1) for a in (token_RxC, parent_RxC))
    tokens_RxBxN = jnp.take_along_axis(tokens_RxCxN, chosen_RxB[:, :, None], axis=1)
    done_R = search.done_R | ~(running_RxB[:, 0] / norm > finished_RxB[:, -1])
    running = _Beams(tokens_RxBxN, running_RxB, finished_RxB)
    return search._replace(token_RxB=token_RxB, parent_RxB=parent_RxB, best_RxN=best_RxN, done_R=done_R, beams=running)
