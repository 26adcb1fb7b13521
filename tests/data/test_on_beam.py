"""With Beam and without it: the same records in the same order, the same errors, the same batches."""

import dataclasses
import gzip
import importlib.util
import json
import sys

import jax
import numpy as np
import pytest
from tensorflow_datasets.core.utils import shard_utils

from alignx_jax import config_files
from alignx_jax.data import corpora, on_beam, pipeline, report, shards, tokenizer
from alignx_jax.exits import UserError
from alignx_jax.runs import loading

needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None,
    reason="apache_beam is not installed; .ci/run installs it at its end",
)
# TFDS asks for what protobuf 6, which Beam wants, has deprecated, and protobuf 7 no longer has.
pytestmark = pytest.mark.filterwarnings(r"ignore:label\(\) is deprecated:DeprecationWarning")

THREADS = "--runner=DirectRunner --direct_num_workers=2 --direct_running_mode=multi_threading"
PROCESSES = "--runner=DirectRunner --direct_num_workers=2 --direct_running_mode=multi_processing"


@pytest.fixture
def folder(tmp_path):
    """Files of every kind; four bad lines in three of them, one of these compressed."""
    made = tmp_path / "corpora"
    made.mkdir()
    pairs = [{"src_lang": "de", "tgt_lang": "en", "src": f"Satz {i}", "tgt": f"Sentence {i}"} for i in range(40)]
    lines = [json.dumps(pair) for pair in pairs]
    (made / "b.jsonl.gz").write_bytes(gzip.compress("\n".join([*lines[:20], "{]", *lines[20:], "[1]"]).encode()))
    (made / "a.tsv").write_text("".join(f"fi\ten\tLause {i}\tLine {i}\n" for i in range(31)) + "fi\ten\tno\n")
    ways = [{"text": {"en": f"Word {i}", "fr": f"Mot {i}", "sw": f"Neno {i}"}} for i in range(9)]
    (made / "c.jsonl").write_text("".join(json.dumps(way) + "\n" for way in ways))
    (made / "aa.ru-en.ru").write_text("".join(f"Слово {i}\n" for i in range(12)) + "а\n", encoding="utf-8")
    (made / "aa.ru-en.en").write_text("".join(f"A word {i}\n" for i in range(12)) + "\n")
    return made


def _prepare(source, cache, on_error="skip", beam=None):
    return corpora.prepare("parallel", str(source), cache, on_error, beam=beam)


@needs_beam
def test_two_processes_write_what_one_writes(folder, tmp_path):
    plain = _prepare(folder, tmp_path / "plain")
    beam = _prepare(folder, tmp_path / "beam", beam=PROCESSES)
    assert len(plain) == 31 + 40 + 2 * 9 + 12 and plain.skipped == 4
    assert beam.records(range(len(beam))) == plain.records(range(len(plain)))
    assert (beam.fingerprint, beam.skipped) == (plain.fingerprint, plain.skipped)
    assert (beam.folder / "skipped.txt").read_bytes() == (plain.folder / "skipped.txt").read_bytes()
    assert {file.name for file in beam.folder.iterdir()} == {file.name for file in plain.folder.iterdir()}


@needs_beam
def test_the_same_batches_and_the_same_report_of_several_shards(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_utils.ShardConfig, "get_number_shards", lambda *args, **kwargs: 3)
    monkeypatch.setattr(shards, "SHARD", 5_000)
    config = config_files.load("configs/sample.py")
    found = []
    for name, beam in (("plain", None), ("beam", THREADS)):
        data = dataclasses.replace(config.data, parallel=(str(folder),), on_error="skip", validation=5, beam=beam)
        data = dataclasses.replace(data, cache=str(tmp_path / name))
        made = pipeline.build(dataclasses.replace(config, data=data), "1", tokenizer.load(loading.SAMPLE_MODEL))
        assert len(list(made.corpora[0].folder.glob("*.array_record-*"))) > 2
        found.append((made, report.facts(made.sources)))
    (plain, told), (beam, told_by_beam) = found
    assert told_by_beam == told and plain.train.steps == beam.train.steps > 1
    assert beam.train.fingerprint == plain.train.fingerprint
    for one, other in zip(plain.train.batches(), beam.train.batches(), strict=True):
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(x, y)
    assert plain.train.example_ids(1) == beam.train.example_ids(1)


@needs_beam
@pytest.mark.parametrize("spoil", [None, "a.tsv", "aa.ru-en.en", "b.jsonl.gz", "nothing"])
def test_the_same_sentence_for_what_is_bad(folder, tmp_path, spoil):
    on_error = "skip" if spoil else "stop"
    if spoil == "a.tsv":
        (folder / "a.tsv").write_text("\n")  # a file without a record is none of the others' business
    elif spoil == "aa.ru-en.en":
        (folder / spoil).write_text("one line\n")
    elif spoil == "b.jsonl.gz":
        (folder / spoil).write_bytes((folder / spoil).read_bytes()[:-12])
    elif spoil == "nothing":
        for file in folder.iterdir():
            file.write_bytes(gzip.compress(b"\n") if file.suffix == ".gz" else b"\n")
    said = []
    for name, beam in (("plain", None), ("beam", THREADS)):
        try:
            said.append(_prepare(folder, tmp_path / name, on_error, beam).records(range(70)))
        except UserError as error:
            said.append(str(error))
        assert not list((tmp_path / name / "parallel").glob("*.partial"))
    assert said[0] == said[1]
    assert isinstance(said[0], list) == (spoil == "a.tsv")


@needs_beam
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--runner=Nobody", "Unexpected pipeline runner: Nobody"),
        ("--direct_num_workers=many", "invalid int value: 'many'"),
        ("--runner='Direct", "No closing quotation"),
    ],
)
def test_options_that_beam_does_not_take(folder, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        _prepare(folder, tmp_path / "cache", beam=options)
    assert not (tmp_path / "cache").exists()


def test_beam_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs apache_beam; install it"):
        on_beam.options(PROCESSES)
