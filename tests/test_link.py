"""That processes which are at different steps stop after the same one. Losses and errors: test_hosts.py."""

import socket
import threading
import time

import pytest

from alignx_jax.link import Link


@pytest.fixture
def links():
    """Of three processes, here in one."""
    ends = {n: socket.socketpair() for n in (1, 2)}
    made = [Link(0, 3, {n: ends[n][0] for n in ends}), *(Link(n, 3, {0: ends[n][1]}) for n in ends)]
    yield made
    ending = [threading.Thread(target=one.close) for one in made]
    for thread in ending:
        thread.start()
    for thread in ending:
        thread.join(10)
    assert not any(thread.is_alive() for thread in ending)


@pytest.mark.parametrize("asking", [[0], [1], [2, 1], [0, 1, 2, 2]])
@pytest.mark.parametrize("ahead", [[0, 0, 0], [3, 0, 1], [0, 1, 3]])
def test_all_stop_after_the_same_step(links, ahead, asking):
    """Three processes, each some steps ahead when one or more are asked, step on at their own pace."""
    for link, steps in zip(links, ahead, strict=True):
        assert not any(link.stops_now() for _ in range(steps))
    for n in asking:
        links[n].ask_to_stop()
    stopped = list(ahead)

    def train(n: int) -> None:
        while stopped[n] < 1000:
            stopped[n] += 1
            time.sleep(0.001 * n)
            if links[n].stops_now():
                return

    threads = [threading.Thread(target=train, args=[n], daemon=True) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert len(set(stopped)) == 1 and max(ahead) < stopped[0] < 1000


def test_nobody_stops_unasked(links):
    assert not any(link.stops_now() for link in links for _ in range(100))
