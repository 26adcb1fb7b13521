"""What an epoch takes of each source, and how often."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from alignx_jax.data.corpora import Kind
from alignx_jax.data.examples import Examples


@dataclasses.dataclass(frozen=True)
class Part:
    """Some of the examples of a source, and how often an epoch takes each."""

    examples: Examples
    chosen: np.ndarray
    """[n] int64 places in `examples.index`."""
    weight: float
    languages: np.ndarray
    """[languages of the source] int32 ids among all languages of the run."""

    def __len__(self) -> int:
        return len(self.chosen)


def balanced(parts: Sequence[Part], temperature: float) -> list[Part]:
    """Parallel text by pair of languages, weighted so that an epoch takes `n^(1/temperature)` of a pair, to scale.

    `n` are the examples that an epoch takes of the pair by the weights of the parts, over all of them and in both
    directions; their sum stays what it is. 1 leaves the shares as they are, infinity makes all pairs equal (Arivazhagan
    et al. 2019, arXiv 1907.05019, section 3.1, who take 5).
    """
    if temperature == 1:
        return list(parts)
    split, counts = [], {}
    for part in parts:
        index = part.examples.index[part.chosen]
        pairs = np.sort(part.languages[np.stack([index["source_language"], index["target_language"]], axis=1)], axis=1)
        for pair in np.unique(pairs, axis=0):
            one = dataclasses.replace(part, chosen=part.chosen[(pairs == pair).all(axis=1)])
            split.append((tuple(pair.tolist()), one))
            counts[split[-1][0]] = counts.get(split[-1][0], 0.0) + len(one) * one.weight
    scale = sum(counts.values()) / sum(count ** (1 / temperature) for count in counts.values()) if counts else 0.0
    factors = {pair: scale * count ** (1 / temperature) / count for pair, count in counts.items()}
    return [dataclasses.replace(part, weight=part.weight * factors[pair]) for pair, part in split]


def mixed(parts: dict[Kind, list[Part]], share: float) -> list[Part]:
    """All parts; where both kinds are there, translations weighted so that they are `share` of an epoch."""
    instructions, parallel = parts.get("instructions", []), parts.get("parallel", [])
    if not (instructions and parallel):
        return instructions + parallel
    wanted = sum(len(part) * part.weight for part in instructions) * share / (1 - share)
    there = sum(len(part) * part.weight for part in parallel)
    scale = wanted / there if there else 0.0
    return instructions + [dataclasses.replace(part, weight=part.weight * scale) for part in parallel]
