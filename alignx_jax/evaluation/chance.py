"""Translation and chance: the score that a model's outputs have against other sentences' references, and how many of
its outputs are its own.

A model that answers every sentence with one text of the right language has a chrF++, too: the same against references
that are shuffled among the sentences.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignx_jax.evaluation.cells import SCORE, value_of

SCORED = "chrF++"
"""The metric that a verdict is about."""
_FEW = 0.5  # share of distinct outputs below which a direction repeats itself
_SEED = 0


def derangement(n: int) -> np.ndarray:
    """[N] a permutation of n numbers, n above 1, that leaves none in its place: one random cycle; always the same."""
    order = np.random.default_rng(_SEED).permutation(n)
    found = np.empty(n, int)
    found[order] = np.roll(order, 1)
    return found


def bare(text: str) -> str:
    """Letters, marks and numbers alone, NFKC and casefolded: what two texts are compared by."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in folded if unicodedata.category(c)[0] in "LMN")


def distinct(outputs: Sequence[str]) -> float:
    """Different outputs, by letters, marks and numbers, as a share of all."""
    return len(set(map(bare, outputs))) / len(outputs)


def is_repeating(share: float) -> bool:
    """Of a direction's share of distinct outputs: do most sentences get a text that another one gets, too?"""
    return share < _FEW


def mark(scores: Mapping[str, Any], change: str) -> str:
    """`change`, the mark of a higher score (see `cells.mark`), unless chance has such a score: then `chance`.

    Args:
      scores: of a direction or an average, as evaluation.json has them.
    """
    if change != "better":
        return change
    above = scores.get(f"{SCORED}_above_floor")
    if above is None:
        return "same"
    return "better" if above[1] > 0 and not _mostly_repeating(scores) else "chance"


def sentence(scores: Mapping[str, Any]) -> str:
    """What to know of a score besides its change; empty where there is no floor."""
    above = scores.get(f"{SCORED}_above_floor")
    if above is None:
        return ""
    floor = SCORE.text(value_of(scores[f"{SCORED}_floor"]))
    test = f"{SCORE.signed(above[0])}, 95% interval {above[1]:.1f} to {above[2]:.1f}"
    shuffled = f"with references shuffled among the sentences it is {floor} ({test})"
    many, of = scores["repeating"]
    repeats = f"{many} of {of} directions give most sentences a text that another one gets, too"
    if above[1] <= 0:
        return f"No better than chance: {shuffled}{f'; {repeats}' if many else ''}."
    if _mostly_repeating(scores):
        return f"No better translation all the same: {repeats}; {shuffled}."
    return f"{shuffled[0].upper()}{shuffled[1:]}."


def _mostly_repeating(scores: Mapping[str, Any]) -> bool:
    many, of = scores["repeating"]
    return 2 * many > of


def repeating(model: dict) -> dict[str, float]:
    """The directions that give most sentences a text that another one gets, with their shares of distinct outputs."""
    directions = (model["translation"] or {}).get("directions", {})
    shares = {name: scores["distinct"] for name, scores in directions.items() if "distinct" in scores}
    return {name: share for name, share in shares.items() if is_repeating(share)}
