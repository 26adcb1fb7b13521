"""The benchmark of the pair losses runs; it compares what the forms compute itself."""

import numpy as np
import pytest

from benchmarks import losses


@pytest.mark.slow
def test_the_benchmark_runs_and_refuses_what_does_not_fit(saved_by):
    options = ["--pairs", "4", "40", "--hidden-size=64", "--width=8", "--rounds=1", "--memory=0.005"]
    found = saved_by("losses", options)
    for loss in losses.LOSSES:
        assert set(found["differences"][loss]) == {"published", "factored", "two devices"}
        assert 0 < max(found["differences"][loss].values()) < 1e-5
    assert [(r["loss"], r["pairs"]) for r in found["results"]] == [(k, n) for k in losses.LOSSES for n in (4, 40)]
    for side in losses.SIDES:
        assert found["results"][2]["sides"][side]["seconds"][0] > 0
    assert "seconds" not in found["results"][3]["sides"]["published"], "40 pairs: 80 x 80 x 128 floats, three times"


def test_forms_that_differ_are_no_benchmark(monkeypatch):
    def measure(loss, side, *sizes, to):
        np.savez(to, np.ones(()), np.full((8, 3), 1.0 + (side == "factored")))

    monkeypatch.setattr(losses, "measure", measure)
    with pytest.raises(SystemExit, match="do not compute the same"):
        losses.check("contrastive", 4, losses.Options())
