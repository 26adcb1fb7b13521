"""Signals: what waits for a step, and what ends at once."""

import hashlib
import os
import signal
import threading
import time

import pytest

from alignx_jax import exits
from alignx_jax.training.stopping import Stop


@pytest.fixture
def left():
    """The codes that the process would have ended with."""
    return []


def until(condition) -> bool:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_step_is_finished_and_a_second_signal_stops_at_once(left, capfd, number):
    with Stop(left.append) as stop, stop.finishing():
        assert not stop.reached()
        os.kill(os.getpid(), number)
        assert until(lambda: stop.requested) and stop.reached() and left == []
        with pytest.raises(exits.Interrupted):
            stop.check()
        os.kill(os.getpid(), number)
        assert until(lambda: left) and left == [exits.INTERRUPTED]
    said = capfd.readouterr().err
    assert f"{number.name}: finishing the step and saving" in said and "stopped at once" in said


def test_elsewhere_the_process_ends_at_once(left, capfd):
    """Also while the main thread is in a long call that runs no Python, such as a compilation."""
    with Stop(left.append):
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)
        assert left == [exits.INTERRUPTED], "it is not over before the call is"
    assert "goes on from the last checkpoint" in capfd.readouterr().err


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Stop():
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
