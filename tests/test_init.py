"""The Python API: every name is there, documented, and costs nothing before it is used."""

import json
import pathlib
import subprocess
import sys

import pytest

import alignx_jax

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", alignx_jax.__all__)
def test_every_name_is_there_and_documented(name):
    assert getattr(alignx_jax, name).__doc__ and name in dir(alignx_jax)
    assert f"`{name}`" in (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("example", sorted(ROOT.glob("examples/*.py")), ids=lambda path: path.stem)
def test_every_example_is_in_the_documentation(example):
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert f'\n--8<-- "examples/{example.name}"\n' in page  # not as a formatter would have it


def test_an_unknown_name_is_told():
    with pytest.raises(AttributeError, match=r"no attribute 'train'; it has Batch, Config"):
        alignx_jax.train  # noqa: B018


def test_importing_it_imports_nothing_and_the_losses_only_jax():
    script = "import json, sys, alignx_jax; print(json.dumps([*sys.modules])); "
    script += "alignx_jax.losses; print(json.dumps([*sys.modules]))"
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, cwd=ROOT, text=True).stdout
    alone, with_losses = (set(json.loads(line)) for line in found.splitlines())
    assert not alone & {"jax", "numpy", "flax"}
    assert "jax" in with_losses
    assert not with_losses & {"flax", "orbax", "tensorflow_datasets", "transformers", "matplotlib", "grain"}
