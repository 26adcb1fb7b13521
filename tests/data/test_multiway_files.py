import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alignx_jax.data import multiway_files, pipeline
from alignx_jax.exits import UserError

ENGLISH = ["The river is wide here.", "A cat sleeps on the roof."]
GERMAN = ["Der Fluss ist hier breit.", "Eine Katze schläft auf dem Dach."]


def _rows(sentences, ids=(1, 2)):
    return [{"id": id, "iso_639_3": "x", "text": text} for id, text in zip(ids, sentences, strict=True)]


def _jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_folder_as_flores_plus_is_published(tmp_path, form):
    for code, sentences in (("eng_Latn", ENGLISH), ("deu_Latn", GERMAN)):
        if form == "jsonl":
            _jsonl(tmp_path / f"{code}.jsonl", _rows(sentences))
        else:
            pq.write_table(pa.Table.from_pylist(_rows(sentences)), tmp_path / f"{code}.parquet")
    (tmp_path / "fra_Latn.dev").write_text("Un\nDeux\n")
    assert pipeline.multiway(str(tmp_path)) == {"de": GERMAN, "en": ENGLISH, "fr": ["Un", "Deux"]}


def test_the_case_equals_its_plain_text(shared):
    folder = shared / "cases" / "flores_plus_jsonl"
    if not folder.is_dir():
        pytest.skip("needs the cases")
    assert pipeline.multiway(str(folder / "dev")) == pipeline.multiway(str(folder / "plain"))


def test_rows_that_do_not_match(tmp_path):
    _jsonl(tmp_path / "eng.jsonl", _rows(ENGLISH))
    _jsonl(tmp_path / "deu.jsonl", _rows(GERMAN, (1, 3)))
    with pytest.raises(UserError, match=r"the field 'id' of line 2 differs in deu\.jsonl and eng\.jsonl"):
        multiway_files.read(tmp_path)
    _jsonl(tmp_path / "deu.jsonl", [{"id": 1, "sentence": "a"}])
    with pytest.raises(UserError, match=r"deu\.jsonl:1: field 'text' is missing"):
        multiway_files.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("deu.txt", "1\tDer Fluss\n2\tEine Katze\n", "every line is a table, apart by tabs, no plain text"),
        ("deu.txt", '{"text": "a"}\n{"text": "b"}\n', "every line is JSON, no plain text"),
        ("deu.tsv", "Der Fluss\nEine Katze\n", r"\.tsv files are not read here; give a sentence a line"),
        ("deu.csv", "Der Fluss\nEine Katze\n", r"\.csv files are not read here"),
        ("deu.json", '[{"text": "a"}]\n', r"\.json files are not read here"),
        ("my.notes.deu.txt", "a\nb\n", r"holds two language codes \(my, deu\)"),
        ("deu.txt", "\u200b\u2060\nb\n", "deu.txt:1: field 'de' "),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, name, content, message):
    (tmp_path / "eng.txt").write_text("\n".join(ENGLISH))
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        multiway_files.read(tmp_path)


def test_scripts_and_varieties_beside_a_language_are_left_out_and_said(tmp_path):
    for name in ("eng.txt", "eng-GB.txt", "aka_Latn.txt", "twi_Latn.txt", "fra-CA.txt"):
        (tmp_path / name).write_text(f"{name}\n2\n")
    for name in ("download.sh", "check.pl"):
        (tmp_path / name).write_text("#!/bin/sh\nwget x\n")
    (tmp_path / "README.md").write_text("nothing\n")
    said = []
    found = pipeline.multiway(str(tmp_path), tell=said.append)
    assert {code: lines[0] for code, lines in found.items()} == {
        "ak": "aka_Latn.txt",
        "en": "eng.txt",
        "fr": "fra-CA.txt",
    }
    assert said == [
        f"{tmp_path}: not read: README.md (no language code in their names); check.pl, download.sh (scripts); "
        "eng-GB.txt, twi_Latn.txt (varieties of others)."
    ]
