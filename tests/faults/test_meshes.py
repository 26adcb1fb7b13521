"""A run goes on with another number of devices, after it was killed with the first."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tests.faults.conftest import SEED, STEPS
from tests.faults.program import Stage

pytestmark = pytest.mark.slow


def test_a_run_goes_on_across_meshes(bench, tally, tmp_path):
    """8x1, killed, 4x2, killed, 2x1: the same order of data, losses equal to float tolerance."""
    rng = random.Random(f"{SEED} meshes")
    run = tmp_path / "run"
    stage = Stage(run / "stage1")
    with tally.verdict() as injected:
        for mesh, least in (("8x1", rng.randrange(4, STEPS // 2)), ("4x2", rng.randrange(STEPS // 2, STEPS - 4))):
            with bench.start(run, 1, mesh=mesh) as running:
                assert running.kill_while(lambda least=least, running=running: running.step >= least)
                injected.append("SIGKILL, then another mesh")
        ended = bench.finish(run, 1)  # 2x1
        assert ended.code == 0 and ended.continued_from, ended
        assert_close(stage, bench.whole(1))


def assert_close(here: Stage, there: Stage) -> None:
    """Every record of both runs: the same steps and the same batches, and losses equal to float tolerance."""
    records, wanted = here.metrics(), there.metrics()
    assert [(r["kind"], r["step"], r.get("tokens")) for r in records] == [
        (r["kind"], r["step"], r.get("tokens")) for r in wanted
    ]
    for name in ("loss", "next_token", "contrastive", "language_matching"):
        np.testing.assert_allclose([r[name] for r in records], [r[name] for r in wanted], rtol=1e-4, err_msg=name)
