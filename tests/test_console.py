"""Texts that a terminal would obey, and screens that cannot be written: nothing of either reaches the program."""

import errno
import io
import logging
import os
import pathlib
import subprocess
import sys
import threading
import time
import types

import pytest
from rich.control import Control
from rich.table import Table
from rich.text import Text

from alignx_jax import console
from alignx_jax.console import Output, Screen, printable, say
from alignx_jax.stages.session import Session

ROOT = pathlib.Path(__file__).resolve().parent.parent
HOSTILE = "a[/b]\x1b[31m:smile:\x9b2J\r\u202e\x07"
SHOWN = r"a[/b]\x1b[31m:smile:\x9b2J\r\u202e\x07"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Der Hund schläft.", "Der Hund schläft."),
        ("你好\u3000世界", "你好\u3000世界"),
        ("le chien\u00a0!", "le chien\u00a0!"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("two\nlines\u2028three", r"two\nlines\u2028three"),
        ("fig\u202egnp.exe", r"fig\u202egnp.exe"),
        ("half \udce4", r"half \udce4"),
    ],
)
def test_what_a_terminal_obeys_is_shown_as_an_escape(text, shown):
    assert printable(text) == shown


def assert_shown(printed: str) -> None:
    assert SHOWN in printed
    assert not [mark for mark in ("\x1b[31m", "\x9b", "\x07", "\u202e", "😄") if mark in printed]


def _table(screen):
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE))
    screen.print(table)


@pytest.mark.parametrize(
    "show",
    [lambda s: say(s, HOSTILE), lambda s: say(s, HOSTILE, "model"), lambda s: s.rule(HOSTILE), _table],
    ids=["line", "line with a head", "rule", "table"],
)
@pytest.mark.parametrize("terminal", [False, True])
def test_no_text_is_obeyed_wherever_it_is_shown(show, terminal):
    file = io.StringIO()
    show(Screen(file=file, width=400, force_terminal=terminal, color_system=None))
    assert_shown(file.getvalue())


def test_no_name_of_a_progress_bar_is_obeyed():
    file = io.StringIO()
    screen = Screen(file=file, width=400, force_terminal=True, color_system=None)
    with Session(None, None, screen, None, []).bars("all") as advance:
        advance(HOSTILE, 1, 2)
    assert_shown(file.getvalue())


class Listened(Screen):
    """A screen that is silent for 0.02 s at most, and what it says."""

    def __init__(self, silence: float = 0.02, **options):
        super().__init__(silence, file=io.StringIO(), width=80, **options)

    def hears(self, text: str) -> bool:
        """Waits for it; a line that never comes fails after 20 s."""
        end = time.monotonic() + 20
        while text not in self.file.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
        return text in self.file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_long_silence_ends_with_what_is_under_way_and_how_far_it_is(terminal):
    screen = Listened(force_terminal=terminal, color_system=None)
    with screen.under_way("--stage=evaluate"):
        assert screen.hears("          --stage=evaluate (0 s so far)\n")
        with Session(None, None, screen, None, []).bars("measuring the models") as advance:
            assert screen.hears("          measuring the models (0 s so far)\n")
            advance("base: perplexity", 46, 1000)
            assert screen.hears("          base: perplexity: 46 of 1,000 (0 s so far)\n")
            advance("base: perplexity", 1000, 1000)
        screen.doing("writing the report")
        assert screen.hears("          writing the report (0 s so far)\n")
    assert not [thread for thread in threading.enumerate() if thread.name == "console"]


def test_what_is_under_way_is_said_again_and_again_with_its_time(monkeypatch):
    screen, clock = Listened(silence=25), [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    turns = iter([False, False, False, True])

    def waits(seconds: float) -> bool:
        clock[0] += seconds
        return next(turns)

    screen.moved()
    screen._now = "compiling the step", "", 90.0
    screen._speak(types.SimpleNamespace(wait=waits))
    said = [f"          compiling the step ({n} s so far)" for n in (35, 60, 85)]
    assert screen.file.getvalue().splitlines() == said


@pytest.mark.parametrize("show", [lambda s: s.print("a line"), lambda s: s.moved()], ids=["a line", "a bar that moves"])
def test_what_is_shown_begins_the_silence_anew(monkeypatch, show):
    screen, clock = Listened(silence=25), [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    show(screen)
    clock[0] = 124.0
    screen.print(Control())  # a live display that draws itself again has nothing new
    assert screen._said == 100.0


def test_a_quiet_screen_has_nobody_who_speaks():
    with Screen(silence=0.0, quiet=True).under_way("compiling"):
        assert "console" not in [thread.name for thread in threading.enumerate()]


def test_a_line_is_one_line_and_begins_at_the_same_place():
    file = io.StringIO()
    say(Screen(file=file, width=20), "x\ny " * 20, "data")
    assert file.getvalue() == "data      " + r"x\ny " * 20 + "\n"
    say(Screen(file=file, width=20), "more", "")
    assert file.getvalue().endswith("\n          more\n")


def test_warnings_of_loggers_are_one_line_too():
    record = logging.LogRecord("a", logging.WARNING, "f", 1, "made %s again", ("x\x1b[2J\ny",), None)
    assert console._Lines().format(record) == r"made x\x1b[2J\ny again"


@pytest.fixture
def pipe():
    """Of stdout's kind: what reads it, and an `Output` that writes to it."""
    read, write = os.pipe()
    stream = os.fdopen(write, "w", encoding="utf-8")
    yield read, Output(stream)
    stream.close()


def test_a_reader_that_is_gone_is_told_once_and_costs_the_printing(pipe):
    read, output = pipe
    gone = []
    output.reader_gone = lambda: gone.append(1)
    print("before", file=output, flush=True)
    assert os.read(read, 100) == b"before\n" and not gone
    os.close(read)
    for _ in range(3):
        print("after", file=output, flush=True)
    os.write(output.fileno(), b"of a library\n")
    assert gone == [1]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=["the terminal is gone", "the disk is full"])
def test_what_cannot_be_written_costs_the_printing(pipe, monkeypatch, capfd, number):
    _, output = pipe
    gone, write = [], os.write

    def fails(descriptor, data):
        if descriptor == output.fileno():
            raise OSError(number, os.strerror(number))
        return write(descriptor, data)

    output.reader_gone = lambda: gone.append(1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fails)
        patch.setattr(sys, "stdout", output)
        print("lost", flush=True)
    print("lost", file=output, flush=True)
    assert not gone and os.fstat(output.fileno()).st_rdev == os.stat(os.devnull).st_rdev
    assert os.strerror(number) in capfd.readouterr().err


def test_a_reader_that_does_not_read_is_waited_for_only_without_hurry(pipe):
    read, output = pipe
    writer = threading.Thread(target=output.write, args=["x" * 200_000], daemon=True)
    writer.start()
    time.sleep(0.5)
    assert writer.is_alive()
    output.in_a_hurry = lambda: True
    writer.join(5)
    assert not writer.is_alive()
    assert len(os.read(read, 1_000_000)) < 200_000


def test_what_the_encoding_lacks_is_escaped():
    read, write = os.pipe()
    with os.fdopen(write, "w", encoding="ascii") as stream, os.fdopen(read, "rb") as other:
        print("schläft", file=Output(stream))
        assert other.read1() == b"schl\\xe4ft\n"


ENDS = """
import sys
from alignx_jax import console
from alignx_jax.stages import session
console.guard()
for _ in range(3):
    print("x" * 1000, flush=True)
sys.exit("run.py: a sentence" if sys.argv[1] == "1" else int(sys.argv[1]))
"""


@pytest.mark.parametrize("code", [0, 1, 75])
@pytest.mark.parametrize("where", ["pipe", "full", "closed"])
def test_the_exit_code_is_the_programs_own(where, code):
    """Python's own end would make 120 of it."""
    command = [sys.executable, "-c", ENDS, str(code)]
    if where == "pipe":
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(command, stdout=write, stderr=write, cwd=ROOT)
        os.close(write)
    elif where == "full":
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, stderr=full, cwd=ROOT)
    else:
        done = subprocess.run(["bash", "-c", '"$@" >&- 2>&-', "bash", *command], cwd=ROOT)
    assert done.returncode == code


LEAVES = """
import os, sys, threading
from alignx_jax import console
from alignx_jax.stages import session
read, write = os.pipe()
os.set_blocking(write, False)
while True:
    try:
        os.write(write, bytes(4096))
    except BlockingIOError:
        break
os.set_blocking(write, True)
os.dup2({"full": write, "gone": os.open("/dev/full", os.O_WRONLY)}[sys.argv[1]], 2)
threading.Thread(target=console.leave, args=["a sentence", 69]).start()
threading.Event().wait()
"""


@pytest.mark.parametrize("stderr", ["full", "gone"])
def test_leaving_does_not_depend_on_who_reads(stderr):
    done = subprocess.run([sys.executable, "-c", LEAVES, stderr], cwd=ROOT, timeout=60)
    assert done.returncode == 69
