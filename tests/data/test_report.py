import io
import json

import numpy as np
import pytest

from alignx_jax.config import DataConfig
from alignx_jax.console import Screen
from alignx_jax.data import corpora, examples, page, prompts, report

GERMAN = ["Der Hund schläft unter dem Tisch.", "Wir fahren morgen mit dem Zug nach Berlin.", "Das Buch liegt im Regal."]
ENGLISH = ["The dog sleeps under the table.", "Tomorrow we take the train to Berlin.", "The book is on the shelf."]
FRENCH = "Les enfants jouent au football dans le parc tous les après-midi."


@pytest.fixture
def found(tmp_path, tiny_tokenizer):
    """Six German pairs: one twice, one whose German is French; an empty line; one too long; two instructions."""
    pairs = [
        *zip(GERMAN, ENGLISH, strict=True),
        (GERMAN[0], ENGLISH[0]),
        (FRENCH, "Children play football."),
        ("x", ""),
    ]
    pairs.append(("sehr " * 300, "very " * 300))
    (tmp_path / "a.tsv").write_text("".join(f"de\ten\t{s}\t{t}\n" for s, t in pairs), encoding="utf-8")
    (tmp_path / "i.json").write_text(json.dumps([{"instruction": "Say", "output": "fox " * n} for n in (2, 3)]))
    config = DataConfig(cache=str(tmp_path / "cache"), cutoff=500)
    encoded = []
    for kind, name in (("parallel", "a.tsv"), ("instructions", "i.json")):
        corpus = corpora.prepare(kind, str(tmp_path / name), tmp_path / "cache", "skip")
        encoded.append(examples.encode(corpus, tiny_tokenizer, prompts.load("sample"), config))
    return encoded, report.facts(encoded)


def test_examples_lengths_and_duplicates_by_direction(found, tmp_path):
    encoded, facts = found
    assert list(facts["directions"]) == ["de > en", "en > de", f"instructions of {tmp_path}/i.json"]
    for name, source in (("de > en", "de"), ("en > de", "en")):
        one = facts["directions"][name]
        assert (one["examples"], one["duplicates"]) == (5, 1)
        lengths = [int(e["length"]) for e in encoded[0].index if encoded[0].languages[e["source_language"]] == source]
        assert one["tokens"] == {
            "mean": sum(lengths) / 5,
            "median": sorted(lengths)[2],
            "max": max(lengths),
            "p95": pytest.approx(np.percentile(lengths, 95)),
            "all": sum(lengths),
        }
        bins = list(zip(facts["edges"], facts["edges"][1:], strict=False))
        assert one["histogram"] == [sum(low <= n < high for n in lengths) for low, high in bins]
    assert facts["directions"][f"instructions of {tmp_path}/i.json"]["examples"] == 2


def test_what_was_left_out_by_reason(found, tmp_path):
    _, facts = found
    parallel, instructions = facts["sources"]
    assert parallel == {
        "kind": "parallel",
        "source": f"{tmp_path}/a.tsv",
        "records": 6,
        "bad_lines": {"field 'tgt' is empty": 1},
        "dropped": {"overlong": 2},
    }
    assert instructions["bad_lines"] == instructions["dropped"] == {}


def test_sentences_in_another_language(found, tmp_path):
    _, facts = found
    german = facts["languages"]["de"]
    assert (german["checked"], german["doubtful"], german["taken_for"]) == (5, 1, {"fr": 1})
    assert german["examples"] == [{"origin": f"{tmp_path}/a.tsv:5", "text": FRENCH}]
    assert facts["languages"]["en"]["doubtful"] == 0


def test_it_is_shown_and_written(found):
    encoded, facts = found
    assert json.loads(json.dumps(facts)) == facts
    screen = Screen(file=io.StringIO(), width=160)
    screen.print(report.show(facts))
    for text in ("de > en", "i.json", "overlong", "field 'tgt' is empty", "fr 1"):
        assert text in screen.file.getvalue()
    html = page.html(facts, encoded, DataConfig(cutoff=500))
    for text in ("de &gt; en", "i.json", "overlong", "field &#39;tgt&#39; is empty", "fr 1", FRENCH):
        assert text in html
    assert "http" not in html


def test_a_reason_keeps_the_name_of_utf_8(tmp_path, tiny_tokenizer):
    (tmp_path / "a.tsv").write_bytes(b"de\ten\tein Haus\ta house there\n" + b"de\ten\t\xff\tb\nde\ten\taa\xff\tb\n")
    corpus = corpora.prepare("parallel", str(tmp_path / "a.tsv"), tmp_path / "cache", "skip")
    one = examples.encode(corpus, tiny_tokenizer, prompts.load("sample"), DataConfig(cache=str(tmp_path / "cache")))
    assert report.facts([one])["sources"][0]["bad_lines"] == {"not UTF-8 at byte N": 2}
