"""Several processes: the real program as 2 and 4 of them on loopback. What they say to each other: test_link.py.

How they find each other without flags: test_clusters.py.
"""

import json
import os
import pathlib
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest
import safetensors.numpy

from alignx_jax import exits, hosts
from alignx_jax.config import HostsConfig
from alignx_jax.evaluation import folders
from alignx_jax.exits import UserError
from tests import processes

ROOT = pathlib.Path(__file__).resolve().parents[2]
AUTO = "--objective.contrastive.layer=auto"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (HostsConfig(count=2), "go together; give all three, or none"),
        (HostsConfig(coordinator="there:1", index=0), "go together; give all three, or none"),
        (HostsConfig("there:1", 2, 2), "--hosts.index=2: .* a number from 0 to count - 1"),
        (HostsConfig("there", 2, 1), "--hosts.coordinator=there .* is HOST:PORT of process 0"),
    ],
)
def test_half_given_flags(options, says):
    with pytest.raises(UserError, match=says):
        hosts.initialize(options)


@pytest.mark.parametrize("environment", [{}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}], ids=["laptop", "pod"])
def test_nothing_starts_where_there_are_no_others(environment):
    script = """
import socket, jax
from jax._src import xla_bridge
from alignx_jax import hosts
from alignx_jax.config import HostsConfig
from alignx_jax.evaluation import folders
def asked(*args):
    raise AssertionError(args)
socket.socket.connect = socket.getaddrinfo = socket.gethostbyname = asked
for options in (HostsConfig(), HostsConfig("there:1", 1, 0)):
    hosts.initialize(options)
assert not jax.distributed.is_initialized() and not xla_bridge.backends_are_initialized()
print(hosts.count(), hosts.index(), hosts.is_first(), hosts.gather("x", 3), hosts.share("x", 4))
"""
    command = [sys.executable, "-W", "error", "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, cwd=ROOT)
    assert run.stdout.split() == ["1", "0", "True", "[3]", "4"], run.stderr
    assert not run.stderr


def test_disagreement_names_the_process_and_what_differs(monkeypatch):
    monkeypatch.setattr(hosts, "_link", object())
    monkeypatch.setattr(hosts, "count", lambda: 3)
    facts = [{"--seed": 1, "a file": "x"}, {"--seed": 1, "a file": "x"}, {"--seed": 2, "a file": "x"}]
    monkeypatch.setattr(hosts, "gather", lambda what, value: facts)
    with pytest.raises(UserError, match=r"^--seed is 2 on process 2 of 3 and 1 on process 0; every process has to be"):
        hosts.agree(facts[0])
    facts[2] = {"--seed": 1}
    with pytest.raises(UserError, match=r"^a file is None on process 2 of 3 and 'x' on process 0"):
        hosts.agree(facts[0])


class Told(Exception):
    """In place of the end of the process."""


@pytest.mark.parametrize(
    ("error", "cause", "waits"),
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), None, True),
        (jax.errors.JaxRuntimeError("INTERNAL: NCCL operation ncclGroupEnd() failed"), None, True),
        (exits.StorageError("step 4 could not be saved"), ValueError("UNAVAILABLE: a barrier of Orbax"), True),
        (SystemExit(74), exits.StorageError("step 4 could not be saved"), False),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes"), None, False),
        (ValueError("shapes (2,) and (3,)"), None, False),
    ],
)
def test_only_errors_of_the_runtime_wait_for_news(monkeypatch, error, cause, waits):
    class Link:
        def fail(self, sentence, code, own="", *, runtime):
            raise Told(runtime)

    monkeypatch.setattr(hosts, "_link", Link())
    error.__cause__ = cause
    with pytest.raises(Told, match=str(waits)), hosts.together():
        raise error


class Store:
    """JAX's store of keys."""

    def __init__(self):
        self.values = queue.SimpleQueue()

    def key_value_set(self, key, value):
        self.values.put(json.loads(value))


@pytest.fixture
def listening(monkeypatch):
    """Port and password of the first process of three while it starts, and what it comes to have: its connections."""
    store, came = Store(), queue.SimpleQueue()
    state = types.SimpleNamespace(client=store, coordinator_address="127.0.0.1:1")
    monkeypatch.setattr(hosts, "global_state", state)
    monkeypatch.setattr(hosts.link, "Link", lambda index, count, peers: peers)
    threading.Thread(target=lambda: came.put(hosts._connect(0, 3)), daemon=True).start()
    return *store.values.get(timeout=10), came


def test_whoever_else_connects_while_a_run_starts_is_dropped(listening):
    port, password, came = listening

    def send(line: bytes) -> socket.socket:
        peer = socket.create_connection(("127.0.0.1", port), timeout=10)
        peer.sendall(line + b"\n")
        return peer

    def greeting(number) -> bytes:
        return json.dumps([number, password]).encode()

    silent = socket.create_connection(("127.0.0.1", port))
    lines = [
        b"null",
        b"[1, 5]",
        b"[" * 999,
        b'{"a": 1, "b": 2}',
        b"\xff",
        b"",
        b"GET / HTTP/1.1",
        b'[1, "\xc3\xa4"]',
        b"1",
    ]
    lines += [b'[1, "wrong"]', *map(greeting, (0, 3, -1, "1", None, 1.5, [1]))]
    for line in lines:
        assert send(line).recv(1) == b"", line
    first = send(greeting(1))
    again = send(greeting(1))
    second = send(greeting(2))
    peers = came.get(timeout=10)
    assert {n: peer.getpeername() for n, peer in peers.items()} in (
        {1: one.getsockname(), 2: second.getsockname()} for one in (first, again)
    )
    silent.close()


def test_the_first_process_listens_where_it_was_told_to(listening):
    port, _, _ = listening
    for address in {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}:
        if not address.startswith("127."):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((address, port), timeout=5)
    socket.create_connection(("127.0.0.1", port), timeout=5).close()


@pytest.mark.parametrize(
    ("coordinator", "own"),
    [("127.0.0.1:8476", "127.0.0.1"), ("192.0.2.7:8476", None), ("localhost:8476", None), ("node-0.jobs:8476", None)],
)
def test_a_name_or_an_address_of_elsewhere_is_listened_for_everywhere(coordinator, own):
    assert hosts._own_address(coordinator) == own


CUT_OFF = """
import contextlib, os, signal, socket, sys
import numpy as np
from jax.experimental import multihost_utils
from alignx_jax import hosts
from alignx_jax.hosts import link
from alignx_jax.config import HostsConfig
from alignx_jax.evaluation import folders

link.SILENCE, link._PING = 10, 1

@hosts.together()
def main(port, index):
    hosts.initialize(HostsConfig(f"127.0.0.1:{port}", 2, int(index)))
    multihost_utils.process_allgather(np.ones(1))
    if hosts.index():
        ours = {end.fileno() for end in hosts._link._peers.values()}
        for number in {int(name) for name in os.listdir("/proc/self/fd")} - ours:
            with contextlib.suppress(OSError):
                socket.socket(fileno=os.dup(number)).shutdown(socket.SHUT_RDWR)
        os.kill(os.getpid(), signal.SIGSTOP)
    multihost_utils.process_allgather(np.ones(1))

main(*sys.argv[1:])
"""


@pytest.mark.slow
def test_a_collective_that_fails_before_the_silence_is_noticed_waits_for_the_sentence():
    """The second process loses the connections of JAX and stands still; ours says nothing from then on."""
    port, pipe = str(processes.free_port()), subprocess.PIPE
    first, second = [
        subprocess.Popen(
            [sys.executable, "-c", CUT_OFF, port, str(index)],
            stdout=pipe,
            stderr=pipe,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        )
        for index in range(2)
    ]
    try:
        ((code, _, err),) = processes.finish([first], 120)
    finally:
        second.kill()
    assert code == exits.PEER_LOST and err.splitlines()[-1].startswith("run.py: process 1 of 2 is gone;"), err
    assert "Traceback" not in err


def without_gloo(out: str) -> str:
    """What Gloo, which connects CPUs, says on its own is none of the program's.

    Its threads write into each other's lines. Two sentences may come before both of their ends and leave an empty
    line; no more of these are left out than ends are missing.
    """
    lines = out.splitlines(True)
    kept = [line for line in lines if "peer ranks" not in line]
    for _ in range(out.count("[Gloo]") - (len(lines) - len(kept))):
        kept.remove("\n")
    return "".join(kept)


class Program:
    """The program on a few sentences and a tiny random model; every run is of 4 devices in all, and kept."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        processes.tiny_model(folder)

    def flags(self, run: str, *more: str) -> list[str]:
        return processes.few_sentences(self.folder, str(self.folder / run), *more)

    def run(self, count: int, run: str, *more: str) -> list[tuple[int, str, str]]:
        return processes.finish(processes.start(count, self.flags(run, *more)))

    def succeed(self, count: int, run: str, *more: str) -> list[str]:
        """What each process printed."""
        done = self.run(count, run, *more)
        assert [code for code, _, _ in done] == [0] * count, done
        return [without_gloo(out) for _, out, _ in done]

    def records(self, stage: str) -> list[dict]:
        lines = (self.folder / stage / "metrics.jsonl").read_text().splitlines()
        return [
            {k: v for k, v in json.loads(line).items() if not k.endswith(("per_second", "input_wait"))}
            for line in lines
        ]

    def continued(self, stage: str, run: str) -> None:
        """A copy of a stage's folder as it was when its checkpoint of step 2 was the last."""
        shutil.copytree(self.folder / stage, self.folder / run / "stage1")
        shutil.rmtree(self.folder / run / "stage1" / "checkpoints" / "4")


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Program:
    return Program(tmp_path_factory.mktemp("hosts"))


@pytest.fixture(scope="module")
def printed(program) -> list[str]:
    """The whole demonstration has been run by one process, and by two, which printed this."""
    program.succeed(1, "by 1", "--stage=all", AUTO)
    return program.succeed(2, "by 2", "--stage=all", AUTO)


def assert_equal_records(found: list[dict], expected: list[dict]) -> None:
    """Sums over devices are rounded in another order between processes: 1e-7 of a value was seen."""
    assert [(r["kind"], r["step"], r.keys()) for r in found] == [(r["kind"], r["step"], r.keys()) for r in expected]
    for one, other in zip(found, expected, strict=True):
        names = [name for name in one if name != "kind"]
        np.testing.assert_allclose([one[n] for n in names], [other[n] for n in names], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage1", "control", "stage2"])
def test_two_processes_train_as_one(program, printed, stage):
    found, expected = program.records(f"by 2/{stage}"), program.records(f"by 1/{stage}")
    assert sum(r["kind"] == "validation" for r in found) == 3
    assert_equal_records(found, expected)
    boards = [len(list((program.folder / f"by {n}" / stage / "tensorboard").iterdir())) for n in (1, 2)]
    assert boards == [1, 1]


@pytest.mark.slow
def test_only_the_first_process_prints(printed):
    first, second = printed
    assert "4 x cpu in 2 processes" in first and "stage 2: validation" in first and not second


@pytest.mark.slow
def test_two_processes_evaluate_as_one(program, printed):
    one, two = (folders.read(program.folder / f"by {n}" / "evaluation" / "sample") for n in (1, 2))
    base = [[row for row in results.rows if row.model == results.baseline] for results in (one, two)]
    assert base[0] and base[1] == base[0]  # every digit that is written
    assert [(m.name, m.align_layer) for m in two.models] == [(m.name, m.align_layer) for m in one.models]
    measured = [[row._replace(value=None, low=None, high=None) for row in results.rows] for results in (one, two)]
    assert measured[1] == measured[0]
    assert two.find(two.models[1], "matching_head_balanced")
    assert (program.folder / "by 2" / "evaluation" / "sample" / "report.html").is_file()


@pytest.mark.slow
def test_what_two_processes_export_one_exports_bit_for_bit(program, printed):
    program.succeed(1, "exported", "--stage=export", f"--model={program.folder / 'by 2' / 'stage2'}")
    assert_equal_exports(program.folder / "by 2" / "export", program.folder / "exported" / "export")


def assert_equal_exports(found: pathlib.Path, expected: pathlib.Path) -> None:
    assert sorted(f.name for f in found.iterdir()) == sorted(f.name for f in expected.iterdir())
    here, there = (safetensors.numpy.load_file(f / "model.safetensors") for f in (found, expected))
    assert here.keys() == there.keys()
    assert all(np.array_equal(here[k], there[k]) for k in here)
    assert (found / "config.json").read_bytes() == (expected / "config.json").read_bytes()


@pytest.mark.slow
def test_four_processes_evaluate_and_export_as_one(program, printed):
    """2x2: each has a part of every matrix, and two have the same rows."""
    flags = [f"--model={program.folder / 'by 2' / 'stage2'}", "--mesh=2x2"]
    for count in (1, 4):
        first, *others = program.succeed(count, f"measured by {count}", "--stage=evaluate", *flags)
        assert "evaluate" in first and not any(others)
    program.succeed(4, "measured by 4", "--stage=export", *flags)
    one, four = (program.folder / f"measured by {n}" for n in (1, 4))
    found, expected = (folders.read(f / "evaluation" / "sample") for f in (four, one))
    assert found.rows and found.rows == expected.rows  # every digit that is written
    assert found.models == expected.models
    assert_equal_exports(four / "export", program.folder / "by 2" / "export")


@pytest.mark.slow
def test_two_processes_leave_out_the_same_updates(program):
    """The second update, whose learning rate is the first above 0, makes parameters whose gradients are not finite."""
    program.succeed(2, "skipped", "--on-nonfinite=skip", "--optimizer.learning-rate=1e30")
    records = program.records("skipped/stage1")
    assert [r.get("skipped") for r in records if r["kind"] == "train"] == [0, 0, 1, 1]
    _, before, after = (r for r in records if r["kind"] == "validation")
    assert after | {"step": 2} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "count", "mesh"), [(2, 1, "4x1"), (1, 4, "2x2")], ids=["two, then one", "one, then four on another mesh"]
)
def test_another_number_of_processes_continues(program, printed, before, count, mesh):
    """2x2 in 4 processes: two processes have the same rows, and parts of the same matrices."""
    run = f"{before} then {count}"
    program.continued(f"by {before}/stage1", run)
    first, *others = program.succeed(count, run, f"--mesh={mesh}", AUTO)
    assert "from step 2 of 4" in first and not any(others)
    assert_equal_records(program.records(f"{run}/stage1"), program.records(f"by {before}/stage1"))


def long_run(program, count: int, run: str) -> tuple[list[subprocess.Popen], pathlib.Path]:
    """A run of 2,000 steps that has saved step 10, and the file that says so."""
    more = [
        "--training.steps=2000",
        "--training.validate-every=2000",
        "--training.save-every=10",
        "--training.keep=100",
    ]
    saved = program.folder / run / "stage1" / "checkpoints" / "10" / "checksums.json"
    running = processes.start(count, program.flags(run, *more))
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and not saved.is_file() and all(one.poll() is None for one in running):
        time.sleep(0.1)
    assert saved.is_file(), processes.finish(running, 1)
    return running, saved


@pytest.mark.slow
def test_when_the_first_process_is_killed_the_other_says_so_and_stops(program):
    """JAX's runtime may be quicker with its own lines. Others of more processes: tests/faults/test_processes.py."""
    running, saved = long_run(program, 2, "killed")
    running[0].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, (code, _, err) = processes.finish(running, 60)
    assert time.monotonic() - killed < 30  # half a second where the machine is quiet
    sentence = "run.py: process 0 of 2 is gone; what was saved is kept; give the same command again"
    assert code == exits.PEER_LOST and err.splitlines()[-1] == sentence and err.count("run.py: ") == 1
    assert "Traceback" not in err
    assert saved.is_file()


@pytest.mark.slow
def test_different_commands_are_refused(program):
    flags = program.flags("refused")
    done = processes.finish(processes.start(2, flags, own=[["--seed=1"], ["--seed=2"]]), 120)
    for code, out, err in done:
        assert code == exits.USER and not out
        assert err.count("\n") == 1 and "--seed is 2 on process 1 of 2 and 1 on process 0" in err
    assert not (program.folder / "refused").exists()


@pytest.mark.slow
def test_a_mesh_that_does_not_divide_is_refused(program):
    for code, _, err in program.run(2, "refused", "--mesh=3x1"):
        assert code == exits.USER
        assert "--mesh=3x1: 3 devices do not divide among 2 processes" in err and err.count("\n") == 1
    assert not (program.folder / "refused").exists()


@pytest.mark.slow
def test_one_process_is_asked_to_stop_and_all_save_the_same_step(program):
    running, saved = long_run(program, 2, "asked")
    running[1].send_signal(signal.SIGTERM)
    (first, _, err), (second, _, other) = processes.finish(running, 200)
    assert (first, second) == (exits.INTERRUPTED, exits.INTERRUPTED), (err, other)
    said = {int(n) for text in (err, other) for n in re.findall(r"stopped on request after step (\d+) of 2000", text)}
    assert len(said) == 1 and (saved.parent.parent / str(said.pop()) / "checksums.json").is_file()
    assert "SIGTERM: finishing the step and saving" in other and "SIGTERM" not in err
