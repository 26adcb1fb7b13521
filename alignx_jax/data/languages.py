"""Language codes, checked and named by the Unicode CLDR (Babel)."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Collection

from babel import Locale
from babel.core import get_global

from alignx_jax.exits import UserError

ENGLISH = "en"
_ENGLISH = Locale(ENGLISH)
_CODE = re.compile(r"([A-Za-z]{2,3})(?:[-_]([A-Za-z]{4}))?(?:[-_]([A-Za-z]{2}|[0-9]{3}))?")


def _script(tag: str, default: str | None = None) -> str | None:
    """The script that CLDR's likely subtags give a `language` or `language_TERRITORY`."""
    likely = get_global("likely_subtags").get(tag)
    return likely.split("_")[1] if likely else default


@functools.cache
def normalize(code: str) -> str:
    """The one code of a language: `deu_Latn`, `de-AT` and `de` are `de`; `zh_CN` is `zh`, `zh_TW` is `zh-Hant`.

    A script is kept only where it is not the usual one of the language; a territory only decides the script.

    Raises:
      UserError: CLDR knows no such language.
    """
    match = _CODE.fullmatch(code.strip())
    if match:
        language, script, territory = match.groups()
        language = language.lower()
        language, *rest = get_global("language_aliases").get(language, language).split("_")
        script = script or next((part for part in rest if len(part) == 4), None)  # sh is sr_Latn
        territory = territory and territory.upper()
        known = language in _ENGLISH.languages and language not in ("mul", "und", "zxx")
        if known and territory in (None, *_ENGLISH.territories):
            usual = _script(language)
            if script:
                script = script.title()
            elif territory:
                script = _script(f"{language}_{territory}", usual)
            if script in (None, usual):
                return language
            if script in _ENGLISH.scripts:
                return f"{language}-{script}"
    near = difflib.get_close_matches(code, _ENGLISH.languages, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise UserError(f"unknown language code {code!r}{hint}; give an ISO 639 code such as 'de', 'deu_Latn' or 'zh-Hans'")


@functools.cache
def language_name(code: str) -> str:
    """The English name: `German` for `de`, `Traditional Chinese` for `zh-Hant`.

    Raises:
      UserError: CLDR knows no such language.
    """
    language, _, script = normalize(code).partition("-")
    if not script:
        return _ENGLISH.languages[language]
    named = _ENGLISH.languages.get(f"{language}_{script}")
    return named or f"{_ENGLISH.languages[language]} ({_ENGLISH.scripts[script]})"


def home(codes: Collection[str], pivot: str) -> str:
    """The language whose loss is called forgetting: English, or the pivot where it is not among the measured."""
    return ENGLISH if ENGLISH in codes else pivot
