"""Several processes that are one program: they start together, agree, and stop together.

JAX's runtime carries the arrays. Beside it every process keeps a connection to the first one (lines of JSON over TCP),
for what JAX does not do: a process that stops tells the others why, and one that is gone is noticed, in a sentence and
not in an abort of the runtime. With one process nothing here does anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import ipaddress
import json
import os
import queue
import re
import secrets
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from jax._src.distributed import global_state  # the count before there are devices, the address, the store of keys

from alignx_jax import console, exits
from alignx_jax.config import HostsConfig
from alignx_jax.exits import UserError
from alignx_jax.hosts import admission, link

Value = TypeVar("Value")

_START = 300  # seconds in which all processes have to be there
_KEY = "alignx_jax/connection"
_SEVERAL = {
    "JAX_COORDINATOR_ADDRESS",
    "JOB_COMPLETION_INDEX",
    "OMPI_MCA_orte_hnp_uri",
    "SLURM_PROCID",
    "TPU_PROCESS_ADDRESSES",
    "TPU_WORKER_HOSTNAMES",
}
"""One of these is set where JAX has to look for other processes; in a pod without them it would ask Kubernetes."""

_FAILED = re.compile("(ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE|UNKNOWN): ")
"""Begins what JAX's runtime says of a failed collective, by the status of a gRPC call; a ValueError, or one of its own.

Not RESOURCE_EXHAUSTED, nor what says that a program is wrong: those are this process's matter.
"""

_link: link.Link | None = None


def initialize(options: HostsConfig) -> None:
    """Joins the processes of a run, by flags or as JAX detects them. Call it before anything uses a device.

    JAX knows TPU pods, GKE, SLURM and Open MPI 4 by their environment; elsewhere nothing is started or asked.

    Raises:
      UserError: some flags without the others, or processes that cannot join.
    """
    global _link
    given = [options.coordinator is not None, options.count is not None, options.index is not None]
    if any(given) and not all(given):
        raise UserError("--hosts.coordinator, --hosts.count and --hosts.index go together; give all three, or none")
    if all(given) and (options.index >= options.count or ":" not in options.coordinator):
        raise UserError(
            f"--hosts.coordinator={options.coordinator} --hosts.count={options.count} --hosts.index={options.index}: "
            "the coordinator is HOST:PORT of process 0, the index a number from 0 to count - 1"
        )
    alone = "KUBERNETES_SERVICE_HOST" in os.environ and not _SEVERAL & os.environ.keys()
    if jax.distributed.is_initialized() or options.count == 1 or (alone and not any(given)):
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM; `stops_now` agrees on a step
    late = threading.Timer(_START, console.leave, [f"run.py: {_late(options)}", exits.PEER_LOST])
    late.daemon = True
    late.start()
    bind = _bind_address(options)
    try:
        if all(given) and options.index:
            admission.ask(options.coordinator, options.index, options.count)
        elif all(given):
            where = bind or os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
            host, _, port = (where or options.coordinator).rpartition(":")
            here = functools.partial(_listener, host.strip("[]") if where else None, options.count, int(port))
            admission.admit(here, options.count)
        jax.distributed.initialize(
            options.coordinator,
            options.count,
            options.index,
            initialization_timeout=2 * _START,
            coordinator_bind_address=bind,
        )
        if global_state.num_processes > 1:
            _soften_abort()
            _link = _connect(global_state.process_id, global_state.num_processes)
    except UserError:
        raise
    except Exception as error:  # whatever a cluster's client raises
        nothing = "coordinator_address should be defined" in str(error) or "must be called before" in str(error)
        if nothing and not any(given):
            return  # nothing detected; or a process that has used devices before it came here
        raise UserError(
            f"the processes cannot join ({' '.join(str(error).split())}); give every process --hosts.coordinator, "
            "--hosts.count and its --hosts.index (docs/multihost.md)"
        ) from error
    finally:
        late.cancel()


def _late(options: HostsConfig) -> str:
    where = f" at {options.coordinator}" if options.coordinator else ""
    return f"not all processes of the run were there{where} within {_START} s; start all of them again"


def count() -> int:
    return global_state.num_processes if _link else 1


def index() -> int:
    """Of this process, from 0."""
    return global_state.process_id if _link else 0


def is_first() -> bool:
    """Whether this is the process that prints, and writes what is written once."""
    return index() == 0


def gather(what: str, value: Value) -> list[Value]:
    """The JSON-able `value` of every process, in their order; all have to come here, and wait for the others.

    Args:
      what: the same on every process.
    """
    return _link.gather(what, value) if _link else [value]


def share(what: str, value: Value) -> Value:
    """The first process's `value`, on every process."""
    return gather(what, value)[0]


def first(what: str, function: Callable[[], Value]) -> Value | None:
    """What `function` returns on the first process; the others, which get None, wait until it has returned."""
    found = function() if is_first() else None
    gather(what, None)
    return found


def agree(facts: dict[str, Any]) -> None:
    """Refuses to go on where processes see different things.

    Raises:
      UserError: on every process; names the first process that differs from process 0, and in what.
    """
    every = gather("facts", facts)
    for number, theirs in enumerate(every):
        for name in every[0] | theirs:
            here, there = every[0].get(name), theirs.get(name)
            if here != there:
                raise UserError(
                    f"{name} is {there!r} on process {number} of {count()} and {here!r} on process 0; every process "
                    "has to be given the same command, versions, model and data"
                )


def ask_to_stop() -> None:
    """From any thread of any process: `stops_now` is to be true."""
    if _link:
        _link.ask_to_stop()


def stops_now() -> bool:
    """Whether all processes stop here. All have to ask equally often, and get True the same time."""
    return bool(_link) and _link.stops_now()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What stops this process inside stops all of them with the same sentence; and they end together."""
    try:
        yield
    except SystemExit as stopped:
        if _link and stopped.code not in (None, exits.OK, exits.INTERRUPTED):
            runtime = _of_the_runtime(stopped)
            if isinstance(stopped.code, str):
                _link.fail(stopped.code.removeprefix("run.py: "), exits.USER, stopped.code, runtime=runtime)
            said = [*getattr(stopped, "__notes__", []), f"stopped with exit code {stopped.code}"][0]
            _link.fail(said, stopped.code, runtime=runtime)
        if _link:
            _link.close()
        raise
    except BaseException as error:
        if _link:
            said = f"{type(error).__name__}: {error}"[:500]
            _link.fail(said, exits.USER, traceback.format_exc(), runtime=_of_the_runtime(error))
        raise
    if _link:
        _link.close()


def _of_the_runtime(error: BaseException | None) -> bool:
    """Whether `error` comes of one that a collective may have failed with."""
    while error and not _FAILED.match(str(error)):
        error = error.__cause__ or error.__context__
    return error is not None


def _soften_abort() -> None:
    """Lets a thread that aborts sleep first (6 s: the signal's number).

    When process 0 is gone JAX's runtime aborts at once; in these seconds we say so, and leave with our own code.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _connect(index: int, count: int) -> link.Link:
    """To the first process, at the address where JAX found it; which port, and a password, are in JAX's store."""
    client, peers = global_state.client, {}
    if index:
        port, password = json.loads(client.blocking_key_value_get(_KEY, 1000 * _START))
        host = global_state.coordinator_address.rpartition(":")[0].strip("[]")
        peers[0] = socket.create_connection((host, port), timeout=link.SILENCE)
        peers[0].sendall(json.dumps([index, password]).encode() + b"\n")
        return link.Link(index, count, peers)
    joined: queue.SimpleQueue[tuple[int, socket.socket]] = queue.SimpleQueue()
    password = secrets.token_hex()
    with _listener(_own_address(global_state.coordinator_address), count) as server:
        client.key_value_set(_KEY, json.dumps([server.getsockname()[1], password]))
        while len(peers) < count - 1:
            with contextlib.suppress(OSError):  # also that nobody has come
                peer, _ = server.accept()
                threading.Thread(target=_greet, args=[peer, password, count, joined], daemon=True).start()
            while not joined.empty():
                peers.setdefault(*joined.get())
    return link.Link(index, count, peers)


def _greet(peer: socket.socket, password: str, count: int, joined: queue.SimpleQueue) -> None:
    """Lets a process of the run in; drops whoever else connects, whatever they send, or if they send nothing."""
    peer.settimeout(link.SILENCE)
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        with peer.makefile("rb", buffering=0) as lines:
            number, theirs = json.loads(lines.readline(1000))
        if secrets.compare_digest(theirs, password) and number in range(1, count):
            return joined.put((number, peer))
    peer.close()


def _own_address(coordinator: str) -> str | None:
    """The coordinator's address where it is one of this machine's; of a name other machines may think otherwise."""
    host = coordinator.rpartition(":")[0].strip("[]")
    try:
        ipaddress.ip_address(host)
        with _listener(host, 1):
            return host
    except (ValueError, OSError):
        return None


def _bind_address(options: HostsConfig) -> str | None:
    """Where JAX's coordinator listens; None: where JAX has it, which is everywhere."""
    given = "JAX_COORDINATOR_BIND_ADDRESS" in os.environ
    own = options.coordinator if options.index == 0 and not given else None
    return own if own and _own_address(own) else None


def _listener(host: str | None, backlog: int, port: int = 0) -> socket.socket:
    """On a port, a free one if 0, of one address or of all; waits for a moment only."""
    dual = host is None and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual or ":" in (host or "") else socket.AF_INET
    server = socket.create_server((host or "", port), family=family, backlog=backlog, dualstack_ipv6=dual)
    server.settimeout(0.2)
    return server
