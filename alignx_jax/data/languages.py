"""Language codes, checked and named by the Unicode CLDR (Babel), and what it lacks of published data sets."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection

from babel import Locale
from babel.core import UnknownLocaleError, get_global

from alignx_jax.exits import UserError

ENGLISH = "en"
_ENGLISH = Locale(ENGLISH)
_CODE = re.compile(r"([A-Za-z]{2,3})(?:[-_]([A-Za-z]{4}))?(?:[-_]([A-Za-z]{2}|[0-9]{3}))?")
_NONE = ("mul", "und", "zxx")  # several languages, an unknown one, no language

_ALIASES = {  # codes of OPUS-100, FLORES, NTREX and py3langid that name the same language, which CLDR keeps apart
    "nb": "no",  # what is called Norwegian is Bokmal; Nynorsk is nn
    "fuv": "ff",
    "pbt": "ps",
    "quy": "qu",
    "uzs": "uz",
}
_WHOLE = {"zho_simpl": "zh", "zho_trad": "zh-Hant"}  # FLORES-101
_NAMES = {  # what CLDR has no English name of
    "acm": "Mesopotamian Arabic",
    "acq": "Ta'izzi-Adeni Arabic",
    "apc": "Levantine Arabic",
    "azb": "South Azerbaijani",
    "cjk": "Chokwe",
    "gcf": "Guadeloupean Creole",
    "gcr": "Guianese Creole",
    "guw": "Gun",
    "hbo": "Ancient Hebrew",
    "hne": "Chhattisgarhi",
    "kbp": "Kabiye",
    "mey": "Hassaniya Arabic",
    "taq": "Tamasheq",
}
_SCRIPTS = {"ko": "Hang", "crh": "Latn"}  # as published data sets have it; CLDR: Kore, Cyrl
_VARIETIES = ("twi", "tw", "prs", "ajp")  # one language with another code of the same data set, for CLDR


def _script(tag: str, default: str | None = None) -> str | None:
    """The script that CLDR's likely subtags give a `language` or `language_TERRITORY`."""
    likely = get_global("likely_subtags").get(tag)
    return _SCRIPTS.get(tag) or (likely.split("_")[1] if likely else default)


@functools.cache
def _names() -> dict[str, str]:
    return {**_ENGLISH.languages, **_NAMES}


@functools.cache
def normalize(code: str) -> str:
    """The one code of a language: `deu_Latn`, `de-AT` and `de` are `de`; `zh_CN` is `zh`, `zh_TW` is `zh-Hant`.

    A script is kept only where it is not the usual one of the language; a territory only decides the script. `nb` is
    `no`. Every code of OPUS-100, FLORES, NTREX and py3langid is known, but for `zxx`, which is no language.

    Raises:
      UserError: there is no such language.
    """
    code = code.strip()
    if code.lower() in _WHOLE:
        return _WHOLE[code.lower()]
    if match := _CODE.fullmatch(code):
        language, script, territory = match.groups()
        language = language.lower()
        language, *rest = get_global("language_aliases").get(language, language).split("_")
        language = _ALIASES.get(language, language)
        script = script or next((part for part in rest if len(part) == 4), None)  # sh is sr_Latn
        territory = territory and territory.upper()
        if language in _names() and language not in _NONE and territory in (None, *_ENGLISH.territories):
            usual = _script(language)
            if script:
                script = script.title()
            elif territory:
                script = _script(f"{language}_{territory}", usual)
            if script in (None, usual):
                return language
            if script in _ENGLISH.scripts:
                return f"{language}-{script}"
    remedy = _remedy(code) or "give an ISO 639 code such as 'de', 'deu_Latn' or 'zh-Hans'"
    raise UserError(f"{code!r} is no language code; {remedy}")


def _remedy(code: str) -> str | None:
    """`Japanese is ja` for `jp`, a country, and for `Japanese`, a name."""
    wanted = code.casefold()
    by_name = next((language for language, name in _ENGLISH.languages.items() if name.casefold() == wanted), None)
    by_country = get_global("likely_subtags").get(f"und_{code.upper()}", "").split("_")[0]
    language = by_name or (by_country if code.upper() in _ENGLISH.territories else None)
    return f"{_ENGLISH.languages[language]} is {normalize(language)}" if language in _ENGLISH.languages else None


def is_variety(code: str) -> bool:
    """Whether a data set may have the language of `code` itself too: `fra` beside `fra-CA`, `aka` beside `twi`."""
    match = _CODE.fullmatch(code)
    return bool(match and (match[3] or match[1].lower() in _VARIETIES))


@functools.cache
def language_name(code: str) -> str:
    """The English name: `German` for `de`, `Traditional Chinese` for `zh-Hant`.

    Raises:
      UserError: there is no such language.
    """
    language, _, script = normalize(code).partition("-")
    if not script:
        return _names()[language]
    named = _ENGLISH.languages.get(f"{language}_{script}")
    return named or f"{_names()[language]} ({_ENGLISH.scripts[script]})"


def names_of(code: str) -> set[str]:
    """The words that name a language in a header: its code, its name in English and in itself; none if it is none."""
    try:
        language, _, _ = normalize(code).partition("-")
        known = {code, language, language_name(code), Locale.parse(language).languages.get(language, "")}
    except (UserError, UnknownLocaleError):
        known = {code}
    return set(re.findall(r"[^\W\d_]+", " ".join(known).casefold()))


def home(codes: Collection[str], pivot: str) -> str:
    """The language whose loss is called forgetting: English, or the pivot where it is not among the measured."""
    return ENGLISH if ENGLISH in codes else pivot
