"""Flags of the compilers: those of installed platforms alone, and the user's stay."""

import importlib.util

import pytest

from alignx_jax.planning import machines, xla_flags


@pytest.fixture
def installed(monkeypatch):
    def install(*platforms: str) -> None:
        found = importlib.util.find_spec
        monkeypatch.setattr(machines, "cuda_plugin", lambda: "gpu" in platforms)
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: (found("jax") if "tpu" in platforms else None) or None
        )

    return install


def test_a_host_without_accelerators_gets_none(installed):
    installed()
    environment = {"XLA_FLAGS": "--xla_dump_to=there"}
    xla_flags.apply(environment)
    assert environment == {"XLA_FLAGS": "--xla_dump_to=there"}


def test_what_the_user_sets_stays(installed):
    installed("gpu", "tpu")
    name = "--xla_gpu_memory_limit_slop_factor"
    environment = {"XLA_FLAGS": f"{name}=95", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}
    xla_flags.apply(environment)
    flags = environment["XLA_FLAGS"].split()
    assert flags[0] == f"{name}=95" and [f for f in flags if name in f] == flags[:1]
    assert len(flags) == len(xla_flags.GPU) and environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    assert environment["LIBTPU_INIT_ARGS"].split() == [f"{k}={v}" for k, v in xla_flags.TPU.items()]
    once = dict(environment)
    xla_flags.apply(environment)
    assert environment == once


def test_the_log_has_the_flags_of_its_platform(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_x=1")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_y=2")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    monkeypatch.setenv("PJRT_NPROC", "128")
    assert xla_flags.shown("gpu") == "--xla_gpu_x=1 XLA_PYTHON_CLIENT_MEM_FRACTION=0.92"
    assert xla_flags.shown("tpu") == "--xla_tpu_y=2" and xla_flags.shown("cpu") == "--xla_gpu_x=1 PJRT_NPROC=128"
