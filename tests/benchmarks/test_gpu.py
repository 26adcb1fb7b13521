"""The benchmark of one accelerator runs on a CPU with the shapes of the sample, both sides."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_the_benchmark_runs_on_a_cpu(tmp_path):
    sizes = ["--rows=2", "--row-length=64", "--pairs=2", "--micro-rows=2", "--steps=1", "--platform=cpu"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--shapes=alignx_jax/sample/model",
            *sizes,
            f"--save={tmp_path / 'o'}",
        ],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "o").read_text())
    assert found["command"].startswith("python -m benchmarks.gpu") and found["versions"]["jax"] and found["date"]
    for side in ("ours", "torch"):
        assert found["sides"][side]["seconds"][0] > 0 and 0 < found["sides"][side]["loss"] < 20, found["sides"][side]
    assert found["sides"]["ours"]["peak"] is None and "MFU =" in done.stdout, "no peak of a CPU is known"
