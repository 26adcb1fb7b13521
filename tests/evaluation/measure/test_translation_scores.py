"""Scores against the public functions of sacrebleu, resample by resample; rates of outputs made for the purpose."""

import collections
import functools
import sys
import time
import urllib.error

import numpy as np
import pytest
import sacrebleu
import sentencepiece
from sacrebleu.tokenizers import tokenizer_ja_mecab, tokenizer_spm

from alignx_jax.config import TranslationConfig
from alignx_jax.evaluation.measure import comparison, statistics, translation_scores
from alignx_jax.evaluation.measure.measured import Measured
from alignx_jax.evaluation.rows import Model, Row, Sample
from alignx_jax.runs import loading

GERMAN = ["Der Hund schläft.", "Der Lehrer hat heute Morgen ein rotes Buch gekauft.", "Er ist in der Schule.", "Ja!"]
ENGLISH = ["The dog sleeps.", "The teacher bought a red book this morning.", "He is at school.", "Yes!"]
CHINESE = ["狗在睡觉。", "老师今天早上买了一本红色的书。", "他在学校。", "是!"]
JAPANESE = ["犬が寝ています。", "先生は今朝、赤い本を買いました。", "彼は学校にいます。", "はい!"]
SENTENCES = {"de": GERMAN, "en": ENGLISH, "zh": CHINESE, "ja": JAPANESE}
OUTPUTS = {
    ("de", "en"): ["The dog is asleep.", "The teacher has bought a red book this morning.", "", "Yes!"],
    ("zh", "en"): ["A dog sleeps there.", "Teacher bought red.", "He is at school.", "nothing like it there"],
    ("en", "zh"): ["狗在睡觉。", "老师今天买了一本红色的书。", "他在。", "否"],
    ("de", "ja"): ["犬が寝る。", "先生は赤い本を買いました。", "学校", "いいえ"],
}
TOKENIZERS = {"en": "13a", "zh": "zh", "ja": "char"}  # without MeCab
CONFIG = TranslationConfig()
counts_of = functools.partial(statistics.bootstrap_counts, resamples=100, seed=3)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """An empty folder of sacrebleu, no network, no MeCab, and nothing kept from test to test."""

    def refuse(url, path):
        raise urllib.error.URLError("Name or service not known")

    for module in (tokenizer_spm, sacrebleu):
        monkeypatch.setattr(module, "SACREBLEU_DIR", str(tmp_path))
    monkeypatch.setattr(tokenizer_spm, "download_file", refuse)
    monkeypatch.setattr(tokenizer_ja_mecab, "MeCab", None)
    translation_scores._load.cache_clear()
    yield
    translation_scores._load.cache_clear()


def score(outputs=OUTPUTS, sentences=SENTENCES, config=CONFIG, pivot="en"):
    cut = {pair: [n == 1 for n in range(len(lines))] for pair, lines in outputs.items()}
    return translation_scores.score(outputs, sentences, pivot, config, cut)


def public(name, outputs, references, target):
    """What `corpus_score` of sacrebleu gives."""
    if name == "chrF++":
        return sacrebleu.corpus_chrf(outputs, [references], word_order=2).score
    return sacrebleu.corpus_bleu(outputs, [references], tokenize=TOKENIZERS[target]).score


@pytest.mark.parametrize("name", ["BLEU", "chrF++"])
def test_scores_and_their_resamples_are_those_of_sacrebleu(name):
    counts_BxN = np.concatenate([counts_of(4), 4 * np.eye(4, dtype=int)])  # and each sentence alone
    defined = set()
    for (source, target), measures in score().measures.items():
        lines, references = OUTPUTS[source, target], SENTENCES[target]
        assert measures[name].value == pytest.approx(public(name, lines, references, target), rel=1e-12)
        got_B = measures[name].resampled(counts_BxN)
        for got, counts in zip(got_B, counts_BxN, strict=True):
            places = np.repeat(np.arange(4), counts)
            expected = public(name, [lines[n] for n in places], [references[n] for n in places], target)
            assert got == pytest.approx(expected, rel=1e-10, abs=1e-10)
            defined.add(expected > 0)
    assert defined == {True, False}  # nothing found, no n-gram of length 4, no text


def test_the_tokenizer_is_in_the_signature():
    result = score()
    version = f"version:{sacrebleu.__version__}"
    assert result.signatures["BLEU"] == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|{version}"
    assert "tok:zh" in result.signatures["BLEU (zh)"]
    assert "tok:char" in result.signatures["BLEU (ja)"]
    assert result.signatures["chrF++"] == f"nrefs:1|case:mixed|eff:yes|nc:6|nw:2|space:no|{version}"
    assert result.signatures["off_target"].startswith("py3langid:0.")
    (note,) = [note for note in result.notes if "ja-mecab" in note]
    assert note.startswith("BLEU into Japanese takes sacrebleu's tokenizer char, as ja-mecab is not installed")


@pytest.mark.parametrize(("code", "tokenizer"), [("zh-Hant", "zh"), ("yue", "zh"), ("th", "char"), ("sw", "13a")])
def test_tokenizers_of_bleu(code, tokenizer):
    notes = []
    metric, name = translation_scores._bleu_into(code, notes)
    assert (metric.tokenizer_signature, notes) == (tokenizer, [])
    assert name == ("BLEU" if tokenizer == "13a" else f"BLEU ({code})")


def test_spbleu_without_its_tokenizer_is_left_out_and_said(tmp_path):
    result = score()
    assert not [name for measures in result.measures.values() for name in measures if name.startswith("spBLEU")]
    for kind, file in (("flores101", "sacrebleu_tokenizer_spm.model"), ("flores200", "flores200sacrebleuspm")):
        (note,) = [note for note in result.notes if kind in note]
        assert "Name or service not known" in note
        assert note.endswith(f"at {tmp_path / 'models' / file}.")


def test_spbleu_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(tokenizer_spm, "download_file", lambda url, path: time.sleep(60))
    monkeypatch.setattr(translation_scores, "_PATIENCE", 0.1)
    start = time.monotonic()
    assert len([note for note in score().notes if "(no answer in 0.1 seconds)" in note]) == 2
    assert time.monotonic() - start < 20


def test_spbleu_takes_the_two_tokenizers_of_sacrebleu(tmp_path):
    """Any SentencePiece model serves; the file of the other one is damaged."""
    model = loading.find("sample").huggingface / "tokenizer.model"
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "flores200sacrebleuspm").write_bytes(model.read_bytes())
    (tmp_path / "models" / "sacrebleu_tokenizer_spm.model").write_bytes(b"<html>")
    result, processor = score(), sentencepiece.SentencePieceProcessor(model_file=str(model))
    for (source, target), measures in result.measures.items():
        lines, references = (
            [" ".join(processor.encode(line, out_type=str)) for line in texts]
            for texts in (OUTPUTS[source, target], SENTENCES[target])
        )
        expected = sacrebleu.corpus_bleu(lines, [references], tokenize="none", force=True).score
        assert measures["spBLEU (flores200)"].value == pytest.approx(expected, rel=1e-12)
        assert "spBLEU (flores101)" not in measures
    assert "tok:flores200" in result.signatures["spBLEU (flores200)"]
    assert [note for note in result.notes if note.startswith("No spBLEU (flores101): its tokenizer cannot be loaded")]


def test_empty_copied_and_off_target():
    sentences = {"de": [*GERMAN, "２０２４", "?"], "en": [*ENGLISH, "2024", "?"]}
    outputs = {
        ("de", "en"): [
            "The little dog sleeps in the garden.",
            "der Lehrer hat heute Morgen -- ein rotes BUCH gekauft",  # copied, and German
            "",
            "Oui, je suis allé à l'école ce matin.",  # neither
            "2024",  # a copy in other characters
            "!",  # no copy: there is nothing to compare
        ],
        ("en", "de"): [""] * 6,
    }
    measures = score(outputs, sentences).measures
    english = {name: measures["de", "en"][name] for name in ("empty", "copy", "off_target")}
    assert {name: m.value for name, m in english.items() if name != "off_target"} == {"empty": 1 / 6, "copy": 2 / 6}
    hits_N, of_N = english["off_target"].sums_NxS.T
    assert hits_N[:4].tolist() == [0, 1, 0, 1]
    assert of_N.tolist() == [1, 1, 0, 1, 1, 1]
    assert english["off_target"].value == hits_N.sum() / 5
    assert measures["en", "de"]["empty"].value == 1
    assert measures["en", "de"]["copy"].value == 0
    assert "off_target" not in measures["en", "de"]  # no output to look at
    assert {name: measures["de", "en"]["cut"].resampled(np.eye(6))[n] for n, name in enumerate("ab")} == {
        "a": 0,
        "b": 1,
    }
    once = english["off_target"].resampled(np.array([[6, 0, 0, 0, 0, 0], [3, 3, 0, 0, 0, 0], [0, 0, 6, 0, 0, 0]]))
    np.testing.assert_array_equal(once, [0, 0.5, np.nan])


def test_other_languages_are_found_though_no_sentence_is_in_them():
    """An identifier that had to choose between English and Spanish would take all three for Spanish."""
    texts = {
        "es": "Los niños juegan al fútbol en el parque todas las tardes después de clase.",
        "pt": "As crianças jogam futebol no parque todas as tardes depois das aulas.",
        "it": "I bambini giocano a calcio nel parco tutti i pomeriggi dopo la scuola.",
    }
    sentences = {"en": ["The children play football in the park every afternoon."] * 3, "es": [texts["es"]] * 3}
    measures = score({("en", "es"): list(texts.values())}, sentences).measures["en", "es"]
    assert measures["off_target"].sums_NxS[:, 0].tolist() == [0, 1, 1]


def test_what_the_identifier_does_not_know_or_takes_for_another_is_said():
    sentences = {"ee": ["Ŋdi na mi."] * 2, "en": ["Good morning.", "Guten Morgen, liebe Freunde, wie geht es euch?"]}
    result = score({("en", "ee"): ["Ŋdi"] * 2, ("ee", "en"): ["Good"] * 2}, sentences)
    assert "off_target" not in result.measures["en", "ee"]
    assert "off_target" in result.measures["ee", "en"]
    assert "No off-target rate of Ewe, which the language identifier does not know." in result.notes
    assert "The language identifier calls references off-target, too: English 50.0%." in result.notes


PROGRAM = f"""#!{sys.executable}
import argparse, json
parser = argparse.ArgumentParser()
for flag in ("-s", "-t", "-r", "--model", "--to_json"):
    parser.add_argument(flag, required=True)
for flag in ("--only_system", "--quiet"):
    parser.add_argument(flag, action="store_true", required=True)
given = parser.parse_args()
assert open(given.model).read() == "weights", "no weights"
columns = [[line.strip() for line in open(file, encoding="utf-8").readlines()] for file in (given.s, given.t, given.r)]
segments = [
    dict(src=s, mt=t, ref=r, COMET=len(s) + len(t) / 100 + len(r) / 10000) for s, t, r in zip(*columns, strict=True)
]
json.dump({{given.t: segments}}, open(given.to_json, "w", encoding="utf-8"))
"""


def test_comet_is_run_once_for_all_directions(monkeypatch, tmp_path):
    """A program that takes the arguments of comet-score 2.2.7 and writes what it writes; scores tell who is who."""
    (tmp_path / "comet-score").write_text(PROGRAM)
    (tmp_path / "comet-score").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    checkpoint = tmp_path / "model.ckpt"
    checkpoint.write_text("weights")
    outputs = OUTPUTS | {("de", "en"): ["two\nlines", *OUTPUTS["de", "en"][1:]]}
    config = TranslationConfig(comet=str(checkpoint))
    result = score(outputs, config=config)
    for (source, target), lines in outputs.items():
        texts = zip(SENTENCES[source], lines, SENTENCES[target], strict=True)
        expected = [len(s) + len(t) / 100 + len(r) / 10000 for s, t, r in texts]
        measure = result.measures[source, target]["COMET"]
        assert measure.sums_NxS[:, 0].tolist() == expected
        assert measure.value == pytest.approx(np.mean(expected))
    assert result.signatures["COMET"] == str(checkpoint)

    checkpoint.write_text("")
    result = score(outputs, config=config)
    assert "COMET" not in result.measures["de", "en"]
    assert "No COMET: comet-score failed (AssertionError: no weights)." in result.notes


def rows_of(result, base=None) -> dict[tuple, Row]:
    """By metric, direction, and whether it is a change."""
    models = [Model(name, "", None, "", "llama", 1, 2, 1, [], None) for name in ("model", "base")]
    one, before = (
        Measured(model, translation_scores.scores(of), of, None)
        for model, of in zip(models, (result, base or result), strict=True)
    )
    found = comparison.rows(one, [before] if base else [], 100, 3)
    return {(row.measure, row.direction, row.against is not None): row for row in found}


def test_rows_have_intervals_averages_and_paired_changes():
    worse = {pair: [lines[0], "", *lines[2:]] for pair, lines in OUTPUTS.items()}
    base, result = score(worse), score()
    got = rows_of(result, base)
    groups = {
        "en-x": [("en", "zh")],
        "x-en": [("de", "en"), ("zh", "en")],
        "x-y": [("de", "ja")],
    }
    assert list(dict.fromkeys(direction for _, direction, _ in got)) == ["de-en", "zh-en", "en-zh", "de-ja", *groups]

    resamples = [np.repeat(np.arange(4), counts) for counts in counts_of(4)]
    for name in ("BLEU", "chrF++"):
        values = collections.defaultdict(list)  # of each direction before and after: all sentences, then resamples
        for places in [np.arange(4), *resamples]:
            for outputs in (OUTPUTS, worse):
                for pair, lines in outputs.items():
                    chosen = [lines[n] for n in places], [SENTENCES[pair[1]][n] for n in places]
                    values[pair, outputs is worse].append(public(name, *chosen, pair[1]))
        cases = {"-".join(pair): [pair] for pair in OUTPUTS} | groups
        for direction, pairs in cases.items():
            after, before = (np.mean([values[pair, old] for pair in pairs], axis=0) for old in (False, True))
            for change, series in ((False, after), (True, after - before)):
                expected = [series[0], *np.quantile(series[1:], [0.025, 0.975])]
                np.testing.assert_allclose(got[name, direction, change][5:8], expected, rtol=1e-9, atol=1e-9)
    assert got["chrF++", "de-en", False].n == 4


def test_a_change_is_given_for_equal_directions_only():
    """A rate that one of the models has no outputs for is averaged over the other directions, and not compared."""
    silent = OUTPUTS | {("de", "en"): [""] * 4}
    got = rows_of(score(silent), score())
    assert ("off_target", "de-en", False) not in got
    assert got["off_target", "x-en", False].value == got["off_target", "zh-en", False].value
    assert ("off_target", "x-en", True) not in got and ("off_target", "zh-en", True) in got
    assert got["empty", "x-en", True].value == 3 / 8
    assert got["off_target", "en-x", True][5:8] == (0, 0, 0)


def test_a_resample_without_text_has_no_off_target_rate():
    """One output of four has text, and that is off-target: in every resample that has it the rate is 1."""
    outputs = {("de", "en"): ["", "Das ist ein deutscher Satz, den niemand übersetzt hat.", "", ""]}
    got = rows_of(score(outputs), score(outputs))
    assert any(counts[1] == 0 for counts in counts_of(4))
    assert got["off_target", "de-en", False][5:8] == (1, 1, 1)
    assert got["off_target", "de-en", True][5:8] == (0, 0, 0)
    assert got["empty", "de-en", False].value == 3 / 4


def test_samples_have_the_outputs_of_every_model():
    worse = {pair: [lines[0], "", *lines[2:]] for pair, lines in OUTPUTS.items()}
    samples = translation_scores.samples({"a": score(), "b": score(worse)})
    assert len(samples) == 16
    assert samples[5] == Sample("zh-en", CHINESE[1], ENGLISH[1], {"a": OUTPUTS["zh", "en"][1], "b": ""})


def test_samples_are_spread_over_many_directions():
    codes = ["de", "en", "fr", "it", "es", "nl", "pl", "sv"]
    sentences = {code: [f"{code} {n}" for n in range(3)] for code in codes}
    pairs = [(a, b) for a in codes for b in codes if a != b]
    result = translation_scores.Result("en", {}, {}, [], {pair: ["a", "b", "c"] for pair in pairs}, sentences)
    samples = translation_scores.samples({"a": result})
    assert len(samples) <= 24
    assert len({sample.direction.split("-")[0] for sample in samples}) == 8
