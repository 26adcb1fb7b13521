"""What is derived is made again where a disk has changed it, and never half made. See also test_corpora.py."""

import json
import random
import resource
import shutil
import subprocess

import numpy as np
import pytest

from alignx_jax.config import DataConfig
from alignx_jax.data import cache, corpora, prompts
from alignx_jax.data.examples import encode
from alignx_jax.exits import StorageError, UserError


@pytest.fixture
def made(tmp_path):
    def write(partial):
        (partial / "inner").mkdir()
        (partial / "inner" / "a").write_bytes(bytes(range(256)))
        (partial / "b").write_text("")

    def make():
        return cache.make_once(tmp_path / "made", write)

    make()
    return make


def flipped(file):
    data = bytearray(file.read_bytes())
    data[100 % len(data)] ^= 4
    file.write_bytes(data)


DAMAGE = {
    "bit": lambda folder: flipped(folder / "inner" / "a"),
    "cut": lambda folder: (folder / "inner" / "a").write_bytes(bytes(range(200))),
    "zeros": lambda folder: (folder / "inner" / "a").write_bytes(bytes(256)),
    "gone": lambda folder: (folder / "inner" / "a").unlink(),
    "sums changed": lambda folder: flipped(folder / cache.SUMS),
    "sums cut": lambda folder: (folder / cache.SUMS).write_text(""),
    "no sums": lambda folder: (folder / cache.SUMS).unlink(),
    "no text": lambda folder: (folder / cache.SUMS).write_bytes(b"\xff\n"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_made_again_with_a_warning(made, tmp_path, caplog, damage):
    folder = made()
    assert not caplog.records
    DAMAGE[damage](folder)
    made()
    assert (folder / "inner" / "a").read_bytes() == bytes(range(256))
    (record,) = caplog.records
    assert str(folder) in record.getMessage() and record.getMessage().endswith("; it is made again")
    caplog.clear()
    made()
    assert not caplog.records


def test_the_sums_are_those_of_sha256sum(made):
    folder = made()
    subprocess.run(["sha256sum", "--check", "--strict", cache.SUMS], cwd=folder, check=True, capture_output=True)
    assert len((folder / cache.SUMS).read_text().splitlines()) == 2


@pytest.fixture
def corpus(tmp_path):
    lines = ({"src_lang": "de", "tgt_lang": "en", "src": f"Satz {n * n}", "tgt": f"Line {n}"} for n in range(300))
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "c.jsonl"


def test_no_flipped_bit_of_a_cache_is_read(corpus, tmp_path, tiny_tokenizer, caplog):
    """Of every file of both caches, with the corpus and the token ids as they were before."""

    def read():
        config = DataConfig(cache=str(tmp_path / "cache"), cutoff=64, row_length=64)
        prepared = corpora.prepare("parallel", str(corpus), tmp_path / "cache", "stop")
        examples = encode(prepared, tiny_tokenizer, prompts.load("sample"), config)
        return prepared.records(range(len(prepared))), np.array(examples.index), np.array(examples.tokens)

    records, index, tokens = read()
    rng = random.Random(0)
    files = sorted(f for f in (tmp_path / "cache").rglob("*") if f.is_file() and f.stat().st_size)
    assert {f.name.partition("-")[0] for f in files} >= {"tokens.int32", "separate.npy", "facts.json", "parallel_text"}
    for file in files:
        data = file.read_bytes()
        for spoiled in (
            data[:-9],
            bytes(len(data)),
            *(
                data[:n] + bytes([data[n] ^ 1 << rng.randrange(8)]) + data[n + 1 :]
                for n in rng.sample(range(len(data)), 2)
            ),
        ):
            file.write_bytes(spoiled)
            caplog.clear()
            again = read()
            assert again[0] == records
            np.testing.assert_array_equal(again[1], index)
            np.testing.assert_array_equal(again[2], tokens)
            assert caplog.text.count("it is made again") == 1, file


@pytest.mark.parametrize("size", [100, 20_000])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(corpus, tmp_path, size):
    """A limit on the size of files stops a write as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(StorageError, match=r"cache.*File too large.*; make room there, or give a --data\.cache"):
            corpora.prepare("parallel", str(corpus), tmp_path / "cache", "stop")
        with pytest.raises(StorageError, match=r"made: File too large; make room there, or give a --data\.cache"):
            cache.make_once(tmp_path / "made", lambda partial: (partial / "a").write_bytes(bytes(size + 1)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [f for f in (tmp_path / "cache").rglob("*") if f.is_file() and f.suffix != ".lock"]
    assert not (tmp_path / "made").exists() and not (tmp_path / "made.partial").exists()
    assert len(corpora.prepare("parallel", str(corpus), tmp_path / "cache", "stop")) == 300


def test_a_cache_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: File exists; make room there, or give a --data\.cache"):
        cache.make_once(tmp_path / "file" / "made", shutil.rmtree)
