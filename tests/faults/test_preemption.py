"""SIGTERM, as schedulers send it before they take a machine away: save, exit with 75, and lose nothing."""

from __future__ import annotations

import random
import signal

import pytest

from tests.faults.conftest import SEED, STEPS
from tests.faults.program import Stage

GRACE = 60.0  # seconds until it has to be gone: less than any scheduler grants

pytestmark = pytest.mark.slow


def test_a_run_asked_to_stop_saves_and_goes_on(bench, tally, tmp_path):
    rng = random.Random(f"{SEED} SIGTERM")
    run = tmp_path / "run"
    stage = Stage(run / "stage1")

    def step(least: int):
        return lambda running: running.step >= least

    def saving(least: int):
        return lambda running: stage.saving and running.step >= least

    first, second, third, fourth = sorted(rng.sample(range(2, STEPS - 10), 4))
    moments = [
        ("start-up", lambda running: running.lines >= 6),  # before the model is loaded and the step compiled
        ("training", step(first)),
        ("inside a save", saving(second)),
        ("training", step(third)),
        ("inside a save", saving(fourth)),
    ]
    reached = 0
    with tally.verdict() as injected:
        for kind, now in moments:
            with bench.start(run, 1) as running:
                assert running.until(lambda now=now, running=running: now(running))
                running.signal(signal.SIGTERM)
                injected.append(f"SIGTERM: {kind}")
                ended = running.wait(GRACE)
            ended.sentence(75)
            assert ended.continued_from in ((None, reached) if kind == "start-up" else (reached or None,)), ended
            reached = stage.logged
            assert (stage.saved or [0])[-1] == reached, "no step that was taken is taken again"
        ended = bench.finish(run, 1)
        assert ended.code == 0 and ended.continued_from == reached, ended
        bench.assert_undisturbed(run, 1)
