import types
from collections import Counter

import numpy as np
import pytest

from alignx_jax.data import mixture, packing
from alignx_jax.data.examples import INDEX

CODES = ["de", "en", "fr", "sw"]


def _part(counts: dict[str, int], weight: float = 1.0) -> mixture.Part:
    """A source with so many examples of each direction, its languages numbered in its own way."""
    own = sorted({code for pair in counts for code in pair.split("-")}, reverse=True)
    index = np.zeros(sum(counts.values()), INDEX)
    sides = [pair.split("-") for pair, count in counts.items() for _ in range(count)]
    for side, codes in zip(("source_language", "target_language"), zip(*sides, strict=True), strict=True):
        index[side] = [own.index(code) for code in codes]
    examples = types.SimpleNamespace(index=index)
    languages = np.array([CODES.index(code) for code in own], np.int32)
    return mixture.Part(examples, np.arange(len(index)), weight, languages)


def _taken(parts: list[mixture.Part]) -> Counter:
    """Examples of each pair in an epoch, as the epoch's order has them."""
    where = [(part, place) for part in parts for place in range(len(part))]
    taken = Counter()
    for number in packing.order(0, 0, [len(part) for part in parts], [part.weight for part in parts]):
        part, place = where[number]
        entry = part.examples.index[part.chosen[place]]
        pair = (CODES[part.languages[entry[side]]] for side in ("source_language", "target_language"))
        taken["-".join(sorted(pair))] += 1
    return taken


@pytest.mark.parametrize("temperature", [2.0, 5.0, 100.0])
def test_an_epoch_takes_each_pair_by_its_count_to_the_power_of_one_over_the_temperature(temperature):
    sources = [_part({"de-en": 300, "en-de": 300, "fr-en": 60}), _part({"en-fr": 80, "sw-en": 10}, weight=0.5)]
    counts = {"de-en": 600, "en-fr": 60 + 40, "en-sw": 5}
    shares = {pair: (count / 705) ** (1 / temperature) for pair, count in counts.items()}
    taken = _taken(mixture.balanced(sources, temperature))
    for pair, share in shares.items():
        assert taken[pair] == pytest.approx(705 * share / sum(shares.values()), abs=1.5)  # two sources are rounded
    assert sum(taken.values()) == pytest.approx(705, abs=2)


def test_nothing_is_lost_and_every_example_has_one_part():
    source = _part({"de-en": 7, "en-de": 5, "sw-fr": 3})
    parts = mixture.balanced([source], 5.0)
    assert sorted(place for part in parts for place in part.chosen.tolist()) == list(range(15))
    assert mixture.balanced([], 5.0) == []
    assert mixture.balanced([source], 1.0) == [source]
