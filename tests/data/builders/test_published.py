"""What tfds.testing.DatasetBuilderTestCase tests of a builder; the class itself is a TestCase of TensorFlow."""

import functools
import gzip
import http.server
import io
import itertools
import pathlib
import re
import shutil
import tarfile
import threading
import tracemalloc

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


@pytest.mark.parametrize("damage", ["cut", "checksum", "text", "other"])
def test_a_damaged_archive_is_named(cache, damage):
    archive = cache / "downloads" / "manual" / "opus-100-corpus-de-en-v1.0.tar.gz"
    content = archive.read_bytes()
    archive.write_bytes(
        {"cut": content[:-40], "checksum": _flipped(content, -8), "text": b"<html>", "other": b""}[damage]
    )
    if damage == "other":
        shutil.copy(archive.with_name("opus-100-corpus-en-yo-v1.0.tar.gz"), archive)
    with pytest.raises(UserError, match=re.escape("opus-100-corpus-de-en-v1.0.tar.gz")) as error:
        corpora.prepare("parallel", "opus100/de-en", cache, "stop")
    assert "fetch it again" in str(error.value)


def _flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def _packed(file: pathlib.Path, *members: tuple[tarfile.TarInfo, bytes]) -> pathlib.Path:
    with tarfile.open(file, "w:gz") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def _member(name: str, **fields) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


TEXT = b"".join(b"Sentence %d, of %d words.\n" % (n * n, n % 17) for n in range(300))


def _taken(archive: pathlib.Path, name: str) -> bytes:
    with published.unpacked(archive, [name], archive.parent) as (file,):
        return file.read_bytes()


def test_a_changed_bit_anywhere_is_found(tmp_path):
    archive = _packed(tmp_path / "a.tar.gz", (_member("a"), TEXT), (_member("b"), TEXT))
    content = archive.read_bytes()
    assert _taken(archive, "a") == TEXT and published.names(archive) == ["a", "b"]
    places = [*range(content.index(b"\0", 10) + 1, len(content) - 9, 29), *range(len(content) - 8, len(content))]
    assert len(places) > 50  # compressed data, checksum and length
    for place in places:
        archive.write_bytes(_flipped(content, place))
        for read in (published.names, functools.partial(_taken, name="a")):
            with pytest.raises(UserError, match=r"a\.tar\.gz: a damaged archive .*; delete it, and fetch it again"):
                read(archive)


HOSTILE = {
    "parent": _member("../x"),
    "inner": _member("a/b/../../../x"),
    "absolute": _member("/x"),
    "symlink": _member("a/x", type=tarfile.SYMTYPE, linkname="../../y"),
    "absolute symlink": _member("x", type=tarfile.SYMTYPE, linkname="/y"),
    "hard link": _member("a/x", type=tarfile.LNKTYPE, linkname="../y"),
    "absolute hard link": _member("x", type=tarfile.LNKTYPE, linkname="/y"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_member_that_leaves_the_folder_is_refused(cache, case):
    archive = cache / "downloads" / "manual" / "opus-100-corpus-de-en-v1.0.tar.gz"
    with tarfile.open(archive) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar if info.isfile()]
    _packed(archive, *members, (HOSTILE[case], b""))
    with pytest.raises(UserError, match=re.escape(f"{archive}: its member {HOSTILE[case].name!r}")) as error:
        corpora.prepare("parallel", "opus100/de-en", cache, "stop")
    assert "would leave the folder" in str(error.value)
    wanted = next(info.name for info, _ in members)
    with pytest.raises(UserError, match="would leave the folder"):
        _taken(archive, wanted)


def test_links_that_stay_and_what_is_no_file_are_passed_over(tmp_path):
    inside = [
        _member("a/x", type=tarfile.SYMTYPE, linkname="../y"),
        _member("a/z", type=tarfile.LNKTYPE, linkname="a/x"),
        _member("p", type=tarfile.FIFOTYPE),
    ]
    archive = _packed(tmp_path / "a.tar.gz", *((info, b"") for info in inside), (_member("./a/t"), TEXT))
    assert published.names(archive) == ["a/t"] and _taken(archive, "a/t") == TEXT
    with pytest.raises(UserError, match=r"a\.tar\.gz: no a/x in it"):
        _taken(archive, "a/x")


def test_an_archive_that_inflates_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "LARGEST", 1 << 20)
    wanted, long = (_member("a"), TEXT), bytes(2 << 20)
    for content in ([wanted, (_member("b"), long)], [(_member("a"), long)], [wanted, (_member("b", type=b"x"), long)]):
        archive = _packed(tmp_path / "a.tar.gz", *content)
        with pytest.raises(UserError, match=r"a\.tar\.gz: inflates to more than 1,048,576 bytes"):
            _taken(archive, "a")
    _packed(archive, wanted)
    archive.write_bytes(gzip.compress(gzip.decompress(archive.read_bytes()) + long))  # behind the end of the tar
    with pytest.raises(UserError, match="inflates to more than"):
        published.names(archive)


def test_members_by_the_million_take_little_memory(tmp_path):
    archive = _packed(tmp_path / "a.tar.gz", *[(_member("folder", type=tarfile.DIRTYPE), b"")] * 4000)
    tracemalloc.start()
    try:
        assert published.names(archive) == []
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def _sparse(size: int, extended: bool = False) -> bytes:
    """The header of a member of `size` holes, `extended` by a block."""
    header = bytearray(_member("a", type=tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    header[482:495] = b"%c%011o\0" % (extended, size)
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    return bytes(header)


def _pax(record: bytes) -> bytes:
    return _member("x", type=tarfile.XHDTYPE, size=len(record)).tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0")


PLAIN = _member("a").tobuf(tarfile.USTAR_FORMAT)
HEADERS = {
    "not a number": _pax(b"25 GNU.sparse.map=0,text\n") + PLAIN,
    "a size below zero": _pax(b"17 size=-1048576\n") + PLAIN,
    "cut off": _sparse(512, extended=True),
    "of headers without end": _member("x", type=tarfile.GNUTYPE_LONGNAME).tobuf(tarfile.GNU_FORMAT) * 2000 + PLAIN,
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_tarfile_fails_on(tmp_path, case):
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(gzip.compress(HEADERS[case]))
    with pytest.raises(UserError, match=r"a\.tar\.gz: a damaged archive .*; delete it, and fetch it again"):
        published.names(archive)


def test_a_sparse_member_is_no_file_of_text(tmp_path):
    """2 GiB of holes take 512 bytes of an archive."""
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(gzip.compress(_sparse(1 << 31) + bytes(1024)))
    with tarfile.open(archive) as tar:
        assert tar.getmember("a").size == 1 << 31
    with pytest.raises(UserError, match=r"a\.tar\.gz: no a in it"):
        _taken(archive, "a")
