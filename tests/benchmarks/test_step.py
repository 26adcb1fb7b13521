"""The benchmark of the step runs; it compares the two sides' losses itself."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_the_benchmark_runs_on_the_sample(tmp_path):
    options = [
        "--parallel=sample",
        f"--tokenizer={ROOT / 'alignx_jax/sample/model'}",
        f"--save={tmp_path / 'out.json'}",
    ]
    size = ["--rows=4", "--rounds=1", "--hidden-size=64", "--layers=2"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.step", *options, *size],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / "out.json").read_text())["rounds"]
    assert found["torch"]["useful"] == found["packed"]["useful"] == found["unpacked"]["useful"] > 0
    for side in found.values():
        assert side["useful"] <= side["places"] and side["seconds"] > 0 and side["grown_mib"] > 0
