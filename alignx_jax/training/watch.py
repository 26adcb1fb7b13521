"""Tells when a run stalls: what it has been waiting for, and where every thread stands."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import sys
import threading
import time

from alignx_jax import console, hosts, storage


class Watch:
    """As a context, a thread that reports when `doing` was not called for some time, again and again; it stops nothing.
    What is under way is said on the screen too.

    Args:
      seconds: how long one thing may take.
      folder: where `stalls.txt` gets the Python stacks of all threads; of a remote one they are on stderr. Of several
        processes each but the first has a file of its own, `stalls.3.txt`: they often stall together.
      screen: shows it. All processes but the first, which show nothing, write it to stderr instead.
    """

    def __init__(self, seconds: float, folder: storage.Path, screen: console.Screen):
        self._seconds, self._folder, self._screen = seconds, folder, screen
        self._tell = functools.partial(console.say, screen) if hosts.is_first() else console.warn
        self._stacks = folder / ("stalls.txt" if hosts.is_first() else f"stalls.{hosts.index()}.txt")
        self._who = f"process {hosts.index()} of {hosts.count()}: " if hosts.count() > 1 else ""
        self._now = "starting", time.monotonic()
        self._end = threading.Event()
        self._under_way = contextlib.ExitStack()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def doing(self, what: str) -> None:
        """Something new is under way; the clock starts again."""
        self._now = what, time.monotonic()
        self._screen.doing(what)

    def __enter__(self) -> Watch:
        self._under_way.enter_context(self._screen.under_way(self._now[0]))
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._end.set()
        self._thread.join()
        self._under_way.close()

    def _watch(self) -> None:
        reported, count = None, 0
        while not self._end.wait(min(1.0, self._seconds / 4)):
            now = self._now
            count = count if now is reported else 0
            elapsed = time.monotonic() - now[1]
            if elapsed >= self._seconds * (count + 1):
                reported, count = now, count + 1
                self._report(now[0], elapsed)

    def _report(self, what: str, elapsed: float) -> None:
        remote = storage.is_remote(self._folder)  # cannot be appended to, and may be what hangs
        where = "the stacks of all threads are " + ("on stderr" if remote else f"in {self._stacks}")
        try:
            with contextlib.nullcontext(sys.stderr) if remote else self._stacks.open("a") as file:
                now = time.strftime("%Y-%m-%d %H:%M:%S")
                print(f"\n{now}: {self._who}{what} for {elapsed:.0f} s", file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            where = f"{self._stacks}: {error.strerror}"
        limit = f"--training.stall-seconds={self._seconds:g}"
        self._tell(f"{self._who}stalled: {what} for {elapsed:.0f} s ({limit}); {where}")
