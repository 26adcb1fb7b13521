"""A run goes on with another number of devices, after it was killed with the first."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tests.faults.conftest import SEED, STEPS
from tests.faults.program import Stage

pytestmark = pytest.mark.slow


def test_a_run_goes_on_across_meshes(bench, tally, tmp_path):
    """8x1, killed, 4x2, killed, 2x1: the same order of data, losses equal to float tolerance.

    The rate is a low one: at the sample's, rounding grows from 1e-7 of the loss to 8e-4 in 40 steps of such batches.
    """
    slowly = {"optimizer.learning-rate": 1e-3}
    rng = random.Random(f"{SEED} meshes")
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert bench.finish(whole, 1, **slowly).code == 0
    with tally.verdict() as injected:
        for mesh, least in (("8x1", rng.randrange(4, STEPS // 2)), ("4x2", rng.randrange(STEPS // 2, STEPS - 4))):
            with bench.start(run, 1, mesh=mesh, **slowly) as running:
                assert running.kill_while(lambda least=least, running=running: running.step >= least)
                injected.append("SIGKILL, then another mesh")
        ended = bench.finish(run, 1, **slowly)  # 2x1
        assert ended.code == 0 and ended.continued_from, ended
        assert_close(Stage(run / "stage1"), Stage(whole / "stage1"))


def assert_close(here: Stage, there: Stage) -> None:
    """Every record of both runs: the same steps and the same batches, and losses equal to float tolerance."""
    records, wanted = here.metrics(), there.metrics()
    assert [(r["kind"], r["step"], r.get("tokens")) for r in records] == [
        (r["kind"], r["step"], r.get("tokens")) for r in wanted
    ]
    for name in ("loss", "next_token", "contrastive", "language_matching"):
        np.testing.assert_allclose([r[name] for r in records], [r[name] for r in wanted], rtol=1e-4, err_msg=name)
