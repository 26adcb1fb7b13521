"""The sample corpus: counts, distinctness, the split, the scripts, and orthography that rules can check."""

import collections
import gzip
import json
import re
import unicodedata

import pytest

from alignx_jax.sample import corpus
from alignx_jax.sample.corpus import LANGUAGES, Filler, render

SCRIPT = {"zh": "CJK", "ru": "CYRILLIC", "ar": "ARABIC", "hi": "DEVANAGARI"}  # the others: LATIN
ALPHABET = {  # stricter than the script, where the language's letters are few
    "en": "abcdefghijklmnopqrstuvwxyz",
    "de": "abcdefghijklmnopqrstuvwxyzäöüß",
    "fr": "abcdefghijklmnopqrstuvwxyzàâçéèêëîïôûùœ",
    "es": "abcdefghijklmnopqrstuvwxyzáéíóúüñ",
    "ru": "абвгдеёжзийклмнопрстуфхцчшщъыьэюя",
    "sw": "abcdefghijklmnopqrstuvwxyz",
}
ENDINGS = {"zh": "。？", "ar": ".؟", "hi": "।?"}  # the others: .?
MISSPELT = {  # what no sentence may contain
    "en": r"\ba [aeiou]|\ban [^aeiou]",
    "de": r"\b(zu (dem|der)|von dem|in dem|an dem|in das) ",
    "fr": r"\b(de|à) les? |\b([dlnjsc]|qu)e (?=[aeiouéèêîôœ])|\bla (?=[aeiouéèêîôœ])|\bsi ils?\b|\w[?]"
    r"|\b(de|le|la|que) (hôtel|hôpital|homme|horloge|herbe|histoire)",
    "es": r"\b(a|de) el\b|\by i|^[^¿]*\?$|\bla agua\b",
    "ru": r"\bс (ст|вт|ср)|\bв вт",
    "ar": r"\bلال|\bال(في|إلى)\b",
    "hi": r"(लड़का|बेटा|बूढ़ा आदमी|मछुआरा|रसोइया|थैला|डिब्बा|छाता|शीशा|अड्डा|मेरा \S+) (ने|को|से|के|की|में|पर) ",
    "zh": r"[,.?! ]",
}


def _read(name):
    with gzip.open(corpus.DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def train():
    return _read("parallel.train")


@pytest.fixture(scope="module")
def heldout():
    return _read("parallel.heldout")


@pytest.fixture(scope="module")
def instructions():
    return _read("instructions")


def _texts(lines, instructions=()):
    """(language, text) of every sentence and of every part of an instruction."""
    for line in lines:
        yield from line["text"].items()
    for line in instructions:
        yield from ((line["lang"], line[part]) for part in ("instruction", "input", "output") if line[part])


def test_committed_files_are_what_the_grammar_gives(tmp_path):
    corpus.write(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        # The text, not the bytes: another zlib may compress otherwise.
        assert gzip.decompress(path.read_bytes()) == gzip.decompress((corpus.DATA / path.name).read_bytes()), (
            f"{path.name} is stale: run alignx_jax.sample.corpus.write()"
        )
        assert path.read_bytes()[4:8] == b"\0\0\0\0", "a time stamp in the gzip header"
    assert {path.name for path in tmp_path.iterdir()} <= {path.name for path in corpus.DATA.iterdir()}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1_000_000


def test_counts(train, heldout):
    assert len(train) >= 5_500 and 450 <= len(heldout) <= 600
    templates = collections.Counter(line["id"].split(":")[0] for line in train + heldout)
    assert len(templates) >= 30 and min(templates.values()) >= 40


def test_ten_languages_in_each_line(train, heldout):
    assert all(tuple(line["text"]) == LANGUAGES for line in train + heldout)


def test_each_sentence_is_distinct_in_every_language(train, heldout):
    lines = train + heldout
    assert len({line["id"] for line in lines}) == len(lines)
    for lang in LANGUAGES:
        assert len({line["text"][lang] for line in lines}) == len(lines), lang


def _pair(line):
    template, fillers = line["id"].split(":")
    return template, *fillers.split(".")[:2]


def _places(lines):
    """(template, position, filler) of every slot."""
    return {
        (template, place, filler)
        for template, fillers in (line["id"].split(":") for line in lines)
        for place, filler in enumerate(fillers.split("."))
    }


def test_split_holds_out_combinations_of_fillers_seen_in_training(train, heldout):
    assert {_pair(line) for line in train}.isdisjoint({_pair(line) for line in heldout})
    assert _places(heldout) <= _places(train)
    assert {line["id"].split(":")[0] for line in heldout} == {line["id"].split(":")[0] for line in train}


def test_no_heldout_sentence_in_the_instructions(heldout, instructions):
    assert set(_texts(heldout)).isdisjoint(_texts([], instructions))


@pytest.mark.parametrize("lang", LANGUAGES)
def test_letters_are_of_the_script(train, heldout, instructions, lang):
    text = "".join(text for key, text in _texts(train + heldout, instructions) if key == lang)
    letters = {char for char in text if unicodedata.category(char)[0] in "LM"}
    assert letters and all(SCRIPT.get(lang, "LATIN") in unicodedata.name(char) for char in letters)
    assert {char.lower() for char in letters} <= set(ALPHABET.get(lang, letters | {c.lower() for c in letters}))
    assert not any(char.isdigit() for char in text), "numbers are words"
    assert unicodedata.is_normalized("NFC", text)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_orthography(train, heldout, instructions, lang):
    texts = [text for key, text in _texts(train + heldout, instructions) if key == lang]
    sentences = [line["text"][lang] for line in train + heldout]
    assert not [text for text in texts if re.search(r"[{}\[\]|/]|  |^ | $| [.,।]", text)]
    assert not [text for text in sentences if text[-1] not in ENDINGS.get(lang, ".?")]
    assert not [text for text in sentences if text.lstrip("¿")[0] != text.lstrip("¿")[0].upper()]
    assert not [text for text in texts if re.search(MISSPELT.get(lang, r"(?!)"), text, re.IGNORECASE)]


def test_instructions(instructions):
    assert collections.Counter(line["lang"] for line in instructions) == dict.fromkeys(LANGUAGES, 50)
    for line in instructions:
        assert list(line) == ["id", "instruction", "input", "output", "lang"]
        assert line["instruction"] and line["output"]
    assert len({line["id"] for line in instructions}) == len(instructions)
    assert len({(line["instruction"], line["input"]) for line in instructions}) == len(instructions)


def test_arithmetic_is_right(instructions):
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    sums = [line["id"].partition(":") for line in instructions if line["id"].startswith(("plus", "minus"))]
    assert len(sums) == 100
    for kind, _, fillers in sums:
        a, b, c = (words.index(word) + 1 for word in fillers.split(".")[:3])
        assert c == (a + b if kind == "plus" else a - b), fillers


def test_render_selects_cells():
    noun = Filler("table", None, {"ru": {"g": "m", "nom": "стол", "gen": "стола"}})
    adjective = Filler("new", None, {"ru": {"m": "новый", "f": "новая", "comp_m": "новее"}})
    number = Filler("three", None, {"ru": {"case": "gen", "word": "три"}})
    invariable = Filler("taxi", "f", {"ru": {"": "такси"}})
    chosen = {"noun": noun, "adj": adjective, "n": number, "x": invariable}
    assert render("{adj:noun} {noun}", "ru", chosen) == "Новый стол"
    assert render("{adj.comp:noun} {noun.gen}", "ru", chosen) == "Новее стола"
    assert render("¿{n} {noun@n}?", "ru", chosen) == "¿Три стола?"
    assert render("[x: m мой | f моя] {x.gen}: {adj:x}", "ru", chosen) == "Моя такси: новая"
    with pytest.raises(KeyError):
        render("{noun.acc}", "ru", chosen)


def test_a_paradigm_with_a_missing_cell_is_named():
    entry = dict.fromkeys(LANGUAGES, "x") | {"ru": "стол | стола"}
    with pytest.raises(ValueError, match=r"thing\.table\.ru has 2 cells, its category names 3"):
        corpus._filler("thing.table", entry, {"ru": "g nom gen"})
    del entry["vi"]
    with pytest.raises(ValueError, match=r"thing\.table has no vi"):
        corpus._filler("thing.table", entry, {"ru": "nom gen"})
