"""The machines that `plan` compiles for: TPU slices and GPUs that need not be there, or this host."""

from __future__ import annotations

import dataclasses
import importlib.util
import os

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from alignx_jax import sharding
from alignx_jax.config import Config
from alignx_jax.exits import UserError
from alignx_jax.planning import chips

# What XLA's compiler asks of a GPU, which it otherwise reads off the card: XLA's own figures of an H100 SXM
# (xla/backends/gpu/target_config/specs/h100_sxm.txtpb and h200.txtpb), with what differs between cards left out.
_CARD = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared_optin}
  core_count: {cores} fpus_per_core: 128 clock_rate_ghz: {clock} l2_cache_size: {l2}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ {capability} }}
  memory_bandwidth: {bandwidth:.0f} device_memory_size: {memory}
}}
runtime_version {{ major: 12 minor: 8 }}
dnn_version_info {{ major: 9 minor: 10 }}
platform_name: "CUDA"
device_description_str: "{name}"
"""
_HOPPER = {"capability": "major: 9", "cores": 132, "clock": 1.98, "l2": 52428800}
_HOPPER |= {"threads": 2048, "shared": 233472, "shared_optin": 232448}
# Of Ada: NVIDIA's CUDA C++ programming guide for compute capability 8.9, and its paper on the architecture.
_ADA = {"capability": "major: 8 minor: 9", "cores": 128, "clock": 2.52, "l2": 75497472}
_ADA |= {"threads": 1536, "shared": 102400, "shared_optin": 101376}
_CARDS = {
    "h100": ("NVIDIA H100 80GB HBM3", 84942979072, _HOPPER),
    "h200": ("NVIDIA H200", 151397597184, _HOPPER),
    "rtx4090": ("NVIDIA GeForce RTX 4090", 25757220864, _ADA),
}
"""The names and the bytes of memory that the driver reports, of which a program cannot have all; the kind of chip."""
_CUDA_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a step is compiled for."""

    topology: str
    devices: tuple[jax.Device, ...] | None
    """Of a TPU slice or of GPUs; None: as many simulated devices of this host as a mesh asks for."""
    chip: chips.Chip | None
    """None: this host, of which no figures are known."""

    @property
    def platform(self) -> str:
        """Whose compiler it is: "tpu", "gpu" or "cpu"."""
        return self.devices[0].platform if self.devices else "cpu"

    def mesh(self, spec: str) -> Mesh:
        """
        Raises:
          UserError: no mesh, or not one of all chips.
        """
        mesh = sharding.make_mesh(spec, self.devices)
        if self.devices and mesh.size != len(self.devices):
            raise UserError(
                f"--mesh={spec} is a mesh of {mesh.size} chips, but --topology={self.topology} has "
                f"{len(self.devices)}; give a mesh of all of them, such as {len(self.devices)}x1"
            )
        return mesh

    def capacity(self, devices: int) -> float:
        """Bytes of memory a device: of the chip, or this host's shared by the simulated devices."""
        if self.chip:
            return self.chip.hbm_bytes
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / devices


def find(config: Config) -> Machine:
    """The machine of `--topology`. Call it before anything uses a device: JAX is to see this host's CPU only.

    Raises:
      UserError: none is given, its name is unknown, GPUs are not as many as the mesh, or libtpu is not installed.
    """
    name = config.topology
    if name is None:
        raise UserError("--topology is not set; give a TPU slice such as v5e:2x4, GPUs such as h100:8, or cpu")
    jax.config.update("jax_platforms", "cpu")
    sharding.prepare_devices(config.mesh)
    if name == "cpu":
        return Machine(name, None, None)
    kind, _, size = name.partition(":")
    if kind in chips.GPUS:
        wanted = sharding.abstract_mesh(config.mesh).size
        if size != str(wanted):
            raise UserError(f"--topology={name}: --mesh={config.mesh} is a mesh of {wanted}; give {kind}:{wanted}")
        return Machine(name, _gpus(kind, wanted), chips.GPUS[kind])
    if kind not in chips.TPUS:
        known = ", ".join([*(f"{k}:..." for k in (*chips.TPUS, *chips.GPUS)), "cpu"])
        raise UserError(f"--topology={name}: no such machine; give one of {known}, such as v5e:2x4")
    return Machine(name, _tpu(name), chips.TPUS[kind])


def cuda_plugin() -> bool:
    """Whether JAX's CUDA plugin is installed, which has XLA's compiler for GPUs."""
    return importlib.util.find_spec("jax_plugins") is not None and any(map(importlib.util.find_spec, _CUDA_PLUGINS))


def _gpus(kind: str, count: int) -> tuple[jax.Device, ...] | None:
    """GPUs of one host that need not be there, for XLA's compiler; None where JAX's CUDA plugin is not installed."""
    if not cuda_plugin():
        return None
    name, memory, chip = _CARDS[kind]
    target = _CARD.format(bandwidth=chips.GPUS[kind].hbm_bandwidth, memory=memory, name=name, **chip)
    layout = f"1x1x{count}"  # slices x hosts x GPUs
    return tuple(topologies.get_topology_desc(kind, "cuda", target_config=target, topology=layout).devices)


def _tpu(name: str) -> tuple[jax.Device, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f'--topology={name} needs the compiler of the libtpu package; install it with: pip install "jax[tpu]"'
        )
    # libtpu looks for a TPU machine around it unless it is told what it would find; nothing is run, so that several
    # processes may load it.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}
    try:
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--topology={name}: libtpu knows no such slice ({str(error).splitlines()[0]}); "
            "give one that exists, such as v5e:2x4 or v5p:4x4x8"
        ) from None
