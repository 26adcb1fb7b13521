"""The step on its way to the devices: lowered for batches of the configured shape, compiled beside other work."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import jax
from jax.sharding import Mesh

from alignx_jax import sharding
from alignx_jax.config import Config
from alignx_jax.data import packing
from alignx_jax.models import lora
from alignx_jax.models.architecture import DecoderConfig
from alignx_jax.planning import chips
from alignx_jax.training.state import TrainState


def lower(config: Config, train_step: jax.stages.Wrapped, like: TrainState, mesh: Mesh) -> jax.stages.Lowered:
    """`train_step` for a state such as `like` and batches of `config`, ready to be compiled; nothing is placed."""
    row = packing.assemble([], config.data.row_length, config.data.examples_per_row)
    batch = jax.tree.map(lambda x: sharding.rows_like(x, config.training.rows, mesh), row)
    with jax.set_mesh(mesh):
        return train_step.lower(like, batch, like.step)  # the number of steps is as the count of them


def beside(lowered: jax.stages.Lowered) -> Future[jax.stages.Compiled]:
    """Compiles the step in a thread of its own, while this one builds the data or restores or validates the state."""
    threads = ThreadPoolExecutor(1, "compile")
    compiled = threads.submit(lowered.compile)
    threads.shutdown(wait=False)
    return compiled


def at_best(config: Config, decoder: DecoderConfig, mesh: Mesh) -> float | None:
    """Seconds that the model FLOPs of a step (causal) take at the bfloat16 peak of all devices; None where the peak is
    not known, or the step computes in another type."""
    chip = chips.of_device(mesh.devices.flat[0].device_kind)
    if chip is None or config.training.compute_dtype != "bfloat16":
        return None
    adapters = lora.count(config.lora, decoder)
    flops = chips.model_flops(decoder, config.training.rows, config.data.row_length, causal=True, adapters=adapters)
    return flops / (chip.flops * mesh.size)
