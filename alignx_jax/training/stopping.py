"""Requests to stop: SIGTERM of a scheduler, Ctrl-C of a person.

Signals are heard by a thread of its own, also while the main thread compiles or waits for a device. Between steps the
loop asks `reached`. Everywhere else the process ends at once: files are whole or not there at any instant, so that only
steps could be lost, and there are none.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator

from jax.experimental import multihost_utils

from alignx_jax import exits, hosts

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """As a context, takes over SIGTERM and SIGINT; only the main thread can enter it."""

    def __init__(self, leave=os._exit):
        self.requested = False
        self._leave, self._finishing, self._jax = leave, False, None

    def __enter__(self) -> Stop:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        self._ours: int | None = None
        self.take_over()
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write)  # ends the thread, which closes the other end

    def take_over(self) -> None:
        """Installs the handlers. Call it again after `jax.distributed.initialize`, whose preemption notifier takes over
        SIGTERM in C; from then on a signal is passed on to it, and all processes stop after the same step."""
        libc = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        there = libc.signal(signal.SIGTERM, None)
        if self._ours is not None and there not in (None, self._ours):
            self._jax = ctypes.CFUNCTYPE(None, ctypes.c_int)(there)
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)  # the thread acts
        self._ours = libc.signal(signal.SIGTERM, None)
        signal.signal(signal.SIGTERM, lambda *_: None)

    def reached(self, step: int) -> bool:
        """Whether to save now and stop. All processes have to ask after every step, and get True for the same one."""
        together = multihost_utils.reached_preemption_sync_point(step)
        return together or (self._jax is None and self.requested)

    def check(self) -> None:
        """Call it where everything is saved, such as between stages.

        Raises:
          Interrupted: a request came while the last thing was finished.
        """
        if any(hosts.gather("stop", self.requested)):
            raise exits.Interrupted("stopped on request; everything is saved")

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Inside it a first request waits for `reached`; a second one ends the process at once."""
        self._finishing = True
        try:
            yield
        finally:
            self._finishing = False

    def _listen(self) -> None:
        while received := os.read(self._read, 1):
            if received[0] in _SIGNALS:
                self._request(signal.Signals(received[0]).name)
        os.close(self._read)

    def _request(self, name: str) -> None:
        again, self.requested = self.requested, True
        if not self._finishing or again:
            what = "stopped at once" if again else "stopped; nothing was under way that has to be saved"
            self._say(f"run.py: {name}: {what}; the same command goes on from the last checkpoint")
            self._leave(exits.INTERRUPTED)
            return
        self._say(f"{name}: finishing the step and saving; once more stops at once")
        if self._jax is not None:
            self._jax(signal.SIGTERM)

    def _say(self, text: str) -> None:
        show_cursor = "\x1b[?25h" if sys.stdout.isatty() else ""  # a progress bar hides it
        print(f"{show_cursor}{text}", file=sys.stderr, flush=True)
