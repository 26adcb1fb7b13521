"""The benchmark of the step runs; it compares the two sides' losses itself."""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_the_benchmark_runs_on_the_sample(saved_by):
    options = ["--parallel=sample", f"--tokenizer={ROOT / 'alignx_jax/sample/model'}"]
    size = ["--rows=4", "--rounds=1", "--hidden-size=64", "--layers=2"]
    (found,) = saved_by("step", [*options, *size])["rounds"]
    assert found["torch"]["useful"] == found["packed"]["useful"] == found["unpacked"]["useful"] > 0
    for side in found.values():
        assert side["useful"] <= side["places"] and side["seconds"] > 0 and side["grown_mib"] > 0
