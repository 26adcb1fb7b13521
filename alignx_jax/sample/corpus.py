"""The sample corpus: ten-way parallel sentences and short instructions, generated from the tables in `grammar/`.

How it is built. `grammar/templates.toml` has one table a sentence type with a pattern for each language,
`grammar/instructions.toml` one a kind of instruction. The other files have the fillers of the slots, a table each:
for each language a phrase, or its paradigm (`"der Markt | dem Markt"`) whose cells the category names once under
`[forms.<category>]`. Phrases are written out inflected; the code only selects cells. In a pattern

    {slot}             the first cell of the filler (after `g` and `case`, which are features, not text)
    {slot.form}        the cell of that name
    {slot:other}       the cell named by the gender (or noun class) of the filler of `other`: agreement
    {slot.form:other}  the cell `form_<gender>`
    {slot@other}       the cell named by the `case` of the filler of `other`: government
    [other: m x | f y] the text for the gender of the filler of `other`

A filler with one cell is invariable: that cell stands for every form. Gender is natural (`g` of the filler, people) or
grammatical (cell `g` of the language, things).

The combinations of fillers of a template are put in an order fixed by a hash, and the first `take` are rendered. No two
fillers of a category look alike in any language, so each sentence is distinct in every language (the tests check it). A
pair of fillers of a template's first two slots is either wholly in training or wholly held out, by hash, so that a
held-out sentence joins fillers which that template never joins in training, while each of them occurs in training.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import pathlib
import re
import tomllib
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

LANGUAGES = ("en", "de", "fr", "es", "zh", "ru", "ar", "hi", "sw", "vi")
GRAMMAR = pathlib.Path(__file__).parent / "grammar"
DATA = pathlib.Path(__file__).parent / "data"
HELD_OUT_SHARE = 0.06
_FEATURES = ("g", "case")
_PLACE = re.compile(r"\{(\w+)(?:\.(\w+))?(?:([:@])(\w+))?\}|\[(\w+): ([^\]]*)\]")


@dataclass(frozen=True)
class Filler:
    """What can stand in a slot: for each language its cells by form name (one unnamed cell: invariable)."""

    name: str
    gender: str | None
    cells: dict[str, dict[str, str]]

    def form(self, lang: str, name: str | None) -> str:
        """The cell of that name; without a name, the first cell that is text. KeyError for a form that is not there."""
        cells = self.cells[lang]
        if "" in cells:
            return cells[""]
        return cells[name or next(key for key in cells if key not in _FEATURES)]

    def agreement(self, lang: str) -> str:
        """Its gender or noun class in the language. KeyError where the grammar gives none."""
        return self.gender or self.cells[lang]["g"]


def _tables(name: str) -> dict[str, dict]:
    return tomllib.loads((GRAMMAR / f"{name}.toml").read_text(encoding="utf-8"))


def load_fillers() -> dict[str, dict[str, Filler]]:
    """The fillers of every category, category -> name -> filler, from every grammar file of fillers.

    Raises ValueError where a paradigm has another number of cells than its category names, or a language is missing.
    """
    fillers: dict[str, dict[str, Filler]] = {}
    for path in sorted(GRAMMAR.glob("*.toml")):
        if path.stem in ("templates", "instructions"):
            continue
        tables = _tables(path.stem)
        forms = tables.pop("forms", {})
        for category, entries in tables.items():
            fillers[category] = {
                name: _filler(f"{category}.{name}", entry, forms.get(category, {})) for name, entry in entries.items()
            }
    return fillers


def _filler(name: str, entry: dict[str, str], forms: dict[str, str]) -> Filler:
    cells = {}
    for lang in LANGUAGES:
        if lang not in entry:
            raise ValueError(f"grammar: {name} has no {lang}")
        texts = [unicodedata.normalize("NFC", text.strip()) for text in entry[lang].split("|")]
        names = forms.get(lang, "").split()
        if len(texts) == 1:
            names = [""]
        if len(names) != len(texts):
            raise ValueError(f"grammar: {name}.{lang} has {len(texts)} cells, its category names {len(names)}: {names}")
        cells[lang] = dict(zip(names, texts, strict=True))
    return Filler(name.split(".")[1], entry.get("g"), cells)


def render(pattern: str, lang: str, chosen: dict[str, Filler]) -> str:
    """A pattern with its slots filled, its first letter a capital."""

    def fill(match: re.Match[str]) -> str:
        slot, form, relation, other, inline, choices = match.groups()
        if inline:
            texts = dict(choice.split(maxsplit=1) for choice in choices.split("|"))
            return texts[chosen[inline].agreement(lang)].strip()
        if relation == "@":
            form = chosen[other].form(lang, "case")
        elif relation == ":":
            form = "_".join(filter(None, (form, chosen[other].agreement(lang))))
        return chosen[slot].form(lang, form)

    text = _PLACE.sub(fill, unicodedata.normalize("NFC", pattern))
    first = 1 if text[0] == "¿" else 0
    return text[:first] + text[first].upper() + text[first + 1 :]


def _digest(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("/".join(parts).encode()).digest()[:8], "big")


def _slots(template: dict, fillers: dict[str, dict[str, Filler]]) -> dict[str, tuple[str, list[Filler]]]:
    """Slot name -> (category, the fillers it takes), from declarations like `who2:person=sister brother`."""
    slots = {}
    for declaration in template["slots"]:
        label, _, only = declaration.partition("=")
        name, _, category = label.partition(":")
        table = fillers[category or name]
        slots[name] = (category or name, [table[key] for key in only.split() or table])
    return slots


def sentences() -> Iterator[tuple[bool, dict]]:
    """Yields (held out?, {"id", "text"}) for the whole corpus; `id` is `template:filler.filler...` in slot order."""
    fillers = load_fillers()
    for name, template in _tables("templates").items():
        slots = _slots(template, fillers)
        combinations = {}
        for combination in itertools.product(*(options for _, options in slots.values())):
            chosen = dict(zip(slots, combination, strict=True))
            if len({(slots[slot][0], filler.name) for slot, filler in chosen.items()}) == len(chosen):  # none twice
                combinations[f"{name}:" + ".".join(filler.name for filler in combination)] = chosen
        for identifier in sorted(combinations, key=_digest)[: template["take"]]:
            chosen = combinations[identifier]
            first_two = [filler.name for filler in chosen.values()][:2]
            text = {lang: render(template[lang], lang, chosen) for lang in LANGUAGES}
            yield _digest("split", name, *first_two) < HELD_OUT_SHARE * 2**64, {"id": identifier, "text": text}


def instructions() -> Iterator[dict]:
    """Yields {"id", "instruction", "input", "output", "lang"}: the same short general instructions in each language."""
    fillers, templates = load_fillers(), _tables("templates")
    for name, group in _tables("instructions").items():
        slots = _slots(group, fillers)
        for row, lang in itertools.product(group["rows"], LANGUAGES):
            keys = row.split()
            chosen = {slot: fillers[slots[slot][0]][key] for slot, key in zip(slots, keys, strict=True)}
            line = {"id": f"{name}:{'.'.join(keys)}.{lang}"}
            for part in ("instruction", "input", "output"):
                patterns = group.get(part)
                patterns = templates[patterns] if isinstance(patterns, str) else patterns
                line[part] = render(patterns[lang], lang, chosen) if patterns else ""
            yield line | {"lang": lang}


def write(folder: pathlib.Path = DATA) -> None:
    """Writes the three files of the sample, byte for byte the same each time, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = list(sentences())
    _write_lines(folder / "parallel.train.jsonl.gz", [line for held_out, line in corpus if not held_out])
    _write_lines(folder / "parallel.heldout.jsonl.gz", [line for held_out, line in corpus if held_out])
    _write_lines(folder / "instructions.jsonl.gz", instructions())


def _write_lines(path: pathlib.Path, lines: Iterable[dict]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    # GzipFile, not gzip.compress: that lets zlib fill the header, which then names the operating system.
    with path.open("wb") as file, gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as compressed:
        compressed.write(text.encode("utf-8"))
