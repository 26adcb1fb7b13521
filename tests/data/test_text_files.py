import gzip
import tracemalloc
import zlib

import pytest

from alignx_jax.data import text_files
from alignx_jax.exits import UserError


def test_lines_end_with_line_feeds_alone(tmp_path):
    content = "\ufeffa\u2028b\x85c\x0bd\re\r\n\nlast".encode()
    for name in ("a.tsv", "a.tsv.gz"):
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        first = "a\u2028b\x85c\x0bd\re\r\n".encode()
        assert list(text_files.lines(tmp_path / name)) == [(1, first), (2, b"\n"), (3, b"last")]
        assert text_files.whole(tmp_path / name) == content[3:]


def test_the_longest_line(tmp_path):
    """A mebibyte: encoding a line of 20 MB took 7.7 GB."""
    assert text_files.LONGEST_LINE == 1 << 20
    (tmp_path / "a.jsonl").write_bytes(b"a" * (1 << 20) + b"\n")
    with pytest.raises(UserError, match=r"a\.jsonl:1: a line of more than 1,048,576 bytes; split it, or leave it out"):
        list(text_files.lines(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_bytes(b"a" * ((1 << 20) - 1) + b"\n")
    assert len(list(text_files.lines(tmp_path / "a.jsonl"))) == 1


def bomb(mebibytes: int) -> bytes:
    """A gzip file of a thousandth of what it inflates to, without a line end."""
    squeeze = zlib.compressobj(9, wbits=31)
    return b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(mebibytes)) + squeeze.flush()


def test_a_gzip_that_inflates_without_end_takes_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "LONGEST_LINE", 1 << 22)
    monkeypatch.setattr(text_files, "LARGEST", 1 << 22)
    (tmp_path / "a.gz").write_bytes(bomb(60))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"a\.gz:1: a line of more than 4,194,304 bytes"):
            list(text_files.lines(tmp_path / "a.gz"))
        with pytest.raises(UserError, match=r"a\.gz: more than 4,194,304 bytes in one piece; give \.jsonl"):
            text_files.whole(tmp_path / "a.gz")
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-4],  # its length is gone
        lambda data: data[:-8] + bytes(4) + data[-4:],  # its checksum
        lambda data: data[:30] + bytes(20) + data[50:],
        lambda data: data + b"more",
        lambda data: b"plain",
    ],
)
def test_a_damaged_gzip(tmp_path, spoil):
    (tmp_path / "a.gz").write_bytes(spoil(gzip.compress(b"".join(b"%d\n" % n for n in range(500)))))
    for read in (text_files.whole, lambda file: list(text_files.lines(file))):
        with pytest.raises(UserError, match=r"a\.gz: damaged gzip file .*; fetch it again"):
            read(tmp_path / "a.gz")


def test_what_is_no_file(tmp_path):
    for read in (text_files.whole, lambda file: list(text_files.lines(file))):
        with pytest.raises(UserError, match=r"cannot be read .Is a directory"):
            read(tmp_path)
