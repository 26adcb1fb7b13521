"""The wheel: everything that the package reads is in it, and it works in an empty folder."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
USE = """
import pathlib, alignx_jax
from alignx_jax.data import prompts
from alignx_jax.evaluation.measure import harness
from alignx_jax.evaluation.show import report

assert "installed" in alignx_jax.__file__, alignx_jax.__file__
source = alignx_jax.find("sample")
tokenizer = alignx_jax.load_tokenizer(source.huggingface)
sources = {"parallel": ("sample",), "instructions": ("sample",)}
data = alignx_jax.Config().data.__class__(template="sample", limit=20, cache="cache", **sources)
for stage in ("1", "2"):
    print(stage, alignx_jax.build_data(alignx_jax.Config(data=data), stage, tokenizer).train.num_examples)
prompts.load("alpaca")
source.export(source.load(alignx_jax.make_mesh("1x1")), "exported")
print(sorted(path.name for path in pathlib.Path("exported").iterdir()))
"""


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_folder(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("alignx_jax", "pyproject.toml", "README.md", "requirements.txt"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("alignx_jax-*.whl")
    there = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("alignx_jax/")}
    tree = {p.relative_to(ROOT).as_posix() for p in (ROOT / "alignx_jax").rglob("*") if p.is_file()}
    assert there == {name for name in tree if "__pycache__" not in name}

    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "installed", wheel], check=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed"), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, "-c", USE], cwd=empty, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "model.safetensors" in result.stdout and "tokenizer.model" in result.stdout
