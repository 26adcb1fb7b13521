"""What tfds.testing.DatasetBuilderTestCase tests of a builder; the class itself is a TestCase of TensorFlow."""

import functools
import http.server
import itertools
import re
import shutil
import threading

import pytest
import tensorflow_datasets as tfds

from alignx_jax.data import builders, corpora
from alignx_jax.data.builders import published
from alignx_jax.exits import UserError

CASES = {
    ("opus100", "de-en"): {"train": 3, "validation": 1, "test": 2},
    ("opus100", "en-yo"): {"train": 2},
    ("opus100", "de-fr"): {"test": 1},
    ("bactrian_x", "de"): {"train": 2},
    ("flores200", None): {"dev": 2, "devtest": 1},
    ("flores101", None): {"dev": 2, "devtest": 1},
    ("ntrex128", None): {"test": 2},
}
ALL = builders.PARALLEL | builders.INSTRUCTIONS | builders.MULTIWAY


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_builder_does_what_tfds_asks_of_one(case, tmp_path, archives):
    name, config = case
    assert name in tfds.core.registered.list_imported_builders()
    build = functools.partial(tfds.builder, name, config=config, data_dir=tmp_path / "data", file_format="array_record")
    builder = build()
    assert type(builder) is ALL[name] and builder.info.name == name and str(builder.version) == "1.0.0"
    for text in (builder.info.description, builder.info.citation, builder.info.homepage):
        assert text.strip()
    assert builder.info.redistribution_info.license
    options = tfds.download.DownloadConfig(manual_dir=archives, compute_stats=tfds.download.ComputeStatsMode.SKIP)
    builder.download_and_prepare(download_config=options, download_dir=tmp_path / "downloads")
    for again in (builder, build()):  # as it was built, and read back
        assert {split: info.num_examples for split, info in again.info.splits.items()} == CASES[case]
        found = {split: [repr(record) for record in again.as_data_source(split)] for split in CASES[case]}
        assert {split: len(records) for split, records in found.items()} == CASES[case]
        for one, other in itertools.combinations(found.values(), 2):
            assert not set(one) & set(other)
    assert not any(str(archives) in record or str(tmp_path) in record for record in itertools.chain(*found.values()))
    assert [path.name for path in builder.data_path.iterdir() if path.is_dir()] == []  # what was unpacked is gone


def test_configurations_are_named_once():
    for builder in (*builders.PARALLEL.values(), *builders.INSTRUCTIONS.values()):
        names = [config.name for config in builder.BUILDER_CONFIGS]
        assert len(names) == len(set(names)) == len(builder.builder_configs)
    for builder in builders.MULTIWAY.values():
        assert len(set(builder.LANGUAGES)) == len(builder.LANGUAGES)


@pytest.fixture
def server(archives):
    """The address of the archives, over HTTP."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(archives))
    handler.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_address[1]}"
        served.shutdown()
        thread.join()


def test_an_archive_is_downloaded_where_there_is_none_and_compared_with_its_checksum(
    tmp_path, server, monkeypatch, archives
):
    cls, address = builders.Opus100, f"{server}/opus-100-corpus-en-yo-v1.0.tar.gz"
    monkeypatch.setattr(cls, "url", address)
    corpus = corpora.prepare("parallel", "opus100/en-yo", tmp_path / "cache", "stop")
    assert [r["source"] for r in corpus.records([0, 1])] == ["Good morning.", "Welcome."]

    register = tmp_path / "checksums.tsv"
    register.touch()
    monkeypatch.setattr(cls, "_checksums_path", register)
    options = tfds.download.DownloadConfig(register_checksums=True)
    cls(config="en-yo", data_dir=tmp_path / "first", file_format="array_record").download_and_prepare(
        download_config=options, download_dir=tmp_path / "once"
    )
    known = published.checksums.load_url_infos(register)
    assert known[address].checksum == corpora.cache.digest(archives / "opus-100-corpus-en-yo-v1.0.tar.gz")

    known[address].checksum = "0" * 64
    monkeypatch.setattr(cls, "url_infos", known)
    with pytest.raises(UserError, match="not the file that was registered"):
        corpora.prepare("parallel", "opus100/en-yo", tmp_path / "other", "stop")


def test_without_a_network_the_message_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(builders.Opus100, "url", "http://127.0.0.1:9/opus-100-corpus-de-en-v1.0.tar.gz")
    with pytest.raises(
        UserError, match=r"cannot be downloaded .*put opus-100-corpus-de-en-v1.0.tar.gz into the folder"
    ):
        corpora.prepare("parallel", "opus100/de-en", tmp_path / "cache", "stop")
    assert not list((tmp_path / "cache").glob("parallel/opus100-de-en-1.0.0"))


@pytest.mark.parametrize("damage", ["cut", "text", "other"])
def test_a_damaged_archive_is_named(cache, damage):
    archive = cache / "downloads" / "manual" / "opus-100-corpus-de-en-v1.0.tar.gz"
    content = archive.read_bytes()
    archive.write_bytes({"cut": content[:-40], "text": b"<html>", "other": b""}[damage])
    if damage == "other":
        shutil.copy(archive.with_name("opus-100-corpus-en-yo-v1.0.tar.gz"), archive)
    with pytest.raises(UserError, match=re.escape("opus-100-corpus-de-en-v1.0.tar.gz")) as error:
        corpora.prepare("parallel", "opus100/de-en", cache, "stop")
    assert "fetch it again" in str(error.value)
