"""Each index of a run is there once: whoever starts at a coordinator's address asks for its place before JAX does.

JAX's coordinator makes an error of a second process with the same index, and its runtime aborts in all processes. So
the first process listens at that address first, admits each index once, and leaves the address to JAX when all have
come. A process that comes later finds JAX there. Messages are lines of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable

from alignx_jax.exits import UserError

_ASKING = 10.0  # seconds for one line to come
_ENDING = 20.0  # seconds that an earlier run, one of whose processes is gone, takes to end at most (`link`)
_AGAIN = 0.2  # seconds
_GREETING = "alignx_jax"


def admit(listen: Callable[[], socket.socket], count: int) -> None:
    """As the first process: returns when processes 1 to `count` - 1 have come.

    Args:
      listen: at the coordinator's address; its `accept` waits for a moment only.

    Raises:
      UserError: another process listens there.
    """
    server = _listening(listen)
    places: dict[int, socket.socket] = {}
    lock = threading.Lock()

    def greet(peer: socket.socket) -> None:
        peer.settimeout(_ASKING)
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
            with peer.makefile("rb", buffering=0) as lines:
                greeting, index, theirs = json.loads(lines.readline(1000))
            if greeting == _GREETING and isinstance(index, int) and isinstance(theirs, int):
                with lock:
                    refused = _refused(index, theirs, count, places)
                    if refused is None:
                        places[index] = peer
                        return
                peer.sendall(json.dumps({"refused": refused}).encode() + b"\n")
        peer.close()

    while True:
        with contextlib.suppress(OSError):  # also that nobody has come
            peer, _ = server.accept()
            threading.Thread(target=greet, args=[peer], daemon=True).start()
        with lock:
            if len(places) == count - 1 and all(map(_is_there, places.values())):
                break
    server.close()  # before anybody may look for JAX there
    for peer in places.values():
        with contextlib.suppress(OSError), peer:
            peer.sendall(b"{}\n")


def _listening(listen: Callable[[], socket.socket]) -> socket.socket:
    until = time.monotonic() + _ENDING
    while True:
        try:
            return listen()
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"--hosts.coordinator: process 0 cannot listen at that address ({os.strerror(error.errno)}); "
                    "start each index once, and give another run another port"
                ) from error
        time.sleep(_AGAIN)


def _refused(index: int, theirs: int, count: int, places: dict[int, socket.socket]) -> str | None:
    if theirs != count:
        return f"--hosts.count={theirs}: process 0 was started with --hosts.count={count}; give every process the same"
    if index == 0 or (index in places and _is_there(places[index])):
        return f"--hosts.index={index}: the run has a process {index} already; start each of 0 to {count - 1} once"
    return None


def _is_there(peer: socket.socket) -> bool:
    """Whether a process that waits for the others still does."""
    try:
        return not select.select([peer], [], [], 0)[0] or bool(peer.recv(1, socket.MSG_PEEK))
    except OSError:
        return False


def ask(coordinator: str, index: int, count: int) -> None:
    """As another process: returns when all have come; waits for the first process for as long as it takes.

    Raises:
      UserError: the index is taken, in a run that begins or has begun, or the count is another.
    """
    host, _, port = coordinator.rpartition(":")
    since = None  # when somebody else than a first process that admits was met
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=_ASKING) as peer:
                peer.sendall(json.dumps([_GREETING, index, count]).encode() + b"\n")
                peer.settimeout(None)  # until all have come, or process 0 is gone
                begins = peer.recv(1)
                with peer.makefile("rb") as lines:
                    answer = json.loads(begins + lines.readline(10_000)) if begins == b"{" else None
        except (OSError, ValueError) as error:
            met, answer = not isinstance(error, (ConnectionRefusedError, TimeoutError, socket.gaierror)), None
        else:
            met = True
        if answer is not None:
            if refused := answer.get("refused"):
                raise UserError(str(refused))
            return
        since = (since or time.monotonic()) if met else None
        if since and time.monotonic() > since + _ENDING:
            raise UserError(
                f"--hosts.coordinator={coordinator} --hosts.index={index}: a run that has all its processes, or "
                "another program, is at that address; start each index once, and give another run another port"
            )
        time.sleep(_AGAIN)
