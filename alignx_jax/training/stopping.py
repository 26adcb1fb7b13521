"""Requests to stop: SIGTERM of a scheduler, Ctrl-C of a person.

Signals are heard by a thread of its own, also while the main thread compiles or waits for a device. Between steps the
loop asks `reached`. Everywhere else the process ends at once: files are whole or not there at any instant, so that only
steps could be lost, and there are none.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

from alignx_jax import exits, hosts

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """As a context, takes over SIGTERM and SIGINT; only the main thread can enter it."""

    def __init__(self, leave=os._exit):
        self.requested = False
        self._leave, self._finishing = leave, False

    def __enter__(self) -> Stop:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)  # the thread acts
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
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
        hosts.ask_to_stop()

    def _say(self, text: str) -> None:
        show_cursor = "\x1b[?25h" if sys.stdout.isatty() else ""  # a progress bar hides it
        print(f"{show_cursor}{text}", file=sys.stderr, flush=True)
