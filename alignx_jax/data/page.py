"""The report on a corpus as a page that needs no other file: what stands out, histograms of lengths, tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np

from alignx_jax.config import DataConfig
from alignx_jax.console import printable
from alignx_jax.data import doubts
from alignx_jax.data.examples import Examples
from alignx_jax.data.languages import language_name

_NAMED = 3  # sources of a title, languages of a sentence
_LONG_NAME = 40  # characters of a source in the title
_PICTURES = 40  # histograms at most: those of the most examples
_LONGEST = 300  # characters of a sentence
_FEW_PAIRS = 100
_FEW_SHARE = 0.1  # of the median language's pairs
_WIDTH, _HEIGHT = 340, 200  # of a histogram: the pixels that a telephone gives it
_TOP, _RIGHT, _BOTTOM = 10, 8, 40  # its other margins
_REASONS = {
    "overlong": "longer than the cutoff of {cutoff:,} tokens",
    "few target tokens": "with fewer than {least:,} tokens of the translation before the last",
    "no source token": "without a token of the source sentence",
    "no response token": "without a token of the response",
}


def html(facts: dict[str, Any], sources: Sequence[Examples], config: DataConfig) -> str:
    """The page.

    Args:
      facts: `report.facts` of the sources.
      sources: for their notes and pairs of languages.
      config: for the cutoff, and what becomes of longer examples.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("alignx_jax.data", "."),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,  # markup of a macro is kept
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"share": _share, "shortened": lambda text: _shortened(text, _LONGEST)}
    environment.tests["doubtful"] = doubts.is_doubtful
    pairs = _pairs(sources)
    directions = facts["directions"]
    largest = sorted(directions, key=lambda name: -directions[name]["examples"])[:_PICTURES]
    highest = max(max(direction["histogram"]) for direction in directions.values())
    left = 30 + 6.5 * len(f"{highest:,}")  # room for the numbers of any, so that all axes begin at one place
    return environment.get_template("corpus.html.jinja").render(
        facts=facts,
        title=_title(facts),
        stands_out=_stands_out(facts, sources, config, pairs),
        notes=list(dict.fromkeys(note for source in sources for note in source.notes)),
        used=[source.used for source in sources],
        pictures=[_picture(name, facts, left) for name in directions if name in largest],
        languages={code: (language_name(code), pairs[code], sides) for code, sides in facts["languages"].items()},
        reasons={
            key: text.format(cutoff=config.cutoff, least=config.min_target_tokens) for key, text in _REASONS.items()
        },
        config=config,
    )


def _title(facts: dict[str, Any]) -> str:
    """The sources by name, a long path by its last part."""
    sources = dict.fromkeys(source["source"] for source in facts["sources"])
    return _listed([name if len(name) < _LONG_NAME else _last_part(name) for name in sources])


def _last_part(path: str) -> str:
    folder, _, name = path.rstrip("/").rpartition("/")
    return f"{'.../' if folder else ''}{_shortened(name, _LONG_NAME)}"


def _stands_out(
    facts: dict[str, Any], sources: Sequence[Examples], config: DataConfig, pairs: Counter[str]
) -> list[tuple[str, str]]:
    """What may be wrong with the data, the certain first, each with the section of the page that says more."""
    parts = []
    if bad := sum(sum(source["bad_lines"].values()) for source in facts["sources"]):
        parts.append((f"{_count(bad, 'faulty line')}, left out", "left-out"))
    dropped = sum((Counter(source["dropped"]) for source in facts["sources"]), Counter())
    for reason, number in dropped.items():
        text = _REASONS[reason].format(cutoff=config.cutoff, least=config.min_target_tokens)
        parts.append((f"{_count(number, 'example')} {text}, left out", "left-out"))
    directions = facts["directions"].values()
    cut = [one for one in directions if config.overlong == "truncate" and one["tokens"]["max"] >= config.cutoff]
    if cut:
        parts.append((f"examples of {_count(len(cut), 'direction')} cut off after {config.cutoff:,} tokens", "lengths"))
    examples = sum(one["examples"] for one in directions)
    if duplicates := sum(one["duplicates"] for one in directions):
        text = f"{_count(duplicates, 'duplicate')} among {_count(examples, 'example')} ({_share(duplicates, examples)})"
        parts.append((text, "directions"))
    seen = [pair for source in sources for pair in source.doubts]
    if equal := [pair for pair in seen if doubts.has_equal_sides(pair)]:
        same, records = (sum(pair[key] for pair in equal) for key in ("same", "records"))
        parts.append((f"{same:,} of {records:,} pairs with the same sentence on both sides", "languages"))
    sides = [(code, side) for pair in seen for code, side in pair["languages"].items() if doubts.is_doubtful(side)]
    if sides:
        doubtful, checked = (sum(side[key] for _, side in sides) for key in ("doubtful", "checked"))
        names = _listed([language_name(code) for code in dict.fromkeys(code for code, _ in sides)])
        text = f"{doubtful:,} of {checked:,} checked sentences of {names} that do not look like their language"
        parts.append((text, "languages"))
    least = max(_FEW_PAIRS, _FEW_SHARE * float(np.median(list(pairs.values())))) if pairs else 0
    if few := [(number, code) for code, number in pairs.items() if number < least]:
        text = _listed([f"{language_name(code)} ({number:,})" for number, code in sorted(few)])
        parts.append((f"very few pairs of {text}", "languages"))
    return parts


def _pairs(sources: Sequence[Examples]) -> Counter[str]:
    """Records by language, of all sources of parallel text."""
    pairs = Counter()
    for source in sources:
        for pair in source.doubts:
            pairs.update(dict.fromkeys(pair["languages"], pair["records"]))
    return pairs


def _picture(name: str, facts: dict[str, Any], left: float) -> dict[str, Any]:
    """A histogram: its bars, and its ticks with their places, in units of the SVG."""
    direction, edges = facts["directions"][name], facts["edges"]
    counts, tokens = direction["histogram"], direction["tokens"]
    heights, lengths = _ticks(max(counts), 5), _ticks(edges[-1], 6)
    x = lambda length: round(left + (_WIDTH - left - _RIGHT) * length / edges[-1], 1)  # noqa: E731
    y = lambda count: round(_HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * count / max(counts), 1)  # noqa: E731
    bars = []
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        between = f"{low:,} to {high - 1:,} tokens" if high - low > 1 else _count(low, "token")
        bar = {"x": x(low), "y": y(count), "width": x(high) - x(low) - 1, "height": y(0) - y(count)}
        bars.append(bar | {"text": f"{between}: {_count(count, 'example')}"})
    codes = re.fullmatch(r"(\S+) > (\S+)", name)
    facts_of_it = f"median {tokens['median']:,.0f}, 95% up to {tokens['p95']:,.0f}, longest {tokens['max']:,} tokens"
    return {
        "title": name,
        "name": f"{language_name(codes[1])} to {language_name(codes[2])}" if codes else "",
        "note": f"{_count(direction['examples'], 'example')}; {facts_of_it}",
        "size": (_WIDTH, _HEIGHT),
        "left": round(left, 1),
        "bars": [{k: round(v, 1) if k != "text" else v for k, v in bar.items()} for bar in bars if bar["height"] > 0],
        "heights": [(y(count), f"{count:,}") for count in heights],
        "lengths": [(x(length), f"{length:,}") for length in lengths],
    }


def _ticks(top: int, most: int) -> list[int]:
    """0, step, 2 step, ... up to `top`, at most `most` steps, each 1, 2 or 5 times a power of ten."""
    step = next(s * 10**n for n in range(20) for s in (1, 2, 5) if top <= most * s * 10**n)
    return list(range(0, top + 1, step))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if 1000 * part >= whole else "below 0.1%"


def _listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`, `a, b, c and 4 more`."""
    more = len(names) - _NAMED
    shown = [*names[:_NAMED], f"{more:,} more"] if more > 0 else list(names)
    return f"{', '.join(shown[:-1])} and {shown[-1]}" if len(shown) > 1 else shown[0]


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
