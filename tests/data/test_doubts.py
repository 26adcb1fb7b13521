import dataclasses

import pytest

from alignx_jax.config import DataConfig
from alignx_jax.data import corpora, doubts, examples, prompts
from tests.data.test_report import ENGLISH, GERMAN

PAIRS = list(zip(GERMAN, ENGLISH, strict=True)) * 4


def _notes(tmp_path, tokenizer, pairs, languages=("de", "en"), **settings) -> list[str]:
    path = tmp_path / "a.tsv"
    path.write_text("".join("\t".join((*languages, *pair)) + "\n" for pair in pairs), encoding="utf-8")
    config = dataclasses.replace(DataConfig(cache=str(tmp_path / "cache")), **settings)
    corpus = corpora.prepare("parallel", str(path), tmp_path / "cache", "stop")
    return examples.encode(corpus, tokenizer, prompts.load("sample"), config).notes


def test_good_pairs_are_not_doubted(tmp_path, tiny_tokenizer):
    assert _notes(tmp_path, tiny_tokenizer, PAIRS) == []


@pytest.mark.parametrize("swapped", [2, 3, 12])
def test_swapped_columns_are_doubted_from_a_fifth_on(tmp_path, tiny_tokenizer, swapped):
    pairs = [pair[::-1] if n < swapped else pair for n, pair in enumerate(PAIRS)]
    notes = _notes(tmp_path, tiny_tokenizer, pairs)
    if swapped == 2:  # of 12, a sixth
        assert notes == []
        return
    (note,) = notes
    assert note.startswith(
        f"{tmp_path}/a.tsv: of German and English, {swapped} of 12 German sentences do not look like it"
    )
    assert f"{swapped} of 12 English sentences do not look like it (py3langid takes most for 'de')" in note
    assert f"'{GERMAN[0][:40]}' at {tmp_path}/a.tsv:1" in note and note.endswith("; are the two sides swapped?")


def test_the_same_sentence_on_both_sides(tmp_path, tiny_tokenizer):
    pairs = [
        (english.upper(), english) if n % 4 == 0 else (german, english) for n, (german, english) in enumerate(PAIRS)
    ]
    (note,) = _notes(tmp_path, tiny_tokenizer, pairs)
    assert "of German and English, 3 of 12 pairs have the same sentence on both sides" in note


def test_languages_that_the_identifier_does_not_know_are_not_doubted(tmp_path, tiny_tokenizer):
    assert _notes(tmp_path, tiny_tokenizer, PAIRS, ("ee", "en")) == []


def test_a_limit_is_said(tmp_path, tiny_tokenizer):
    (note,) = _notes(tmp_path, tiny_tokenizer, PAIRS, limit=6)
    assert note == f"{tmp_path}/a.tsv: 6 of its 12 records are used (--data.limit)."


def test_of_many_pairs_a_few_are_warned_of():
    side = {"checked": 10, "doubtful": 9, "taken_for": {}, "examples": [{"origin": "a:1", "text": "x"}]}
    found = [{"records": 10, "same": 0, "languages": {"de": side, "en": None}}] * 8
    said = doubts.warnings("a.tsv", found)
    assert len(said) == 4 and said[-1] == "a.tsv: the same is so of 5 more pairs of languages."
