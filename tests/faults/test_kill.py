"""SIGKILL, or the power fails: at any instant of a run; the same command continues it to the same end."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable

import pytest

from tests.faults.conftest import SAVE_EVERY, SEED, STEPS
from tests.faults.program import Running, Stage

KILLS = int(os.environ.get("ALIGNX_FAULTS_KILLS", "32"))  # over both stages

pytestmark = pytest.mark.slow


def _moments(rng: random.Random, kills: int, cache, stage: Stage, corpus: str) -> list[tuple[str, Callable, float]]:
    """What is interrupted, how it is told from outside, and for how many seconds it is let go on; in a run's order."""

    def printed(lines: int):
        return lambda running: running.lines >= lines

    def building(what: str):
        """Or just built: on a busy machine nobody may have looked while it was."""
        return lambda running: any(path.is_dir() for path in (cache / what).glob("*"))

    def saving(least: int):
        return lambda running: stage.saving and running.step >= least

    def step(least: int):
        return lambda running: running.step >= least

    inside = (kills - 7) // 2 + 1  # of the instants that are not chosen below
    steps = sorted((rng.randrange(1, STEPS), n < inside) for n in range(kills - 7))
    return [
        ("start-up", printed(0), rng.uniform(0, 2)),
        ("building data", building(corpus), rng.uniform(0, 0.1)),
        ("building data", building("encoded"), rng.uniform(0, 0.02)),
        ("start-up", printed(rng.randrange(1, 5)), rng.uniform(0, 0.2)),
        ("start-up", printed(6), rng.uniform(0, 1)),
        ("first save", lambda running: running.step and (stage.saving or stage.saved), rng.uniform(0, 0.1)),
        *(
            ("inside a save", saving(least), rng.uniform(0, 0.2))
            if save
            else ("training", step(least), rng.uniform(0, 0.1))
            for least, save in steps
        ),
        ("the end", step(STEPS), 0.0),
    ]


@pytest.mark.parametrize("number", [1, 2])
def test_a_run_killed_again_and_again_ends_where_an_undisturbed_one_ends(bench, tally, tmp_path, number):
    rng = random.Random(f"{SEED} {number}")
    run, cache = tmp_path / "run", tmp_path / "cache"
    stage = Stage(run / f"stage{number}")
    shutil.copytree(bench.cache / "compiled", cache / "compiled")  # what is compiled is there, the data are not
    moments = _moments(rng, KILLS // 2, cache, stage, {1: "parallel", 2: "instructions"}[number])
    saved = 0

    def check_continued(running: Running) -> None:
        """It repeats no more than the work since the last finished save: what is logged, up to two saves ahead."""
        if (begun := running.ended().continued_from) is not None:
            assert begun == saved, running.ended()

    with tally.verdict() as injected:
        for kind, reached, pause in moments:
            with bench.start(run, number, data__cache=cache) as running:
                if running.kill_while(lambda reached=reached, running=running: reached(running), pause):
                    injected.append(f"SIGKILL: {kind}")
                check_continued(running)
            saved = max(stage.saved, default=0)
            assert stage.logged - saved <= 2 * SAVE_EVERY
        with bench.start(run, number, data__cache=cache) as running:
            ended = running.wait()
            assert ended.code == 0, ended
            check_continued(running)
        bench.assert_undisturbed(run, number)
        assert len(injected) == len(moments)
