"""Signals: what waits for a step, and what ends at once."""

import contextlib
import hashlib
import os
import signal
import sys
import threading
import time

import pytest

from alignx_jax import console, exits
from alignx_jax.training import stopping
from alignx_jax.training.stopping import Stop


@pytest.fixture
def left():
    """What the process would have said at its end, and its codes."""
    return []


@pytest.fixture
def leave(left):
    return lambda *end: left.append(end)


@pytest.fixture
def now(monkeypatch):
    """A clock that stands still until it is moved."""
    clock = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    return clock


def until(condition) -> bool:
    for _ in range(1000):
        if condition():
            return True
        time.sleep(0.01)
    return False


STOPS = ["SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU"]


@pytest.mark.parametrize("name", STOPS)
def test_a_step_is_finished_and_a_second_signal_stops_at_once(left, leave, now, capfd, name):
    number = signal.Signals[name]
    with Stop(leave) as stop, stop.finishing():
        assert not stop.reached()
        os.kill(os.getpid(), number)
        assert until(lambda: stop.requested) and stop.reached() and left == []
        with pytest.raises(exits.Interrupted):
            stop.check()
        now[0] += 2.5
        os.kill(os.getpid(), number)
        assert until(lambda: left)
        ((text, code),) = left
        assert code == exits.INTERRUPTED and text.startswith(f"run.py: {name}: stopped at once;")
    assert f"{name}: finishing the step and saving" in capfd.readouterr().err


def test_signals_of_two_seconds_are_one_request(left, leave, now, capfd):
    """`timeout` sends SIGTERM to the process and to its group; a terminal that closes, SIGHUP besides."""
    with Stop(leave) as stop, stop.finishing():
        for number, moment in ((signal.SIGTERM, 0.0), (signal.SIGTERM, 0.001), (signal.SIGHUP, 1.0), (15, 1.9)):
            now[0] = 100.0 + moment
            os.kill(os.getpid(), number)
            time.sleep(0.05)
        assert stop.requested and left == []
        now[0] = 102.1
        os.kill(os.getpid(), signal.SIGTERM)
        assert until(lambda: left)
    assert capfd.readouterr().err.count("finishing the step") == 1


class Broken:
    """A stream whose every write fails."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    flush = isatty = lambda self: False


def test_what_is_asked_for_is_done_though_it_cannot_be_printed(left, leave, monkeypatch):
    """Ctrl-C goes to a whole pipeline: `2>&1 | tee log` has no reader any more."""
    asked = []
    monkeypatch.setattr(stopping.hosts, "ask_to_stop", lambda: asked.append(1))
    with Stop(leave) as stop, stop.finishing():
        monkeypatch.setattr(sys, "stderr", Broken())
        os.kill(os.getpid(), signal.SIGINT)
        assert until(lambda: asked) and stop.requested and left == []


@pytest.mark.parametrize("finishing", [True, False])
def test_the_end_of_stdouts_reader_is_a_request(left, leave, monkeypatch, finishing, capfd):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", console.Output(stream))
        with Stop(leave) as stop, stop.finishing() if finishing else contextlib.nullcontext():
            print("a line", flush=True)
            print("another", flush=True)
            assert stop.requested
    if finishing:
        assert not left and "the reader of stdout is gone: finishing the step and saving" in capfd.readouterr().err
    else:
        assert [code for _, code in left] == [exits.INTERRUPTED]


def test_elsewhere_the_process_ends_at_once(left, leave):
    """Also while the main thread is in a long call that runs no Python, such as a compilation."""
    with Stop(leave):
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)
        assert [code for _, code in left] == [exits.INTERRUPTED], "it is not over before the call is"
    assert "goes on from the last checkpoint" in left[0][0]


def test_nohup_is_respected(left, leave):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop(leave) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.2)
            assert not stop.requested and left == []
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Stop():
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
