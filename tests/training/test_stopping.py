"""Signals: what waits for a step, what ends at once, and that JAX's own preemption notifier is told."""

import ctypes
import hashlib
import os
import signal
import threading
import time

import pytest
from jax.experimental import multihost_utils

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
        assert not stop.reached(1)
        os.kill(os.getpid(), number)
        assert until(lambda: stop.requested) and stop.reached(2) and left == []
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_handler_in_c_is_told_and_decides_when(left, monkeypatch, number):
    """As `jax.distributed.initialize` installs one: `reached` is then for all processes to agree on."""
    told = []
    in_c = ctypes.CFUNCTYPE(None, ctypes.c_int)(told.append)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    with Stop(left.append) as stop:
        libc.signal(signal.SIGTERM, ctypes.cast(in_c, ctypes.c_void_p))
        stop.take_over()
        stop.take_over()  # once more changes nothing
        with stop.finishing():
            os.kill(os.getpid(), number)
            assert until(lambda: told) and told == [signal.SIGTERM] and left == []
            assert not stop.reached(5)
            monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: step == 6)
            assert stop.reached(6)
