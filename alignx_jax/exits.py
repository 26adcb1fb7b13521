"""What the program's exit codes say, and the exceptions that lead to them. Wrong flags exit with 2.

70, 74 and 75 are those of sysexits.h, 69 too: EX_UNAVAILABLE, EX_SOFTWARE, EX_IOERR, EX_TEMPFAIL.
"""

from __future__ import annotations

import errno

OK = 0
"""Done."""
USER = 1
"""Something to mend: a setting, a file, a folder in use. Nothing is lost. With a traceback: a defect of ours."""
PEER_LOST = 69
"""Another process of the run has died; the same command on all hosts goes on."""
DIVERGED = 70
"""A loss or a gradient is not finite, or a loss does not reach the model."""
STORAGE = 74
"""A disk is full, a folder read-only or gone, every checkpoint damaged; mended, the same command goes on."""
INTERRUPTED = 75
"""Stopped on request with everything saved; the same command goes on."""

_STORAGE_ERRORS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "ESTALE", "ENODEV", "ENXIO", "ETIMEDOUT")
}


_LONGEST = 2000  # characters of a message


def escaped(character: str) -> str:
    """What stands for a character that is not printable."""
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def one_line(text: str) -> str:
    """`text` as a message may hold it, whatever file it quotes: short, nothing a terminal obeys."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return "".join(map(escaped, text))


class UserError(ValueError):
    """Something the user can mend: the message says what is wrong, where, and what to do, on one line."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


class Diverged(RuntimeError):
    """Training cannot go on: a loss or gradient is not finite, or an auxiliary loss does not reach the model."""


class StorageError(RuntimeError):
    """Something could not be written or read back: the message says what, where, and what to do."""


class Interrupted(RuntimeError):
    """The run was asked to stop, and has saved everything."""


def of_os_error(error: OSError) -> int:
    """STORAGE where the device failed, USER where the path is wrong."""
    return STORAGE if error.errno in _STORAGE_ERRORS else USER
