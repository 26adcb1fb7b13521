"""The compiler's flags that the program sets, a few for each platform; what the user's environment sets stays.

Sources: JAX's page on GPU performance and NVIDIA's JAX-Toolbox (docs/gpu.md); MaxText's flags for TPU
(docs/multihost.md).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import MutableMapping

from alignx_jax import sharding
from alignx_jax.planning import machines

GPU = {
    # Collectives start early and end late, so that products run meanwhile.
    "--xla_gpu_enable_latency_hiding_scheduler": "true",
    # The compiler plans for 80% of the memory times this, and beyond it computes again what it could keep: 88%.
    "--xla_gpu_memory_limit_slop_factor": "110",
}
TPU = {
    # Gathers run beside products, in steps that are fused with them.
    "--xla_tpu_enable_async_collective_fusion": "true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "--xla_tpu_overlap_compute_collective_tc": "true",
    "--xla_enable_async_all_gather": "true",
}
MEMORY = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
"""Of a GPU's memory, what JAX takes at the start; its own default is 0.75."""
_VARIABLES = {
    "cpu": ("XLA_FLAGS", sharding.CPU_THREADS),
    "gpu": ("XLA_FLAGS", MEMORY[0]),
    "tpu": ("LIBTPU_INIT_ARGS",),
}
"""Flags, and what else there is to show, by its name."""


def apply(environment: MutableMapping[str, str] = os.environ) -> None:
    """Adds the flags of the platforms whose compiler is installed. Call it before JAX starts a backend.

    A flag of another platform is never added: a compiler that does not know one ends the process.
    """
    if machines.cuda_plugin():
        _add(environment, "XLA_FLAGS", GPU)
        environment.setdefault(*MEMORY)
    if importlib.util.find_spec("libtpu") is not None:
        _add(environment, "LIBTPU_INIT_ARGS", TPU)


def _add(environment: MutableMapping[str, str], variable: str, flags: dict[str, str]) -> None:
    there = environment.get(variable, "").split()
    given = {flag.partition("=")[0] for flag in there}
    environment[variable] = " ".join([*there, *(f"{k}={v}" for k, v in flags.items() if k not in given)])


def shown(platform: str) -> str:
    """What the compiler for a platform is given, with the user's own flags; empty: nothing."""
    flags, *others = _VARIABLES.get(platform, ("",))
    return " ".join(
        [*os.environ.get(flags, "").split(), *(f"{name}={os.environ[name]}" for name in others if name in os.environ)]
    )
