"""Each index of a run is admitted once, before JAX is asked: in threads, and as the real thing."""

import contextlib
import functools
import json
import pathlib
import queue
import socket
import subprocess
import sys
import threading

import pytest

from alignx_jax import exits, hosts
from alignx_jax.exits import UserError
from alignx_jax.hosts import admission
from tests import processes

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def run():
    """The address of a first process that waits for two others, and a thread that ends when they have come."""
    port = processes.free_port()
    listen = functools.partial(hosts._listener, "127.0.0.1", 3, port)
    first = threading.Thread(target=admission.admit, args=[listen, 3], daemon=True)
    first.start()
    yield f"127.0.0.1:{port}", first


def asks(address: str, index: int) -> tuple[threading.Thread, queue.SimpleQueue]:
    """A process that waits for the others, and what becomes of it."""
    ended = queue.SimpleQueue()

    def wait():
        try:
            ended.put(admission.ask(address, index, 3))
        except UserError as error:
            ended.put(str(error))

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread, ended


def raw(address: str, line: bytes) -> socket.socket:
    for _ in range(500):
        with contextlib.suppress(ConnectionRefusedError):
            peer = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=20)
            peer.sendall(line + b"\n")
            return peer
    raise AssertionError("nobody listens")


def test_a_second_process_with_an_index_is_refused_and_the_run_begins_without_it(run):
    address, first = run
    taken = raw(address, json.dumps(["alignx_jax", 1, 3]).encode())
    peer = raw(address, json.dumps(["alignx_jax", 0, 3]).encode())
    assert b"the run has a process 0 already" in peer.makefile("rb").readline()
    with pytest.raises(
        UserError, match=r"^--hosts.index=1: the run has a process 1 already; start each of 0 to 2 once"
    ):
        admission.ask(address, 1, 3)
    _, second = asks(address, 2)
    assert second.get(timeout=20) is None and taken.makefile("rb").readline() == b"{}\n"
    first.join(20)
    assert not first.is_alive()


def test_a_process_that_died_while_it_waited_gives_its_place_to_another(run):
    address, _ = run
    raw(address, json.dumps(["alignx_jax", 1, 3]).encode()).close()
    waiting = [asks(address, index)[1] for index in (1, 2)]
    assert [ended.get(timeout=20) for ended in waiting] == [None, None]


def test_another_count_is_refused(run):
    with pytest.raises(UserError, match=r"^--hosts.count=4: process 0 was started with --hosts.count=3"):
        admission.ask(run[0], 1, 4)


def test_strangers_are_dropped(run):
    address, _ = run
    lines = (b"GET / HTTP/1.1", b"[" * 900, b"{}", b'["alignx_jax", "1", 3]', b'["alignx_jax", [1], 3]', b"\xff", b"")
    for line in lines:
        assert raw(address, line).makefile("rb").readline() == b""
    waiting = [asks(address, index)[1] for index in (1, 2)]
    assert [ended.get(timeout=20) for ended in waiting] == [None, None]


@pytest.mark.parametrize("greeting", [b"\x00\x00\x12\x04", b"", b"{"], ids=["JAX's coordinator", "silent", "half"])
def test_who_finds_another_program_there_is_refused(monkeypatch, greeting):
    monkeypatch.setattr(admission, "_ENDING", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    peer, _ = server.accept()
                    with peer:
                        peer.recv(100)
                        peer.sendall(greeting)

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(
            UserError, match=r"^--hosts.coordinator=.* --hosts.index=1: a run that has all its processes"
        ):
            admission.ask(f"127.0.0.1:{server.getsockname()[1]}", 1, 2)


def test_a_second_process_0_is_refused(monkeypatch):
    monkeypatch.setattr(admission, "_ENDING", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        listen = functools.partial(hosts._listener, "127.0.0.1", 2, server.getsockname()[1])
        with pytest.raises(UserError, match=r"process 0 cannot listen at that address \(Address already in use\)"):
            admission.admit(listen, 2)


RUNS = """
import sys
from alignx_jax import console, exits, hosts
from alignx_jax.config import HostsConfig
@hosts.together()
def main(port, index):
    try:
        hosts.initialize(HostsConfig(f"127.0.0.1:{port}", 2, int(index)))
    except exits.UserError as error:
        sys.exit(f"run.py: {error}")
    print("begun", flush=True)
    sys.stdin.readline()
    print(hosts.gather("indices", hosts.index()), flush=True)
main(*sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_is_started_twice_ends_in_a_sentence_and_the_run_goes_on(index):
    port = str(processes.free_port())

    def start(number: int) -> subprocess.Popen:
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", RUNS, port, str(number)]
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)

    run = [start(0), start(1)]
    assert [process.stdout.readline() for process in run] == ["begun\n"] * 2
    again = start(index)
    ((code, _, said),) = processes.finish([again])
    assert code == exits.USER and len(said.splitlines()) == 1 and "start each index once" in said, said
    for process in run:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [(code, out) for code, out, _ in processes.finish(run)] == [(0, "[0, 1]\n")] * 2
