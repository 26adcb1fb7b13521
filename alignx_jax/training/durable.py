"""Files that are whole or not there, also after the power was lost."""

from __future__ import annotations

import os
import pathlib

from alignx_jax import storage
from alignx_jax.exits import StorageError


def write(path: storage.Path, content: str | bytes) -> None:
    """Replaces `path` by `content`, on disk, or in object storage, when this returns.

    Raises:
      StorageError: object storage refuses.
      OSError: the file system does.
    """
    content = content.encode() if isinstance(content, str) else content
    if storage.is_remote(path):
        try:
            path.write_bytes(content)
        except Exception as error:  # whatever the client raises
            raise StorageError(
                f"{path} cannot be written ({storage.failed(error) or error}); see to it that the bucket is there and "
                "may be written, and start the same command again"
            ) from error
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
