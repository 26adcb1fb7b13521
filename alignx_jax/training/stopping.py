"""Requests to stop: a scheduler's signal, Ctrl-C of a person, a terminal or a reader of stdout that is gone.

Signals are heard by a thread of its own, also while the main thread compiles or waits for a device. Between steps the
loop asks `reached`. Everywhere else the process ends at once: files are whole or not there at any instant, so that only
steps could be lost, and there are none. What is asked for is done first, and printed then, if it can be.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from alignx_jax import console, exits, hosts

_SIGNALS = (
    signal.SIGHUP,  # the terminal is gone
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,  # warnings that schedulers are asked for
    signal.SIGUSR2,
    signal.SIGXCPU,  # the limit of `ulimit -t`
)
_ONE = 2.0  # seconds in which signals are one request: `timeout` sends two, Ctrl-C goes to a whole pipeline


class Stop:
    """As a context, takes over the signals that ask a program to end; only the main thread can enter it.

    SIGHUP stays ignored where it is: that is what nohup is for.
    """

    def __init__(self, leave=console.leave):
        self.requested = False
        self._leave, self._finishing = leave, False
        self._since, self._lock = 0.0, threading.Lock()
        self._read = self._write = self._wakeup = -1  # files, inside it
        self._handlers: dict[signal.Signals, Any] = {}  # that were there before

    def __enter__(self) -> Stop:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        if self._handlers[signal.SIGHUP] is signal.SIG_IGN:
            del self._handlers[signal.SIGHUP]
        for number in self._handlers:
            signal.signal(number, lambda *_: None)  # the thread acts
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, console.Output):
                stream.in_a_hurry = lambda: self.requested
        if isinstance(sys.stdout, console.Output):
            sys.stdout.reader_gone = lambda: self._request("the reader of stdout is gone")
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write)  # ends the thread, which closes the other end

    def reached(self) -> bool:
        """Whether to save now and stop. All processes have to ask after every step, and get True for the same one."""
        return hosts.stops_now() if hosts.count() > 1 else self.requested

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
            if received[0] in self._handlers:
                self._request(signal.Signals(received[0]).name)
        os.close(self._read)

    def _request(self, what: str) -> None:
        with self._lock:
            again, now = self.requested, time.monotonic()
            if again and now < self._since + _ONE:
                return
            self.requested = True
            self._since = self._since if again else now
        if not self._finishing or again:
            how = "stopped at once" if again else "stopped; nothing was under way that has to be saved"
            self._leave(f"run.py: {what}: {how}; the same command goes on from the last checkpoint", exits.INTERRUPTED)
            return
        hosts.ask_to_stop()
        console.note(f"{what}: finishing the step and saving; once more stops at once")
