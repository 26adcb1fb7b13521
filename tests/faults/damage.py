"""What disks and cables do to files."""

from __future__ import annotations

import pathlib
import random
import shutil
from collections.abc import Callable

Damage = Callable[[pathlib.Path, random.Random], None]


def flip(file: pathlib.Path, rng: random.Random) -> None:
    """Turns all bits of one byte round."""
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 0xFF
    file.write_bytes(content)


def truncate(file: pathlib.Path, rng: random.Random) -> None:
    """Leaves a beginning of it, or nothing."""
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))])


def remove(path: pathlib.Path, rng: random.Random) -> None:
    """A file or a folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
