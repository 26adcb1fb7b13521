"""Digests of contents: the same wherever they lie, taken once, and other for other contents."""

import hashlib
import os
import pathlib
import shutil

import pytest

from alignx_jax.data import cache
from alignx_jax.runs import lineage


@pytest.fixture
def weights(tmp_path) -> list[pathlib.Path]:
    (tmp_path / "model").mkdir()
    files = [tmp_path / "model" / f"{n}.safetensors" for n in range(3)]
    for file in files:
        file.write_bytes(os.urandom(1000))
    return files


def test_a_digest_is_of_the_contents(tmp_path, weights):
    sums = sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in weights)
    expected = hashlib.sha256("\n".join(sums).encode()).hexdigest()[:20]
    assert lineage.digest(weights, tmp_path / "kept") == expected
    copies = pathlib.Path(shutil.copytree(tmp_path / "model", tmp_path / "copy"))
    renamed = [file.rename(copies / f"model-{file.name}") for file in copies.iterdir()]
    assert lineage.digest(renamed, tmp_path / "kept") == expected


def test_a_digest_is_taken_once(tmp_path, weights, monkeypatch):
    before, read, digest = lineage.digest(weights, tmp_path / "kept"), [], cache.digest
    monkeypatch.setattr(cache, "digest", lambda file: read.append(file) or digest(file))
    assert lineage.digest(weights, tmp_path / "kept") == before and not read
    about, content = weights[1].stat(), bytearray(weights[1].read_bytes())
    content[-1] ^= 1
    (tmp_path / "new").write_bytes(content)
    os.utime(tmp_path / "new", ns=(about.st_atime_ns, about.st_mtime_ns))
    (tmp_path / "new").rename(weights[1])  # as rsync does it: the same name, size and time
    assert lineage.digest(weights, tmp_path / "kept") != before and read == [weights[1]]


@pytest.mark.parametrize("content", [b"", b"[]", b'{"0.safetensors": 3}', b'{"0.safetensors": []}', b"\xff"])
def test_a_damaged_record_of_digests_is_made_again(tmp_path, weights, content):
    before = lineage.digest(weights, tmp_path / "kept")
    (record,) = (tmp_path / "kept").iterdir()
    record.write_bytes(content)
    assert lineage.digest(weights, tmp_path / "kept") == before


def test_where_nothing_can_be_kept_it_is_read_again(tmp_path, weights):
    (tmp_path / "kept").write_text("a file")
    assert lineage.digest(weights, tmp_path / "kept") == lineage.digest(weights, tmp_path / "other")
