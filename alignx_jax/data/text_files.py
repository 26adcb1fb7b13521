"""The bytes of text files, plain or gzip, in bounded memory whatever is in them."""

from __future__ import annotations

import functools
import gzip
import pathlib
import zlib
from collections.abc import Iterator

from alignx_jax.exits import UserError

LONGEST_LINE = 1 << 20
"""Bytes of a line, or of a row of a Parquet or Arrow file: a book's chapter. Encoding takes hundreds of times of it."""
LARGEST = 1 << 30
"""Bytes of a file that is read in one piece, decompressed, or of an archive's members."""

_DAMAGE = (EOFError, zlib.error, OSError)


def lines(file: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines with their ends, without a byte order mark.

    Raises:
      UserError: the file cannot be read, is a damaged gzip, or has a line of more than `LONGEST_LINE`.
    """
    try:
        with _open(file) as stream:
            for number, raw in enumerate(iter(functools.partial(stream.readline, LONGEST_LINE + 1), b""), 1):
                if len(raw) > LONGEST_LINE:
                    raise UserError(
                        f"{file}:{number}: a line of more than {LONGEST_LINE:,} bytes; split it, or leave it out"
                    )
                yield number, _without_mark(raw) if number == 1 else raw
    except _DAMAGE as error:
        raise _unreadable(file, error) from None


def whole(file: pathlib.Path) -> bytes:
    """All of a file, without a byte order mark.

    Raises:
      UserError: the file cannot be read, is a damaged gzip, or holds more than `LARGEST`.
    """
    try:
        with _open(file) as stream:
            content = stream.read(LARGEST + 1)
    except _DAMAGE as error:
        raise _unreadable(file, error) from None
    if len(content) > LARGEST:
        raise UserError(f"{file}: more than {LARGEST:,} bytes in one piece; give .jsonl, one object a line")
    return _without_mark(content)


def _open(file: pathlib.Path):
    return gzip.open(file) if file.name.endswith(".gz") else open(file, "rb")


def _without_mark(raw: bytes) -> bytes:
    return raw.removeprefix(b"\xef\xbb\xbf")


def _unreadable(file: pathlib.Path, error: Exception) -> UserError:
    if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
        return UserError(f"{file}: cannot be read ({error.strerror})")
    return UserError(f"{file}: damaged gzip file ({error}); fetch it again")
