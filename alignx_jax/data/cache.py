"""Folders that are either whole or not there, made once and reused."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable


def fingerprint(*parts: object) -> str:
    """20 hex digits that change whenever one of the JSON-able `parts` does."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def make_once(folder: pathlib.Path, write: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """`folder`, filled by `write(temporary folder)` unless it is there already.

    An interrupted preparation leaves only a temporary folder, which the next attempt removes. Of several processes on
    one file system, one writes and the others wait for it.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder
        partial = folder.parent / f"{folder.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        write(partial)
        for path in partial.rglob("*"):  # on the disk before the name says so
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        partial.rename(folder)
    return folder
