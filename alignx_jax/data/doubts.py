"""Pairs that may not be what they say: sentences in another language, the same sentence on both sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from alignx_jax.data.corpora import Corpus
from alignx_jax.data.identify import is_improbable, label_of, most_probable
from alignx_jax.data.languages import language_name

CHECKED = 100
"""Most records of a source and pair whose languages are identified, spread evenly over it."""
_IN_ALL = 5_000  # most records of a source, however many pairs of languages it has
_SHOWN = 5  # sentences of a language
_SHARE = 0.2  # doubtful sentences, or equal sides, from which on a pair of languages is warned of
_WARNINGS = 3  # of a source


def look(corpus: Corpus, index: np.ndarray, languages: Sequence[str]) -> list[dict[str, Any]]:
    """What is in doubt in an encoded corpus of parallel text, as JSON.

    Of each pair of languages its `records`, those with the `same` sentence on both sides, and by language the sentences
    `checked` and those `doubtful`, to whose language py3langid gives a probability below 0.2, which other one it takes
    them for, and a few of them with their places. A language that py3langid does not know has null.
    """
    codes = np.sort(np.stack([index["source_language"], index["target_language"]], axis=1), axis=1)
    pairs = np.unique(codes, axis=0)
    most = max(min(CHECKED, _IN_ALL // max(len(pairs), 1)), 1)
    found = []
    for pair in pairs:
        of_pair = (codes == pair).all(axis=1)
        same = of_pair & (index["source_hash"] == index["target_hash"])
        records = np.unique(index["record"][of_pair])
        count = min(most, len(records))
        sampled = corpus.records(records[np.arange(count) * len(records) // count])
        found.append(
            {
                "records": len(records),
                "same": len(np.unique(index["record"][same])),
                "languages": {languages[code]: _language(languages[code], sampled) for code in pair},
            }
        )
    return found


def _language(code: str, records: Sequence[dict[str, str]]) -> dict[str, Any] | None:
    label = label_of(code)
    if label is None:
        return None
    sides = ("source", "target")
    texts = [(r[side], r["origin"]) for r in records for side in sides if r[f"{side}_language"] == code]
    doubtful = [(text, origin) for text, origin in texts if is_improbable(text, label)]
    taken = Counter(most_probable(text) for text, _ in doubtful)
    del taken[label]  # the first of many that are about as probable
    return {
        "checked": len(texts),
        "doubtful": len(doubtful),
        "taken_for": dict(taken.most_common()),
        "examples": [{"origin": origin, "text": text} for text, origin in doubtful[:_SHOWN]],
    }


def warnings(source: str, found: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences on the pairs of languages of which a fifth or more of what was looked at is in doubt."""
    said = [f"{source}: {text}" for text in filter(None, map(_warning, found))]
    more = len(said) - _WARNINGS
    return said[:_WARNINGS] + [f"{source}: the same is so of {more:,} more pairs of languages."] * (more > 0)


def has_equal_sides(one: dict[str, Any]) -> bool:
    """Whether many records of a pair of languages have the same sentence on both sides."""
    return one["same"] > 1 and one["same"] >= _SHARE * one["records"]


def is_doubtful(side: dict[str, Any] | None) -> bool:
    """Whether many sentences of a language do not look like it."""
    return side is not None and side["doubtful"] >= max(2, _SHARE * side["checked"])


def _warning(one: dict[str, Any]) -> str:
    names = " and ".join(map(language_name, one["languages"]))
    parts, swapped = [], []
    if has_equal_sides(one):
        parts.append(f"{one['same']:,} of {one['records']:,} pairs have the same sentence on both sides")
    for code, side in one["languages"].items():
        if not is_doubtful(side):
            continue
        taken = next(iter(side["taken_for"]), None)
        swapped.append(taken in [label_of(other) for other in one["languages"] if other != code])
        example = side["examples"][0]
        parts.append(
            f"{side['doubtful']:,} of {side['checked']:,} {language_name(code)} sentences do not look like it"
            + (f" (py3langid takes most for {taken!r})" if taken else "")
            + f", such as {example['text'][:40]!r} at {example['origin']}"
        )
    question = "; are the two sides swapped?" if len(swapped) == 2 and all(swapped) else "."
    return f"of {names}, {'; '.join(parts)}{question}" if parts else ""
