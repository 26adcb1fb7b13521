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


def _same_signal_to_the_group(running):
    """As `timeout` does: the process gets it, and its group."""
    running.signal(signal.SIGTERM)
    running.signal(signal.SIGTERM)


@pytest.mark.parametrize(
    "ask",
    [
        _same_signal_to_the_group,
        lambda running: running.signal(signal.SIGHUP),
        lambda running: running.signal(signal.SIGUSR1),
        lambda running: running.signal(signal.SIGQUIT),
    ],
    ids=["SIGTERM twice", "SIGHUP", "SIGUSR1", "SIGQUIT"],
)
def test_whatever_asks_a_run_to_stop_it_saves(bench, tally, tmp_path, ask):
    run = tmp_path / "run"
    stage = Stage(run / "stage1")
    with tally.verdict() as injected:
        with bench.start(run, 1) as running:
            assert running.until(lambda: running.step >= 5)
            ask(running)
            injected.append("SIGTERM twice, SIGHUP, SIGUSR1, SIGQUIT: training")
            running.wait(GRACE).sentence(75, "which is saved in")
        assert stage.saved[-1] == stage.logged < STEPS
        reached, ended = stage.logged, bench.finish(run, 1)
        assert ended.code == 0 and ended.continued_from == reached, ended
        bench.assert_undisturbed(run, 1)


@pytest.mark.parametrize("interrupted", [False, True], ids=["its end alone", "and Ctrl-C for all of the pipeline"])
def test_a_reader_of_stdout_that_ends_stops_the_run_as_a_signal_does(bench, tally, tmp_path, interrupted):
    """`| head`; `2>&1 | tee log`, where both of the pipeline get the signal, and tee ends first."""
    run = tmp_path / "run"
    stage = Stage(run / "stage1")
    with tally.verdict() as injected:
        with bench.piped(run, 1) as running:
            for line in running.stdout:
                if line.startswith("stage 1 6/"):
                    break
            running.stdout.close()
            if interrupted:
                running.send_signal(signal.SIGINT)
            injected.append("the reader of stdout is gone: training")
            assert running.wait(GRACE) == 75
        assert 6 <= stage.saved[-1] == stage.logged < STEPS
        ended = bench.finish(run, 1)
        assert ended.code == 0 and ended.continued_from, ended
        bench.assert_undisturbed(run, 1)


def test_a_full_disk_behind_stdout_costs_the_printing_alone(bench, tally, tmp_path):
    run = tmp_path / "run"
    with tally.verdict() as injected, open("/dev/full", "w") as full:
        with bench.piped(run, 1, stdout=full) as running:
            injected.append("disk full: stdout")
            _, said = running.communicate(timeout=300)
            assert running.returncode == 0 and said.count("stdout cannot be written (No space left on device)") == 1
        bench.assert_undisturbed(run, 1)
