"""One of several processes dies or hangs: the others stop with 69 and a sentence, and started again, the run goes on.
All fail for the same reason: none ends another one's work."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import time

import numpy as np
import pytest

from alignx_jax import exits
from tests.faults.conftest import SEED, STEPS
from tests.faults.program import Running, Stage
from tests.faults.test_meshes import assert_close

GRACE = 90.0  # seconds from the death of one process to the end of the others

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def _processes(bench, run, count: int, **flags):
    """`count` processes of one run on loopback, which share the four devices of the mesh."""
    with contextlib.ExitStack() as stack, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        free.close()
        hosts = {"hosts.coordinator": address, "hosts.count": count, "mesh": "4x1", **flags}
        yield [stack.enter_context(bench.start(run, 1, **hosts, **{"hosts.index": n})) for n in range(count)]


def test_one_of_four_dies_and_two_go_on(bench, tally, tmp_path):
    """Against one process on the same mesh: float tolerance, for reductions over processes have another order.

    The rate is a low one: at the sample's, rounding grows to 6e-4 of the loss in 40 steps of such small batches.
    """
    slowly = {"optimizer.learning-rate": 1e-3}
    rng = random.Random(f"{SEED} processes")
    run, alone = tmp_path / "run", tmp_path / "alone"
    stage = Stage(run / "stage1")
    assert bench.finish(alone, 1, mesh="4x1", **slowly).code == 0
    with tally.verdict() as injected:
        moments = [(rng.randrange(1, 4), rng.randrange(4, STEPS // 2)), (0, rng.randrange(STEPS // 2, STEPS - 4))]
        for victim, least in moments:
            with _processes(bench, run, 4, **slowly) as running:
                assert running[victim].kill_while(lambda least=least, first=running[0]: first.step >= least)
                injected.append(f"SIGKILL: {'the first' if victim == 0 else 'one'} of 4 processes")
                others: list[Running] = [one for one in running if one is not running[victim]]
                for one in others:
                    one.wait(GRACE).sentence(69, f"process {victim}")
        with _processes(bench, run, 2, **slowly) as running:
            ended = [one.wait() for one in running]
        assert [one.code for one in ended] == [0, 0], "\n".join(map(str, ended))
        assert ended[0].continued_from, ended[0]
        assert_close(stage, Stage(alone / "stage1"))


def test_all_wait_until_the_examples_of_a_step_that_is_not_finite_are_kept(bench, tally, tmp_path):
    """A file that nobody reads yet takes the place of a slow disk. What a rate of 1e38 leaves is not finite."""
    stage = tmp_path / "run" / "stage1"
    slow = {"optimizer.learning-rate": 1e38, "optimizer.warmup-steps": 0}
    with tally.verdict() as injected, _processes(bench, tmp_path / "run", 2, **slow) as running:
        assert running[0].until((stage / "config.json").exists)
        for step in (1, 2, 3):
            (stage / f"nonfinite-{step}").mkdir()
            os.mkfifo(stage / f"nonfinite-{step}" / "examples.jsonl")
        assert running[0].until(lambda: any(stage.glob("nonfinite-*/batch.npz")))
        injected.append("not finite: 2 processes, a slow disk")
        later = time.monotonic() + 10  # who ends by itself is given 5 s, and then ended
        for one in running:
            assert one.until(lambda: time.monotonic() > later), one.ended()
        (kept,) = [batch.parent for batch in stage.glob("nonfinite-*/batch.npz")]
        records = [json.loads(line) for line in (kept / "examples.jsonl").read_text().splitlines()]
        for one in running:
            one.wait(GRACE).sentence(exits.DIVERGED, records[0]["origin"], f"all of them and the batch are in {kept}")
        assert len(np.load(kept / "batch.npz")["tokens"]) == 8


@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_hangs(bench, tally, tmp_path, victim):
    """As if its host or the network were gone: connections stay open, and nothing comes."""
    with tally.verdict() as injected, _processes(bench, tmp_path / "run", 2) as running:
        assert running[0].until(lambda: running[0].step >= 1)
        running[victim].signal(signal.SIGSTOP)
        injected.append(f"SIGSTOP: {'the first' if victim == 0 else 'one'} of 2 processes")
        running[1 - victim].wait(GRACE).sentence(69, f"process {victim}")
