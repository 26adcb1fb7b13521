"""What is in a corpus: examples and their lengths by direction, duplicates, what was left out, languages in doubt."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table

from alignx_jax.data.examples import Examples

_SHOWN = 5  # sentences of a language
_BINS = 12
_BARS = " ▁▂▃▄▅▆▇█"
_PLACE = re.compile(r"(?<![\w-])\d+")  # a number, not that of UTF-8
_BAD_LINE = re.compile(r"(.*?: ?(?:element |row )?\d+): (.*)")


def facts(sources: Sequence[Examples]) -> dict[str, Any]:
    """The report as JSON.

    - `sources`: of each its `records`, `bad_lines` and `dropped` examples, by reason.
    - `directions`: of each its `examples`, `tokens` (mean, median, 95th percentile, longest, all) and `histogram` of
      lengths between `edges`, prompt and special tokens included; and `duplicates`, examples whose record's text occurs
      before in the same direction of any source. Instructions are one "direction" a source, named by it.
    - `languages`: of each language the sentences `checked` and those `doubtful`, to whose language py3langid gives a
      probability below 0.2, which other one it takes them for, and a few of them with their places. A language that it
      does not know has null.
    """
    by_direction: dict[str, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    for one in sources:
        for name, chosen in _directions(one):
            by_direction[name].append((one.index["length"][chosen], one.index["record_hash"][chosen]))
    longest = max((int(one.index["length"].max()) for one in sources), default=1)
    edges = np.unique(np.linspace(0, longest + 1, _BINS + 1).astype(int))
    return {
        "sources": [_source(one) for one in sources],
        "edges": edges.tolist(),
        "directions": {name: _direction(by_direction[name], edges) for name in sorted(by_direction)},
        "languages": _languages([one for one in sources if one.corpus.kind == "parallel"]),
    }


def show(found: dict[str, Any]) -> Group:
    """The report for a screen."""
    directions = Table(title="examples by direction, lengths in tokens", title_justify="left")
    for name in ("direction", "examples", "duplicates", "mean", "95 %", "longest", "lengths"):
        directions.add_column(name, justify="left" if name in ("direction", "lengths") else "right", no_wrap=True)
    for name, one in found["directions"].items():
        tokens = (f"{one['tokens'][key]:,.0f}" for key in ("mean", "p95", "max"))
        directions.add_row(
            name.rpartition("/")[2],
            f"{one['examples']:,}",
            f"{one['duplicates']:,}",
            *tokens,
            _bars(one["histogram"]),
        )
    out = Table(title="left out", title_justify="left")
    for name in ("source", "reason", "number"):
        out.add_column(name, justify="right" if name == "number" else "left")
    for one in found["sources"]:
        for reason, count in [*one["bad_lines"].items(), *one["dropped"].items()]:
            out.add_row(one["source"], reason, f"{count:,}")
    languages = Table(title="languages in doubt", title_justify="left")
    for name in ("language", "checked", "doubtful", "taken for", "such as"):
        languages.add_column(name, justify="right" if name in ("checked", "doubtful") else "left")
    for code, one in found["languages"].items():
        if one is None:
            languages.add_row(code, "", "", "", "py3langid does not know it")
        elif one["doubtful"]:
            taken = (
                ", ".join(f"{label} {count}" for label, count in list(one["taken_for"].items())[:3]) or "nothing clear"
            )
            example = one["examples"][0]
            such = f"{example['text'][:40]} ({example['origin'].rpartition('/')[2]})"
            share = f"{one['doubtful']:,} ({one['doubtful'] / one['checked']:.1%})"
            languages.add_row(code, f"{one['checked']:,}", share, taken or "nothing clear", such)
    return Group(*(table for table in (directions, out, languages) if table.row_count))


def _directions(one: Examples) -> list[tuple[str, np.ndarray | slice]]:
    """The examples of each direction."""
    if one.corpus.kind == "instructions":
        return [(f"instructions of {one.corpus.source}", slice(None))]
    codes = np.stack([one.index["source_language"], one.index["target_language"]], axis=1)
    found = []
    for pair in np.unique(codes, axis=0):
        source, target = (one.languages[code] for code in pair)
        found.append((f"{source} > {target}", (codes == pair).all(axis=1)))
    return found


def _direction(parts: list[tuple[np.ndarray, np.ndarray]], edges: np.ndarray) -> dict[str, Any]:
    lengths, texts = map(np.concatenate, zip(*parts, strict=True))
    tokens = {"mean": float(lengths.mean()), "median": float(np.median(lengths)), "max": int(lengths.max())}
    return {
        "examples": len(lengths),
        "duplicates": len(texts) - len(np.unique(texts)),
        "tokens": tokens | {"p95": float(np.percentile(lengths, 95)), "all": int(lengths.sum())},
        "histogram": np.histogram(lengths, edges)[0].tolist(),
    }


def _source(one: Examples) -> dict[str, Any]:
    reasons = Counter()
    for folder in (one.corpus.folder, one.folder):
        with open(folder / "skipped.txt", encoding="utf-8") as lines:
            for line in lines:
                match = _BAD_LINE.fullmatch(line.rstrip("\n"))
                reason = (match.group(2) if match else line.rstrip("\n")).partition(";")[0]
                reasons[_PLACE.sub("N", reason)] += 1  # at which byte is in the file
    return {
        "kind": one.corpus.kind,
        "source": one.corpus.source,
        "records": len(one.corpus),
        "bad_lines": dict(reasons.most_common()),
        "dropped": one.dropped,
    }


def _languages(sources: Sequence[Examples]) -> dict[str, Any]:
    """What `doubts.look` saw of each language, over all sources and pairs."""
    by_code: dict[str, list[dict[str, Any] | None]] = defaultdict(list)
    for one in sources:
        for pair in one.doubts:
            for code, side in pair["languages"].items():
                by_code[code].append(side)
    found = {}
    for code, sides in sorted(by_code.items()):
        known = [side for side in sides if side]
        taken = sum((Counter(side["taken_for"]) for side in known), Counter())
        found[code] = known and {
            "checked": sum(side["checked"] for side in known),
            "doubtful": sum(side["doubtful"] for side in known),
            "taken_for": dict(taken.most_common()),
            "examples": [example for side in known for example in side["examples"]][:_SHOWN],
        }
    return {code: one or None for code, one in found.items()}


def _bars(histogram: Sequence[int]) -> str:
    most = max(histogram)
    return "".join(_BARS[-(-count * (len(_BARS) - 1) // most)] for count in histogram)
