"""Every measure of alignment at every layer, and the picture of sentences in two dimensions.

Shapes: L layers, K languages, N sentences, D hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from alignx_jax import sharding
from alignx_jax.evaluation import metrics
from alignx_jax.evaluation.alignment import SentenceVectors

_PROJECTED = 30  # sentences of the picture, each in every language


class Layers(NamedTuple):
    """What is measured, and the sentences behind it."""

    record: dict[str, Any]
    """The part `alignment` of a model in evaluation.json."""
    sentences: dict[str, dict[str, np.ndarray]]
    """By measure and language, [L+1,N] of single sentences, float32: what `retrieval` and `xsim` (each the mean of to
    and from the pivot), `mexa` (weighted) and `language_probe` are means of."""


def measure(
    vectors: SentenceVectors, languages: Sequence[str], pivot: str, align_layer: int, seed: int, mesh: Mesh
) -> Layers:
    """All measures of `metrics` that need nothing but vectors; each device takes a layer at a time."""
    place, depth = languages.index(pivot), len(vectors.mean) - 1
    groups = []
    for first in range(0, depth + 1, mesh.size):
        at_once = np.minimum(np.arange(first, first + mesh.size), depth)  # the last once more where it does not divide
        arrays = (vectors.mean[at_once], vectors.weighted[at_once], vectors.last[at_once])
        groups.append(sharding.to_host(_measured(*arrays, place=place, seed=seed, mesh=mesh)))
    found = jax.tree.map(lambda *x: np.concatenate(x)[: depth + 1], *groups)  # arrays [L+1,...]
    hits_KxKxN = sharding.to_host(metrics.retrieval_hits(vectors.mean[align_layer]))
    probe_LxKxN = found["probe"].astype(np.float32)

    def by_language(x_LxK: np.ndarray) -> dict[str, list[float]]:
        return {code: _floats(x_LxK[:, k]) for k, code in enumerate(languages) if code != pivot}

    def of_sentences(x_LxKxN: np.ndarray) -> dict[str, np.ndarray]:
        return {c: x_LxKxN[:, k].astype(np.float32) for k, c in enumerate(languages) if c != pivot}

    def both_ways(x_LxKx2: np.ndarray) -> dict[str, dict[str, list[float]]]:
        to, back = by_language(x_LxKx2[..., 0]), by_language(x_LxKx2[..., 1])
        return {code: {"to_pivot": to[code], "from_pivot": back[code]} for code in to}

    record = {
        "retrieval": both_ways(found["hits"].mean(axis=-1)),
        "retrieval_matrix": [_floats(row) for row in hits_KxKxN.mean(axis=-1)],
        "xsim": both_ways(found["xsim"].mean(axis=-1)),
        "mexa": {
            "weighted": by_language(found["mexa_weighted"].mean(axis=-1)),
            "last": by_language(found["mexa_last"].mean(axis=-1)),
        },
        "mexa_sentences": vectors.weighted.shape[2],
        "positive_cosine": by_language(found["cosines"].positive),
        "negative_cosine": by_language(found["cosines"].negative),
        "cka": by_language(found["cka"].plain),
        "cka_debiased": by_language(found["cka"].debiased),
        "total_variance": _floats(found["collapse"].total_variance),
        "random_cosine": _floats(found["collapse"].random_cosine),
        "uniformity": _floats(found["collapse"].uniformity),
        "language_probe": _floats(found["probe"].mean(axis=(1, 2))),
        "language_variance": _floats(found["variance"].language),
        "meaning_variance": _floats(found["variance"].meaning),
    }
    sentences = {
        "retrieval": of_sentences(found["hits"].mean(axis=2)),
        "xsim": of_sentences(found["xsim"].mean(axis=2)),
        "mexa": of_sentences(found["mexa_weighted"]),
        "language_probe": {code: probe_LxKxN[:, k] for k, code in enumerate(languages)},
    }
    return Layers(record, sentences)


@functools.partial(jax.jit, static_argnames=("place", "seed", "mesh"))
def _measured(mean_LxKxNxD, weighted_LxKxNxD, last_LxKxNxD, *, place: int, seed: int, mesh: Mesh) -> dict[str, Any]:
    def of_layers(mean_LxKxNxD, weighted_LxKxNxD, last_LxKxNxD):
        return jax.lax.map(of_layer, (mean_LxKxNxD, weighted_LxKxNxD, last_LxKxNxD))

    def of_layer(arrays):
        x_KxNxD, weighted_KxNxD, last_KxNxD = arrays
        return {
            "hits": metrics.pivot_hits(x_KxNxD, place),
            "xsim": metrics.xsim_errors(x_KxNxD, place),
            "mexa_weighted": metrics.mexa_hits(weighted_KxNxD, place),
            "mexa_last": metrics.mexa_hits(last_KxNxD, place),
            "cosines": metrics.cosines(x_KxNxD, place),
            "cka": metrics.cka(x_KxNxD, place),
            "collapse": metrics.collapse(x_KxNxD),
            "probe": metrics.probe_hits(x_KxNxD, seed),
            "variance": metrics.variance(x_KxNxD),
        }

    return sharding.on_each_device(of_layers, mesh)(mean_LxKxNxD, weighted_LxKxNxD, last_LxKxNxD)


def both_directions(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, dict[str, list[float]]]:
    """Retrieval at every layer between each language's two sets of vectors, [L+1,N,D] each."""
    found = {}
    for code, sides in pairs.items():
        hits = [metrics.pivot_hits(np.stack(layer), 1)[0] for layer in zip(*sides, strict=True)]
        hits_Lx2xN = np.stack(sharding.to_host(hits))
        to, back = hits_Lx2xN.mean(axis=-1).T
        found[code] = {"to_pivot": _floats(to), "from_pivot": _floats(back)}
    return found


def projection(mean_LxKxNxD: np.ndarray, languages: Sequence[str], layers: Sequence[int]) -> dict[str, Any]:
    """The first sentences in every language on the two main axes (PCA) of their vectors, at each of `layers`."""
    found = {}
    for layer in dict.fromkeys(layers):
        x_KxNxD = mean_LxKxNxD[layer, :, :_PROJECTED].astype(np.float64)
        x_MxD = x_KxNxD.reshape(-1, x_KxNxD.shape[-1])
        x_MxD = x_MxD - x_MxD.mean(axis=0)
        left, singular, _ = np.linalg.svd(x_MxD, full_matrices=False)
        places_KxNx2 = (left[:, :2] * singular[:2]).reshape(*x_KxNxD.shape[:2], 2)
        found[str(layer)] = {
            "x": {code: [_floats(xy) for xy in places_KxNx2[k]] for k, code in enumerate(languages)},
            "explained": _floats(singular[:2] ** 2 / max((singular**2).sum(), 1e-30)),
        }
    return found


def _floats(x: np.ndarray) -> list[float]:
    return [float(f"{v:.6g}") for v in x]
