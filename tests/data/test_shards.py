import json

import pytest

from alignx_jax.data import corpora, shards


def _lines(count: int) -> str:
    pair = {"src_lang": "de", "tgt_lang": "en", "src": "Satz {}", "tgt": "Sentence {} ä"}
    return "".join(json.dumps(pair).replace("{}", str(n)) + "\n" for n in range(count))


@pytest.mark.parametrize("size", [1, 300, 1 << 28])
def test_records_stand_in_order_whatever_the_size_of_a_shard(tmp_path, monkeypatch, size):
    monkeypatch.setattr(shards, "SHARD", size)
    (tmp_path / "a.jsonl").write_text(_lines(25))
    corpus = corpora.prepare("parallel", str(tmp_path / "a.jsonl"), tmp_path / "cache", "stop")
    assert [r["target"] for r in corpus.records(range(25))] == [f"Sentence {n} ä" for n in range(25)]
    files = sorted(file.name for file in corpus.folder.glob("*array_record*"))
    number = {1: 25, 1 << 28: 1}.get(size, len(files))
    assert 1 <= len(files) <= 25 and len(files) == number and files[-1].endswith(f"-{number - 1:05}-of-{number:05}")
    assert not list(corpus.folder.glob("*.partial"))


def test_a_corpus_over_the_limit_of_tfds_needs_no_tensorflow(tmp_path, monkeypatch):
    """TFDS keeps a split in memory up to a size, and then wants TensorFlow, which no requirement brings."""
    monkeypatch.setattr("tensorflow_datasets.core.shuffle.MAX_MEM_BUFFER_SIZE", 100)
    (tmp_path / "a.jsonl").write_text(_lines(25))
    corpus = corpora.prepare("parallel", str(tmp_path / "a.jsonl"), tmp_path / "cache", "stop")
    assert len(corpus) == 25
