"""Benchmarks run as their users run them: a fresh process that saves what it found."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def saved_by(tmp_path):
    """Runs `benchmarks.NAME` with options, and returns what it saved."""

    def run(name: str, options: list[str]) -> dict:
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}", *options, f"--save={tmp_path / 'out.json'}"],
            cwd=ROOT,
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "out.json").read_text())

    return run
