"""Which language a text is in, by py3langid."""

from __future__ import annotations

import contextlib
import functools

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from alignx_jax.data.languages import normalize
from alignx_jax.exits import UserError

LEAST = 0.2  # probability of the target language; what it was chosen by is in dev/decisions.md
_READ = 2000  # characters of a text, which say enough


@functools.cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@functools.cache
def _labels() -> dict[str, str]:
    """The identifier's labels by language; of `uz` and `uzs`, which are one, the shorter."""
    labels = {}
    for label in sorted(_identifier().labels, key=len):
        with contextlib.suppress(UserError):  # zxx is no language
            labels.setdefault(normalize(label).partition("-")[0], label)
    return labels


def label_of(code: str) -> str | None:
    """What the language identifier calls a language, whatever its script; None if it does not know it."""
    return _labels().get(normalize(code).partition("-")[0])


def is_improbable(text: str, label: str) -> bool:
    """Whether the identifier holds the language for improbable.

    That another one is more probable is so of one Indonesian sentence in ten. Chosen among the languages
    at hand alone, a text in any other language would be taken for one of them.
    """
    return dict(_identifier().rank(text[:_READ]))[label] < LEAST


def most_probable(text: str) -> str:
    """The identifier's own code of the language that it takes a text for."""
    return _identifier().classify(text[:_READ])[0]
