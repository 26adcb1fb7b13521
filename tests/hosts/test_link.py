"""What processes say to each other: values, failures, deaths, and the step after which all stop."""

import queue
import socket
import sys
import threading
import time

import pytest

from alignx_jax import exits
from alignx_jax.hosts import link

# In place of leaving, threads of `Processes` end.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


class Processes:
    """Connected processes, each a thread of this one; `left` holds what those that had to leave said."""

    def __init__(self, count: int, monkeypatch):
        monkeypatch.setattr(link, "_GRACE", 0.2)
        monkeypatch.setattr(link, "_NEWS", 0.0)
        monkeypatch.setattr(link, "leave", self._leave)
        self.left: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        pairs = {n: socket.socketpair() for n in range(1, count)}
        self.ends = {n: theirs for n, (_, theirs) in pairs.items()}
        for pair in pairs.values():
            for end in pair:
                end.settimeout(1)
        first = link.Link(0, count, {n: ours for n, (ours, _) in pairs.items()})
        self.links = [first, *(link.Link(n, count, {0: end}) for n, end in self.ends.items())]

    def _leave(self, text: str, code: int):
        self.left.put((text, code))
        sys.exit()  # this thread only

    def each(self, function) -> list:
        """What `function(one, n)` returns for every process, at the same time."""
        found = [None] * len(self.links)

        def run(n: int) -> None:
            found[n] = function(self.links[n], n)

        threads = [threading.Thread(target=run, args=[n], daemon=True) for n in range(len(self.links))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)
        return found


def test_gathering(monkeypatch):
    every = Processes(3, monkeypatch)

    def twice(one, n):
        time.sleep(0.05 * (3 - n))
        return one.gather("a", {"n": n}), one.gather("b", n * n)

    assert every.each(twice) == [([{"n": 0}, {"n": 1}, {"n": 2}], [0, 1, 4])] * 3
    every.each(lambda one, n: one.close())
    every.ends[1].shutdown(socket.SHUT_RDWR)  # who has come to the end may go
    time.sleep(0.1)
    assert every.left.empty()


@pytest.mark.parametrize("who", [0, 2])
def test_a_failure_stops_all_with_its_sentence(monkeypatch, who):
    every = Processes(3, monkeypatch)
    fails = lambda one, n: one.fail("no such file", 1, "own") if n == who else one.gather("x", None)  # noqa: E731
    every.each(fails)
    said = sorted(every.left.get(timeout=5) for _ in range(3))
    assert said == [("own", 1), *[(f"run.py: process {who} of 3: no such file", 1)] * 2]


@pytest.mark.parametrize("how", ["closed", "silent"])
def test_who_is_gone_is_named(monkeypatch, how):
    """Closed: killed. Silent: its host, or the network between, is gone; nothing comes for as long as sockets wait."""
    every = Processes(2, monkeypatch)
    if how == "closed":
        every.ends[1].shutdown(socket.SHUT_RDWR)
    said = [every.left.get(timeout=5) for _ in range(2)]
    assert ("run.py: process 1 of 2 is gone; what was saved is kept; give the same command again", 69) in said


def test_an_error_of_the_runtime_waits_until_a_death_would_be_known(monkeypatch):
    monkeypatch.setattr(link, "SILENCE", 2)
    every = Processes(2, monkeypatch)  # whose sockets wait for 1 s
    every.each(lambda one, n: one.fail("own", 1, runtime=True) if n == 0 else None)
    assert {every.left.get(timeout=5)[1] for _ in range(2)} == {exits.PEER_LOST}


def test_processes_that_come_apart_stop(monkeypatch):
    every = Processes(2, monkeypatch)
    every.each(lambda one, n: one.gather(f"place {n}", None))
    said, code = every.left.get(timeout=5)
    assert "the processes have come apart" in said and "place 1" in said and code == exits.USER


@pytest.mark.parametrize("asking", [[0], [1], [2, 1], [0, 1, 2, 2]])
@pytest.mark.parametrize("ahead", [[0, 0, 0], [3, 0, 1], [0, 1, 3]])
def test_all_stop_after_the_same_step(monkeypatch, ahead, asking):
    """Three processes, each some steps ahead when one or more are asked, step on at their own pace."""
    every = Processes(3, monkeypatch)
    for one, steps in zip(every.links, ahead, strict=True):
        assert not any(one.stops_now() for _ in range(steps))
    for n in asking:
        every.links[n].ask_to_stop()

    def train(one, n: int) -> int | None:
        for step in range(ahead[n] + 1, 1000):
            time.sleep(0.001 * n)
            if one.stops_now():
                return step

    stopped = every.each(train)
    assert len(set(stopped)) == 1 and stopped[0] is not None and stopped[0] > max(ahead)
    every.each(lambda one, n: one.close())


def test_nobody_stops_unasked(monkeypatch):
    every = Processes(3, monkeypatch)
    assert not any(one.stops_now() for one in every.links for _ in range(100))
    every.each(lambda one, n: one.close())
