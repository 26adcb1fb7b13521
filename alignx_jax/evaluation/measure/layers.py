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
from alignx_jax.evaluation.measure import metrics
from alignx_jax.evaluation.measure.alignment import SentenceVectors
from alignx_jax.evaluation.measure.scores import Place, Score, mean_of
from alignx_jax.evaluation.rows import Projection

_PROJECTED = 30  # sentences of the picture, each in every language


class Curve(NamedTuple):
    """A measure at every layer, from the embeddings to the final norm."""

    value_L: np.ndarray
    n: int | None
    """Sentences of each language or direction."""
    parts_LxN: tuple[np.ndarray, ...] = ()
    """Values of single sentences, an array for each language that it is the mean of; none where they have none."""


Curves = dict[Place, Curve]
"""By what they are of; `Place.layer` is None."""


def measure(vectors: SentenceVectors, languages: Sequence[str], pivot: str, seed: int, mesh: Mesh) -> Curves:
    """All measures of `metrics` that need nothing but vectors; each device takes a layer at a time.

    Of a language what is between it and the pivot, both directions; of each direction retrieval and xSIM by
    themselves. Without a language or direction: the mean of languages, or of all sentences of all languages.
    """
    place, depth = languages.index(pivot), len(vectors.mean) - 1
    groups = []
    for first in range(0, depth + 1, mesh.size):
        at_once = np.minimum(np.arange(first, first + mesh.size), depth)  # the last once more where it does not divide
        arrays = (vectors.mean[at_once], vectors.weighted[at_once], vectors.last[at_once])
        groups.append(sharding.to_host(_measured(*arrays, place=place, seed=seed, mesh=mesh)))
    found = jax.tree.map(lambda *x: np.concatenate(x)[: depth + 1], *groups)  # arrays [L+1,...]
    others = {code: k for k, code in enumerate(languages) if code != pivot}
    count = vectors.mean.shape[2]

    def of_sentences(measure: str, x_LxKxN: np.ndarray, places: Mapping[str, int] = others) -> Curves:
        return with_mean({Place(measure, language=code): of_means(x_LxKxN[:, k]) for code, k in places.items()})

    def of_languages(measure: str, x_LxK: np.ndarray) -> Curves:
        return with_mean({Place(measure, language=code): Curve(x_LxK[:, k], count) for code, k in others.items()})

    def both_ways(measure: str, x_LxKx2xN: np.ndarray) -> Curves:
        ways = {}
        for code, k in others.items():
            to, back = np.moveaxis(x_LxKx2xN[:, k].mean(axis=-1), 1, 0)
            ways[Place(measure, direction=f"{code}-{pivot}")] = Curve(to, count)
            ways[Place(measure, direction=f"{pivot}-{code}")] = Curve(back, count)
        return of_sentences(measure, x_LxKx2xN.mean(axis=2)) | ways

    cosines, collapse, variance = found["cosines"], found["collapse"], found["variance"]
    return {
        **both_ways("retrieval", found["hits"]),
        Place("retrieval_lowest"): Curve(found["hits"].mean(axis=(2, 3))[:, list(others.values())].min(axis=1), count),
        **both_ways("xsim", found["xsim"]),
        **of_sentences("mexa", found["mexa_weighted"]),
        **of_sentences("mexa_last", found["mexa_last"]),
        **of_languages("positive_cosine", cosines.positive),
        **of_languages("negative_cosine", cosines.negative),
        **of_languages("cosine_difference", cosines.positive - cosines.negative),
        **of_languages("cka", found["cka"].plain),
        **of_languages("cka_debiased", found["cka"].debiased),
        Place("total_variance"): Curve(collapse.total_variance, count),
        Place("random_cosine"): Curve(collapse.random_cosine, count),
        Place("uniformity"): Curve(collapse.uniformity, count),
        **of_sentences("language_probe", found["probe"], {code: k for k, code in enumerate(languages)}),
        Place("language_variance"): Curve(variance.language, count),
        Place("meaning_variance"): Curve(variance.meaning, count),
    }


def of_means(x_LxN: np.ndarray) -> Curve:
    """The mean over sentences."""
    return Curve(x_LxN.mean(axis=1, dtype=float), x_LxN.shape[1], (x_LxN.astype(np.float32),))


def with_mean(of: Curves) -> Curves:
    """The curves of a measure's languages, and their mean."""
    if not of:
        return {}
    first, counted = next(iter(of)), {curve.n for curve in of.values()}
    mean_L = np.mean([curve.value_L for curve in of.values()], axis=0)
    parts = tuple(x_LxN for curve in of.values() for x_LxN in curve.parts_LxN)
    return {**of, Place(first.measure): Curve(mean_L, counted.pop() if len(counted) == 1 else None, parts)}


def by_language(curves: Curves, measure: str) -> dict[str, list[float]]:
    """The curves of a measure's languages."""
    return {
        place.language: curve.value_L.tolist()
        for place, curve in curves.items()
        if place.measure == measure and place.language
    }


def between_all(mean_KxNxD: np.ndarray, languages: Sequence[str], layer: int) -> dict[Place, Score]:
    """Retrieval at a layer from every language to every other."""
    hits_KxKxN = sharding.to_host(metrics.retrieval_hits(mean_KxNxD))
    return {
        Place("retrieval", layer, f"{a}-{b}"): Score(float(hits_KxKxN[i, j].mean()), hits_KxKxN.shape[2])
        for i, a in enumerate(languages)
        for j, b in enumerate(languages)
        if i != j
    }


def scores(curves: Curves) -> dict[Place, Score]:
    """Every value of the curves, at its layer."""
    return {
        place._replace(layer=layer): Score(
            float(value), curve.n, tuple(mean_of(x_LxN[layer]) for x_LxN in curve.parts_LxN)
        )
        for place, curve in curves.items()
        for layer, value in enumerate(curve.value_L)
    }


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


def both_directions(measure: str, pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], pivot: str) -> Curves:
    """Retrieval at every layer between each language's vectors and those of the pivot, [L+1,N,D] each."""
    found, ways = {}, {}
    for code, sides in pairs.items():
        hits = [metrics.pivot_hits(np.stack(layer), 1)[0] for layer in zip(*sides, strict=True)]
        hits_Lx2xN = np.stack(sharding.to_host(hits))
        found[Place(measure, language=code)] = of_means(hits_Lx2xN.mean(axis=1))
        for way, direction in enumerate((f"{code}-{pivot}", f"{pivot}-{code}")):
            ways[Place(measure, direction=direction)] = Curve(hits_Lx2xN[:, way].mean(axis=-1), hits_Lx2xN.shape[-1])
    return with_mean(found) | ways


def projection(mean_LxKxNxD: np.ndarray, languages: Sequence[str], layers: Sequence[int]) -> list[Projection]:
    """The first sentences in every language on the two main axes (PCA) of their vectors, at each of `layers`."""
    found = []
    for layer in dict.fromkeys(layers):
        x_KxNxD = mean_LxKxNxD[layer, :, :_PROJECTED].astype(np.float64)
        x_MxD = x_KxNxD.reshape(-1, x_KxNxD.shape[-1])
        x_MxD = x_MxD - x_MxD.mean(axis=0)
        left, singular, _ = np.linalg.svd(x_MxD, full_matrices=False)
        places_KxNx2 = (left[:, :2] * singular[:2]).reshape(*x_KxNxD.shape[:2], 2)
        found.append(
            Projection(
                layer=layer,
                x={code: [_pair(xy) for xy in places_KxNx2[k]] for k, code in enumerate(languages)},
                explained=_pair(singular[:2] ** 2 / max((singular**2).sum(), 1e-30)),
            )
        )
    return found


def _pair(x_2: np.ndarray) -> tuple[float, float]:
    first, second = (float(f"{x:.6g}") for x in x_2)
    return first, second
