import pytest

from alignx_jax.data import corpora
from alignx_jax.data.builders import Opus100
from alignx_jax.exits import UserError


def test_the_pairs_are_those_of_the_release():
    """99 pairs with English and 15 without, codes in the order of the alphabet (the corpus's own description)."""
    pairs = [config.name.split("-") for config in Opus100.BUILDER_CONFIGS]
    assert all(one < other for one, other in pairs)
    assert len([pair for pair in pairs if "en" in pair]) == 99 and len(pairs) == 99 + 15
    assert len({code for pair in pairs for code in pair}) == 100


def test_the_training_split_is_a_source(cache):
    corpus = corpora.prepare("parallel", "opus100/de-en", cache, "stop")
    fields = ("source_language", "target_language", "source", "target")
    assert [tuple(record[field] for field in fields) for record in corpus.records(range(len(corpus)))] == [
        ("de", "en", "Guten Morgen.", "Good morning."),
        ("de", "en", "Der Zug ist pünktlich.", "The train is on time."),
        ("de", "en", "Wir sehen uns am Sonntag.", "See you on Sunday."),
    ]
    assert corpus.records([2])[0]["origin"] == "opus.de-en-train.de:4"
    assert corpus.skipped == 1
    assert "opus.de-en-train.de:3: field 'src' is empty" in (corpus.folder / "skipped.txt").read_text()


def test_it_is_built_once_and_other_content_has_another_fingerprint(cache, tmp_path):
    first = corpora.prepare("parallel", "opus100/de-en", cache, "stop")
    archive = cache / "downloads" / "manual" / "opus-100-corpus-de-en-v1.0.tar.gz"
    archive.unlink()
    again = corpora.prepare("parallel", "opus100/de-en", cache, "stop")
    assert again.fingerprint == first.fingerprint
    assert again.fingerprint != corpora.prepare("parallel", "opus100/en-yo", cache, "stop").fingerprint


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("opus100/en-de", "opus100/en-de: no such file or folder, and opus100 has opus100/de-en$"),
        ("opus100/xx", "opus100 has opus100/af-en, "),
        ("opus100", "opus100 has opus100/af-en, "),
        ("opus100/de-fr", "opus100/de-fr: has no sentences for training, only test"),
    ],
)
def test_what_is_not_there_is_said(cache, source, message):
    with pytest.raises(UserError, match=message):
        corpora.prepare("parallel", source, cache, "stop")


def test_a_folder_of_the_name_goes_first(cache, tmp_path, monkeypatch):
    (tmp_path / "opus100" / "de-en").mkdir(parents=True)
    (tmp_path / "opus100" / "de-en" / "mine.de-en.tsv").write_text("eins\tone\n")
    monkeypatch.chdir(tmp_path)
    assert corpora.prepare("parallel", "opus100/de-en", cache, "stop").records([0])[0]["source"] == "eins"
