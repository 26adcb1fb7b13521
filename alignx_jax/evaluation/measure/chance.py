"""Chance in translation: references shuffled among the sentences, and outputs that are given to many sentences.

A model that answers every sentence with one text of the right language has a chrF++, too: the same against references
that are shuffled.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

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
