"""Test settings: 8 simulated devices, strict rank promotion; the reference arrays and the real data where they are.

`ALIGNX_TEST_PLATFORMS=cpu,cuda` (or `cpu,tpu`) gives an accelerator to the tests that ask for one; the others stay on
the CPU.
"""

import os
import pathlib

import jax
import pytest

from tests.faults import tally

PLATFORMS = os.environ.get("ALIGNX_TEST_PLATFORMS", "cpu")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of torch, whose threads wait for each other on a busy machine
if PLATFORMS == "cpu":  # tests compile for longer than they compute; also in the processes that they start
    QUICK = {"backend_optimization_level": 0, "cpu_use_fusion_emitters": "false", "cpu_parallel_codegen_split_count": 1}
    os.environ.setdefault("XLA_FLAGS", " ".join(f"--xla_{name}={value}" for name, value in QUICK.items()))
os.environ.setdefault("PJRT_NPROC", "64")  # as `sharding.prepare_devices` has it for 8 devices
jax.config.update("jax_platforms", PLATFORMS)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of reference arrays and real corpora: $ALIGNX_SHARED, or `shared` beside the repository."""
    folder = pathlib.Path(os.environ.get("ALIGNX_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"needs the reference arrays and corpora, which are not at {folder}; set ALIGNX_SHARED")
    return folder


@pytest.fixture(scope="session")
def reference() -> pathlib.Path:
    """What the published code computes, as arrays; a part of `shared/reference`, whose SEMANTICS.md describes it."""
    return ROOT / "tests" / "data" / "reference"


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory) -> pathlib.Path:
    """The folder of compiled programs of this run of the tests, for all of its processes."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "compiled"


@pytest.fixture(scope="module", autouse=True)
def compiled_once(compilation_cache):
    """A program that several tests compile is compiled once."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(compilation_cache))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def pytest_terminal_summary(terminalreporter):
    tally.show(terminalreporter)
