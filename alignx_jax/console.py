"""What is printed, all of it: nothing in a text is obeyed, and nothing that happens to the screen stops the program."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import select
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn, TextIO

from rich.console import Console
from rich.control import Control
from rich.segment import Segment
from rich.text import Text

from alignx_jax import exits

_SILENCE = 25.0  # seconds; on a busy machine a line after them still comes within 30
_LEAVING = 1.0  # seconds to print a last sentence
_PIECE = 4096  # bytes that a pipe takes at once where `select` says that it takes any (PIPE_BUF)
_JOINERS = "\u200c\u200d"  # the spelling of Persian and of Indian languages needs them
_SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it


def printable(text: str, but: str = "") -> str:
    """`text` for a screen: what a terminal obeys, or cannot show, stands there as an escape.

    Spaces of all scripts stay, and the characters of `but`; line ends, half surrogate pairs and what turns the
    direction of reading do not.
    """
    if text.isprintable():
        return text
    kept = _JOINERS + but
    return "".join(c if c in kept or unicodedata.category(c) == "Zs" else exits.escaped(c) for c in text)


class Screen(Console):
    """Rich's console, for which no text is markup, an emoji's name or a terminal's command.

    Inside `under_way` it is never silent for longer than `silence` seconds: then a line, each time anew, says what is
    under way and how far it is.
    """

    def __init__(self, silence: float = _SILENCE, **options):
        super().__init__(markup=False, emoji=False, highlight=False, **options)
        self._silence, self._now = silence, None
        self.moved()

    def print(self, *objects, **options) -> None:
        super().print(*objects, **options)
        if not all(isinstance(x, Control) for x in objects):  # with which a live display draws itself again
            self.moved()

    def moved(self) -> None:
        """There was something new to see: a line, or a live display that went on."""
        self._said = time.monotonic()

    def doing(self, what: str, far: str = "") -> None:
        """What is under way from now on, inside `under_way`; its clock goes on while `what` stays the same."""
        if self._now:
            self._now = what, far, self._now[2] if self._now[0] == what else time.monotonic()

    @contextlib.contextmanager
    def under_way(self, what: str) -> Iterator[None]:
        """Something that may take long; inside another one, which afterwards goes on."""
        outer, self._now = self._now, (what, "", time.monotonic())
        end = threading.Event()
        speaker = threading.Thread(target=self._speak, args=[end], name="console", daemon=True)
        if not (outer or self.quiet):
            speaker.start()
        try:
            yield
        finally:
            self._now = outer
            end.set()
            if speaker.ident:
                speaker.join(_LEAVING)  # it may be printing to who does not read

    def _speak(self, end: threading.Event) -> None:
        while not end.wait(max(0.0, self._said + self._silence - time.monotonic())):
            if (now := self._now) and time.monotonic() >= self._said + self._silence:
                what, far, since = now
                say(self, f"{what}{far} ({time.monotonic() - since:,.0f} s so far)", "")

    def render_str(self, text: str, **options) -> Text:
        return super().render_str(printable(text, "\n"), **options)

    def render(self, renderable, options=None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text, "\n"), segment.style)


def say(screen: Console, text: str, head: str | None = None) -> None:
    """Prints one line, however long; what comes after a `head`, also an empty one, begins at the same place in each."""
    line = Text.assemble("" if head is None else (f"{head:<9} ", "bold"), printable(text))
    screen.print(line, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """Prints a line on stderr, from any process and thread, if it can be."""
    with contextlib.suppress(OSError, ValueError):
        print(exits.one_line(text), file=sys.stderr, flush=True)


def warn(text: str) -> None:
    note(f"warning: {text}")


class Output(io.TextIOBase):
    """stdout or stderr, of which a failure costs what was to be printed, and no more.

    When the disk behind it is full, or its terminal or the reader of its pipe is gone, all that follows goes to
    os.devnull, also what other libraries write.

    Attributes:
      reader_gone: called once, when the reader of the pipe is gone.
      in_a_hurry: whether a write no longer waits for a reader that does not read, such as a pager or a stopped one.
    """

    def __init__(self, stream: TextIO):
        self._stream, self._descriptor = stream, stream.fileno()
        self.reader_gone: Callable[[], object] = lambda: None
        self.in_a_hurry: Callable[[], bool] = lambda: False

    @property
    def encoding(self) -> str:
        return self._stream.encoding

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        left = memoryview(text.encode(self.encoding, "backslashreplace"))
        try:
            self._stream.flush()  # of who has kept the stream itself
            while left and self._is_ready():
                with contextlib.suppress(BlockingIOError):
                    left = left[os.write(self._descriptor, left[:_PIECE]) :]
        except OSError as error:
            self._lose(error)
        return len(text)

    def _is_ready(self) -> bool:
        while not select.select([], [self._descriptor], [], 0.2)[1]:
            if self.in_a_hurry():
                return False
        return True

    def _lose(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._descriptor)
        os.close(nowhere)
        if error.errno == errno.EPIPE:
            self.reader_gone()
        elif self is sys.stdout:
            warn(f"stdout cannot be written ({error.strerror}); nothing more is printed there, and all else goes on")


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return exits.one_line(super().format(record))


def guard() -> None:
    """For a program, once: all that is printed, by whomever, goes through an `Output`."""
    for name in ("stdout", "stderr"):
        if stream := getattr(sys, name):  # None: closed by the shell (>&-)
            setattr(sys, name, Output(stream))
    logging.lastResort.setFormatter(_Lines())  # of warnings, on stderr


def leave(text: str, code: int) -> NoReturn:
    """Ends the process from any thread, whatever the others of its threads wait for, and whatever becomes of `text`,
    which goes to stderr."""
    try:
        last = threading.Timer(_LEAVING, os._exit, [code])  # nobody may be reading
        last.daemon = True
        last.start()
        stderr = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # JAX's runtime, which meanwhile finds its connections closed
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()
        if os.isatty(1):
            with contextlib.suppress(OSError):
                os.write(1, _SHOW_CURSOR)
        if text:
            os.write(stderr, f"{text.rstrip()}\n".encode(errors="backslashreplace"))
    finally:
        os._exit(code)
