"""The connections between the processes of one program: lines of JSON over TCP, and what they mean.

Of every process but the first there is one, to the first. Messages: `{}` is a sign of life; `turn` and `value` are a
`gather`; `stop` is the end of another process; `hold`, `calls` and `last` agree on the step after which all stop.
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
import time
from typing import Any, NoReturn

from alignx_jax import exits
from alignx_jax.console import leave

_PING, SILENCE = 10, 60  # seconds between signs of life; without one for so long a process is gone (JAX: after 100)
_GRACE = 5  # seconds for a process to end by itself when another one stopped: mostly for the same reason
_NEWS = 1  # seconds that an error waits for the news that a process is gone, whose collectives fail at once
_AGAIN = "what was saved is kept; give the same command again"


class Link:
    """Of the first process: connections to all others. Of another: one to the first."""

    def __init__(self, index: int, count: int, peers: dict[int, socket.socket]):
        self._index, self._count, self._peers = index, count, peers
        self._turn, self._arrived, self._gathered = 0, {}, queue.SimpleQueue()
        self._waiting = self._ending = False
        self._calls, self._last, self._held, self._counts = 0, None, False, {}
        self._stopping = threading.Condition()
        self._open, self._sending, self._lock = set(peers), threading.Lock(), threading.Lock()
        for peer in peers:
            threading.Thread(target=self._read, args=[peer], daemon=True).start()
        threading.Thread(target=self._ping, daemon=True).start()

    def gather(self, what: str, value: Any) -> list[Any]:
        self._turn += 1
        self._waiting = True
        message = json.loads(json.dumps({"turn": [self._turn, what], "value": value}))  # lists, as the others get them
        if self._index:
            self._send(0, message)
        else:
            self._arrive(0, message)
        found = self._gathered.get()
        self._waiting = False
        return found

    def ask_to_stop(self) -> None:
        if self._index:
            self._send(0, {"hold": True})
        else:
            self._hold()

    def stops_now(self) -> bool:
        with self._stopping:
            self._stopping.wait_for(lambda: not self._held or self._last is not None)
            self._calls += 1
            return self._calls == self._last

    def fail(self, sentence: str, code: int, own: str = "", *, runtime: bool = False) -> NoReturn:
        """Tells the others, says `own` here, and leaves; JAX's own end would wait for all of them.

        An error of the `runtime` may be another process's death: it waits until that would be known.
        """
        time.sleep(_NEWS + SILENCE * runtime)
        self._ending = True
        self._tell({"stop": sentence, "code": code, "who": self._index})
        self._wait_for_others()
        leave(own, code)

    def close(self) -> None:
        """Ends together with the others: JAX's end waits for them, but not for ever."""
        self.gather("the end", None)
        self._ending = True

    def _tell(self, message: dict) -> None:
        for peer in self._peers:
            if peer != message["who"]:
                self._send(peer, message)

    def _send(self, peer: int, message: dict) -> None:
        with self._sending, contextlib.suppress(OSError):  # who is gone is noticed where it is read from
            self._peers[peer].sendall(json.dumps(message).encode() + b"\n")

    def _ping(self) -> None:
        while True:
            time.sleep(_PING)
            for peer in self._peers:
                self._send(peer, {})

    def _read(self, peer: int) -> None:
        with contextlib.suppress(OSError), self._peers[peer].makefile("rb") as lines:
            for line in lines:
                message = json.loads(line)
                if "turn" in message:
                    self._arrive(peer, message)
                elif "stop" in message:
                    self._stop(message)
                elif "hold" in message:
                    self._hold()
                elif "calls" in message:
                    self._counted(peer, message["calls"])
                elif "last" in message:
                    self._decided(message["last"])
        self._open.discard(peer)
        gone = f"process {peer} of {self._count} is gone; {_AGAIN}"
        self._stop({"stop": gone, "code": exits.PEER_LOST, "who": peer})

    def _arrive(self, peer: int, message: dict) -> None:
        if self._index:
            self._gathered.put(message["value"])
            return
        with self._lock:
            self._arrived[peer] = message
            if len(self._arrived) < self._count:
                return
            arrived, self._arrived = self._arrived, {}
        if len({tuple(one["turn"]) for one in arrived.values()}) > 1:
            text = f"the processes have come apart ({arrived})"
            return self._stop({"stop": text, "code": exits.USER, "who": self._index})
        values = [arrived[n]["value"] for n in range(self._count)]
        for other in self._peers:
            self._send(other, {"turn": message["turn"], "value": values})
        self._gathered.put(values)

    def _stop(self, message: dict) -> None:
        """Another process has stopped, or is gone: so does this one, once."""
        self._open.discard(message["who"])
        with self._lock:
            if self._ending:
                return
            self._ending = True
        if not self._index:
            self._tell(message)
        lost = message["code"] == exits.PEER_LOST
        if not (lost or self._waiting):
            time.sleep(_GRACE)
        if not self._index:
            self._wait_for_others()
        who = "" if lost else f"process {message['who']} of {self._count}: "
        leave(f"run.py: {exits.one_line(who + str(message['stop']))}", message["code"])

    def _hold(self) -> None:
        """Says how often `stops_now` was called here; the next call waits until the last one for all is known."""
        with self._stopping:
            if self._held:
                return
            self._held = True
        if self._index:
            self._send(0, {"calls": self._calls})
            return
        for peer in self._peers:
            self._send(peer, {"hold": True})
        self._counted(0, self._calls)

    def _counted(self, peer: int, calls: int) -> None:
        with self._stopping:
            self._counts[peer] = calls
            if len(self._counts) < self._count:
                return
        last = max(self._counts.values()) + 1
        for other in self._peers:
            self._send(other, {"last": last})
        self._decided(last)

    def _decided(self, last: int) -> None:
        with self._stopping:
            self._last = last
            self._stopping.notify_all()

    def _wait_for_others(self) -> None:
        """The first process is the last to leave: without it JAX's runtime aborts in the others."""
        deadline = time.monotonic() + 2 * _GRACE
        while not self._index and self._open and time.monotonic() < deadline:
            time.sleep(0.05)
