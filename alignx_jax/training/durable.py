"""Files that are whole or not there, also after the power was lost."""

from __future__ import annotations

import os
import pathlib

from alignx_jax import storage


def write(path: storage.Path, content: str | bytes) -> None:
    """Replaces `path` by `content`, on disk, or in remote storage, when this returns."""
    content = content.encode() if isinstance(content, str) else content
    if storage.is_remote(path):
        path.write_bytes(content)
        return
    fresh = path.with_name(path.name + ".new")
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    sync(path.parent)


def sync(path: pathlib.Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
