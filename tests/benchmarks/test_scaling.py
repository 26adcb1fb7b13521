"""The benchmark of weak scaling runs, and two processes take the steps that one takes."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path):
    sizes = ["--rows=1", "--hidden-size=64", "--layers=2", "--steps=2", "--rounds=1"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", "--devices=2", *sizes, f"--save={tmp_path / 'out.json'}"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one, two = json.loads((tmp_path / "out.json").read_text())["results"]
    assert (one["processes"], two["processes"]) == (1, 2) and min(*one["seconds"], *two["seconds"]) > 0
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-5)
