"""Folders that are either whole or not there, made once and reused; what a disk has changed in them is made again."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable

from alignx_jax import exits
from alignx_jax.exits import StorageError, UserError

SUMS = "SHA256SUMS"
"""Checksums of a folder's other files, as `sha256sum --check` reads them."""

_log = logging.getLogger(__name__)


def fingerprint(*parts: object) -> str:
    """20 hex digits that change whenever one of the JSON-able `parts` does."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def make_once(folder: pathlib.Path, write: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """`folder`, filled by `write(temporary folder)` unless it is there already, as it was written.

    An interrupted preparation leaves only a temporary folder, which the next attempt removes. Of several processes on
    one file system, one writes and the others wait for it. A folder whose files are not those of their checksums is
    made again, with a warning.

    Raises:
      StorageError: the disk is full, or fails.
      UserError: the path is not one that can be read and written.
    """
    try:
        if folder.is_dir() and _damage(folder) is None:
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.parent / f"{folder.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.is_dir():  # made by another process meanwhile
                if (damage := _damage(folder)) is None:
                    return folder
                _log.warning("%s: %s; it is made again", folder, damage)
                shutil.rmtree(folder)
            _make(folder, write)
    except OSError as error:
        raise unwritable(error.filename or folder, error) from error
    return folder


def unwritable(path: str | pathlib.Path, error: Exception) -> UserError | StorageError:
    """For raising: why a cache could not be written. An error without a number is of TFDS or ArrayRecord: no room."""
    number, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or str(error).split(";")[0]
    kind = UserError if number and exits.of_os_error(error) == exits.USER else StorageError
    return kind(f"{path}: {reason}; make room there, or give a --data.cache that can be read and written")


def _make(folder: pathlib.Path, write: Callable[[pathlib.Path], None]) -> None:
    partial = folder.parent / f"{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write(partial)
        (partial / SUMS).write_text(sums(partial, _files(partial)), encoding="utf-8")
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)  # the disk may be full
        raise
    for path in _files(partial):  # on the disk before the name says so
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    partial.rename(folder)


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _damage(folder: pathlib.Path) -> str | None:
    """What is wrong with the folder's files; None if nothing is."""
    try:
        known = read_sums(folder)
        there = {str(path.relative_to(folder)) for path in _files(folder)} - {SUMS}
        changed = [name for name, sum in known.items() if digest(folder / name) != sum] + sorted(there - known.keys())
    except (FileNotFoundError, ValueError) as error:  # ValueError: not text, or not lines of sums
        return f"a file is missing or damaged ({error})"
    return f"{changed[0]} is not as it was written" if changed else None


def sums(folder: pathlib.Path, files: Iterable[pathlib.Path]) -> str:
    """The content of `SUMS` for files in `folder`."""
    return "".join(f"{digest(path)}  {path.relative_to(folder)}\n" for path in files)


def read_sums(folder: pathlib.Path) -> dict[str, str]:
    """The digests in a folder's `SUMS` by the names of its files.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is not text, or not lines of sums.
    """
    lines = [line.split("  ", 1) for line in (folder / SUMS).read_text(encoding="utf-8").splitlines()]
    return {name: value for value, name in lines}


def digest(file: pathlib.Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
