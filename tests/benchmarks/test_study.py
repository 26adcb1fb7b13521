"""The study: its corpus holds no pair, English has its share, an arm is what its name says, and both scripts run."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib

import numpy as np
import pytest
import transformers

from alignx_jax.config import Config
from alignx_jax.console import Screen
from alignx_jax.data import pipeline, prompts, tokenizer
from benchmarks.study import arms, base, measure, tables

CODES = ("de", "ru", "zh")


def _write(file: pathlib.Path, records: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(file, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    """Files as those of the study, of the sample's sentences; some recur with other partners and in other files."""
    folder = tmp_path_factory.mktemp("data")
    sentences = pipeline.multiway("sample", ("en", *CODES))
    for code in CODES:
        records = []
        for n, (text, english) in enumerate(zip(sentences[code], sentences["en"], strict=True)):
            names = {
                "bible": f"bible.Gen.{n // 25 + 1}.{n % 25 + 1}",
                "wmt": f"wmt.news.{n}",
                "xnli": f"xnli.p{n // 3}.h{n}" if n % 3 else f"xnli.p{n // 3}",
                "tatoeba": f"tatoeba.{code}.{n * 7 % 100}",
            }
            source = ("bible", "wmt", "xnli", "tatoeba")[n // 137]
            text = sentences[code][0] if n % 50 == 49 else text  # one foreign sentence, many English ones
            pair = {"src_lang": code, "tgt_lang": "en", "src": text, "tgt": english}
            records.append(pair | {"source": source, "id": names[source]})
        order = np.random.default_rng(0).permutation(len(records))  # the real files are in no order either
        _write(folder / f"train_parallel/pairs/{code}-en.train.jsonl.gz", [records[n] for n in order])
        _write(folder / f"train_parallel/pairs/{code}-en.dev.jsonl.gz", [records[0] | {"src": "dev", "tgt": "dev"}])
    answers = [
        {"instruction": "?", "input": "", "output": f"Answer {n}.\n\nMore {n}.", "kind": "general"} for n in range(9)
    ]
    answers.append({"instruction": "?", "input": "", "output": "1912", "kind": "extractive_qa"})
    for code in ("en", *CODES):
        _write(folder / f"instruct/{code}.train.jsonl.gz", answers)
    _write_tests(folder, {code: of[:12] for code, of in sentences.items() if code in ("en", *CODES)})
    return folder


def _write_tests(folder: pathlib.Path, sentences: dict[str, list[str]]) -> None:
    """What the study measures on, of the same sentences; XNLI lacks one of the languages."""
    lines = [dict(zip(sentences, of, strict=True)) for of in zip(*sentences.values(), strict=True)]
    for name in ("flores200/devtest", "ntrex128/newstest2019"):
        _write(folder / f"eval/{name}.jsonl.gz", [{"text": line} for line in lines])
    xnli = [{code: text for code, text in line.items() if code != CODES[1]} for line in lines]
    _write(folder / "train_parallel/multiway/xnli.jsonl.gz", [{"split": "test", "text": of} for of in xnli])
    pairs = [(code, line[code], line["en"]) for code in CODES for line in lines]
    tatoeba = [{"lang": measure.TATOEBA[code], "src": text, "eng": english} for code, text, english in pairs]
    _write(folder / "eval/tatoeba/tatoeba_v1_test.jsonl.gz", tatoeba)
    for code in CODES:
        of = [{"src": text, "tgt": english} for theirs, text, english in pairs if theirs == code]
        _write(folder / f"train_parallel/pairs/{code}-en.test.jsonl.gz", of)
    for code in ("en", "zh"):
        item = {"premise": "A", "choice1": "B", "choice2": "C", "question": "cause", "label": 0, "lang": code}
        _write(folder / f"eval/xcopa/{code}.test.jsonl.gz", [item | {"idx": n} for n in range(2)])


@pytest.fixture(scope="module")
def corpus(data, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("base")
    text = base.sentences(data)
    base.train_tokenizer(text, 900, folder / "tokenizer")
    base.write_corpus(text, tokenizer.load(folder / "tokenizer"), folder / "corpus")
    return folder


def _pairs(data: pathlib.Path) -> list[dict]:
    files = data.glob("train_parallel/pairs/*.train.jsonl.gz")
    return [json.loads(line) for file in files for line in gzip.open(file, "rt", encoding="utf-8")]


def _documents(file: pathlib.Path) -> list[str]:
    template = prompts.load(base.TEMPLATE)
    return [template.render(**json.loads(line)).text for line in file.read_text(encoding="utf-8").splitlines()]


def test_no_pair_has_both_sides_in_the_text(data):
    text = {code: {s.text for s in of} for code, of in base.sentences(data).items()}
    pairs = _pairs(data)
    sides = [(p["tgt"] in text["en"], p["src"] in text[p["src_lang"]]) for p in pairs]
    assert (True, True) not in sides
    assert 0.3 < np.mean([english for english, _ in sides]) < 0.7
    assert np.mean([foreign for _, foreign in sides]) > 0.25
    assert "dev" not in text["en"] and "1912" not in text["en"] and "More 3." in text["en"]


def test_documents_hold_every_sentence_once(data, corpus):
    text = base.sentences(data)
    for code, of in text.items():
        for part in ("train", "heldout"):
            wanted = [s.text for s in of if s.held_out == (part == "heldout")]
            joint = "" if code == "zh" else " "
            assert joint.join(_documents(corpus / f"corpus/{part}.{code}.jsonl")) == joint.join(wanted)
    verses = [s.text for s in text["en"] if s.place[0] == "bible.Gen."]
    places = {p["tgt"]: p["id"].split(".")[2:] for p in _pairs(data) if p["source"] == "bible"}
    assert verses == sorted(verses, key=lambda t: tuple(map(int, places[t]))) and len(verses) > 20


def test_the_corpus_is_the_same_again(data, corpus, tmp_path):
    text = base.sentences(data)
    base.train_tokenizer(text, 900, tmp_path / "tokenizer")
    base.write_corpus(text, tokenizer.load(tmp_path / "tokenizer"), tmp_path / "corpus")
    for file in [*corpus.glob("corpus/*"), *corpus.glob("tokenizer/*")]:
        assert file.read_bytes() == (tmp_path / file.relative_to(corpus)).read_bytes()


def test_the_tokenizer_is_the_same_in_transformers(corpus):
    ours = tokenizer.load(corpus / "tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(corpus / "tokenizer")
    for code in ("en", *CODES):
        for document in [*_documents(corpus / f"corpus/train.{code}.jsonl")[:20], "a  b\n=>\n\tც"]:
            ((ids, _),) = ours.encode_batch([document])
            assert ids.tolist() == theirs(document, add_special_tokens=False)["input_ids"]


def test_english_has_its_share_of_the_tokens(corpus, tmp_path):
    facts = json.loads((corpus / "corpus/facts.json").read_text())
    tokens = {code: of["tokens"] for code, of in facts["train"].items()}
    config = base.config(base.Options(tmp_path, steps=1), corpus / "corpus", tokens)
    encoder = tokenizer.load(corpus / "tokenizer")
    one_epoch = dataclasses.replace(config.training, steps=None, epochs=1.0)
    split = pipeline.build(dataclasses.replace(config, training=one_epoch), "2", encoder).train
    found = {"en": 0, "other": 0}
    english = "".join(_documents(corpus / "corpus/train.en.jsonl"))
    for batch in split.batches():
        for row, segments in zip(batch.tokens, batch.segments, strict=True):
            for slot in range(1, segments.max() + 1):
                ids = row[segments == slot]
                found["en" if encoder.decode(ids) in english else "other"] += len(ids)
    assert found["en"] / sum(found.values()) == pytest.approx(base.ENGLISH, abs=0.02)


def _flat(config: Config) -> dict[str, object]:
    def walk(tree: dict, prefix: str):
        for key, value in tree.items():
            yield from walk(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]

    return dict(walk(dataclasses.asdict(config), ""))


@pytest.mark.parametrize("arm", arms.ARMS)
def test_an_arm_differs_in_what_it_says_alone(arm):
    options = arms.Options(pathlib.Path("model"), pathlib.Path("runs"))
    (one, two), (full, full_two) = (arms.stages(name, 1, options).values() for name in (arm, "alignx"))
    ours, theirs = _flat(one), _flat(full)
    assert {k: v for k, v in ours.items() if v != theirs[k]} == arms.ARMS[arm]
    assert two == full_two and two.stage == "2"
    other_seed = _flat(arms.stages(arm, 2, options)["1"])
    assert [k for k in ours if ours[k] != other_seed[k]] == ["seed"]


@pytest.mark.slow
def test_every_script_from_data_to_tables(data, tmp_path, monkeypatch):
    small = {"vocabulary": 900, "hidden_size": 32, "layers": 4, "heads": 2, "rows": 4, "steps": 3}
    options = base.Options(tmp_path / "base", data, **small)
    base.main(options)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base/model").config.num_hidden_layers == 4
    losses = json.loads((tmp_path / "base/heldout.json").read_text())
    assert set(losses) == {"en", *CODES} and all(0 < of["bits_per_byte"] < 10 for of in losses.values())
    base.main(options)  # nothing left to do

    monkeypatch.setattr(arms, "LANGUAGES", CODES)
    monkeypatch.setattr(arms, "STAGE_2_STEPS", 2)
    monkeypatch.setattr(arms, "STUDY", arms.changed(arms.STUDY, {"data.validation": 10}))
    chosen = {"arms": ("next-token", "alignx"), "seeds": (0,), "pairs": 60}
    study = arms.Options(tmp_path / "base/model", tmp_path / "runs", data, **chosen)
    arms.main(study)
    found = arms.finished(tmp_path / "runs")
    next_token, alignx = (found[arm, 0] for arm in study.arms)
    for stage in ("stage1", "stage2"):
        assert next_token[stage]["steps"] == alignx[stage]["steps"] > 1
        assert next_token[stage]["tokens"] == alignx[stage]["tokens"] > 1000
    assert "contrastive" in alignx["stage1"]["after"] and "contrastive" not in next_token["stage1"]["after"]
    assert arms.run("again", {}, Screen(), tmp_path / "runs/alignx/0") == alignx

    monkeypatch.setattr(measure, "CODES", ("en", *CODES))
    measure.main(measure.Options(tmp_path / "base/model", tmp_path / "runs", data))
    results = tables.collect(tables.Options(tmp_path / "runs", tmp_path / "base/model"))
    assert set(results["arms"]) == set(study.arms)
    scores = results["arms"]["alignx"]["0"]["stage2"]["chrF++"]
    assert len(scores) == 6 + 2 and {"en-ru", "ru-en"} < set(scores)  # of XNLI's three languages, and Russian apart
    page = tmp_path / "evidence.md"
    names = tables.tables(results) | tables.of_choices(results)
    page.write_text("\n".join(f"<!-- table: {n} -->\n<!-- end: {n} -->" for n in names), encoding="utf-8")
    monkeypatch.setattr(tables, "PAGE", page)
    monkeypatch.setattr(tables, "IMAGES", tmp_path)
    for _ in range(2):  # what was there is replaced
        tables.write(results, results)
    assert page.read_text(encoding="utf-8").count("| retrieval, Tatoeba |") == 2
    assert page.read_text(encoding="utf-8").count("| next-token | 1 |") == 1
    for picture in ("align_then_diverge.png", "aligned_layers.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
