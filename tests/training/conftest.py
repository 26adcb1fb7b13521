"""Programs that many of these tests compile are compiled once a run."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory, worker_id):
    """Those of the first test are kept for the others, of all modules here and of all processes of the run."""
    base = tmp_path_factory.getbasetemp()
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str((base if worker_id == "master" else base.parent) / "compiled"))
    yield
    jax.config.update("jax_compilation_cache_dir", before)
