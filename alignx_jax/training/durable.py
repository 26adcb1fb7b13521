"""Files that are whole or not there, also after the power was lost."""

from __future__ import annotations

import os
import pathlib


def write(path: pathlib.Path, text: str) -> None:
    """Replaces `path` by `text`, on disk when this returns."""
    fresh = path.with_name(path.name + ".new")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
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
