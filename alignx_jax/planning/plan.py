"""The training step compiled for a machine that is not there: does it fit, what does it move, how fast could it be?

What is compiled is the function that trains (`training.build.build_step`), for the devices of `machines.py`. No weights
are read: a config.json gives the shapes.
"""

from __future__ import annotations

import dataclasses
import math
import time
import typing
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from alignx_jax import sharding
from alignx_jax.config import Config, OptimizerConfig, TrainingConfig
from alignx_jax.exits import UserError
from alignx_jax.models import families, lora
from alignx_jax.planning import chips, hlo, hlo_cost
from alignx_jax.planning.machines import Machine
from alignx_jax.training import build


@dataclasses.dataclass(frozen=True)
class Plan:
    """One compiled step. Bytes, FLOPs and seconds are of one chip and one step."""

    settings: dict[str, Any]
    """What may differ between plans: mesh, rows, tokens a row, accumulation, remat, type of the first moment, rank of
    adapters."""
    fits: bool
    refusal: str | None
    """What the compiler says where it refuses a step that is too large; nothing below is known then."""
    compile_seconds: float
    capacity: float
    """Bytes of memory."""
    total_bytes: int = 0
    """Memory that the step takes."""
    state_bytes: int = 0
    """Weights, the frozen ones too, moments and step: what is donated."""
    argument_bytes: int = 0
    """The state and a batch."""
    temporary_bytes: int = 0
    """As the compiler says; a TPU's may lie where something else lay before, so that the parts add up to more."""
    aliased_bytes: int = 0
    """Of the results, what takes the place of an argument."""
    model_flops: float = 0.0
    """Of the whole row's causal half; see `chips.model_flops`."""
    model_flops_full: float = 0.0
    """Without causal halving."""
    compiled_flops: float = 0.0
    hbm_bytes: float = 0.0
    sent_bytes: dict[str, float] = dataclasses.field(default_factory=dict)
    """Over the interconnect, by collective."""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """At the chip's best: of arithmetic, of memory, of the interconnect. Empty where the chip's figures are unknown."""
    mfu: float | None = None
    """Model FLOPs over what the chip could do in the estimated time."""
    caveats: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """Compiled FLOPs over model FLOPs (causal)."""
        return self.compiled_flops / self.model_flops

    @property
    def bound(self) -> str | None:
        """What the step waits for at best."""
        return max(self.seconds, key=self.seconds.get) if self.seconds else None

    @property
    def step_seconds(self) -> float | None:
        """Estimate: all three at once, the slowest at its best."""
        return self.seconds[self.bound] if self.seconds else None

    def to_dict(self) -> dict[str, Any]:
        derived = {"bound": self.bound, "step_seconds": self.step_seconds}
        derived |= {"ratio": self.ratio} if self.refusal is None else {}
        return dataclasses.asdict(self) | derived


def measure(config: Config, decoder: families.DecoderConfig, on: Machine) -> Plan:
    """Compiles the step of stage 1 that `config` trains, and reads what the compiler made of it.

    The batch is the largest that the settings allow: every row with as many pairs as it has places.

    Raises:
      UserError: the mesh does not divide the model or the batch, or a layer is not in the model.
    """
    mesh = on.mesh(config.mesh)
    compiled, state_bytes, seconds = compile_step(config, decoder, mesh)
    training, data = config.training, config.data
    settings = {
        "mesh": config.mesh,
        "rows": training.rows,
        "row_length": data.row_length,
        "accumulation": training.accumulation,
        "remat": training.remat,
        "optimizer": config.optimizer.kind,
        "moment_dtype": config.optimizer.moment_dtype,
        "lora_rank": config.lora.rank,
    }
    capacity = on.capacity(mesh.size)
    if isinstance(compiled, str):
        return Plan(settings, False, compiled, seconds, capacity)
    memory, cost = compiled.memory_analysis(), hlo_cost.cost(hlo.Module(compiled.as_text()))
    shape = decoder, training.rows, data.row_length
    adapters = lora.count(config.lora, decoder)
    flops = [chips.model_flops(*shape, causal=c, adapters=adapters) / mesh.size for c in (True, False)]
    sent, limits, mfu = cost.sent(), {}, None
    if chip := on.chip:
        limits = {
            "arithmetic": cost.flops / chip.flops,
            "memory": cost.hbm_bytes / chip.hbm_bandwidth,
            "interconnect": sum(sent.values()) / chip.link_bandwidth,
        }
        mfu = flops[0] / chip.flops / max(limits.values())
    total = memory.peak_memory_in_bytes
    if on.platform != "tpu":  # the peak that is given for a CPU leaves out temporaries
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + results
    return Plan(
        settings,
        on.platform == "tpu" or total <= capacity,
        None,
        seconds,
        capacity,
        total_bytes=total,
        state_bytes=state_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        model_flops=flops[0],
        model_flops_full=flops[1],
        compiled_flops=cost.flops,
        hbm_bytes=cost.hbm_bytes,
        sent_bytes=sent,
        seconds=limits,
        mfu=mfu,
        caveats=tuple(_caveats(cost, on)),
    )


def compile_step(
    config: Config, decoder: families.DecoderConfig, mesh: Mesh
) -> tuple[jax.stages.Compiled | str, int, float]:
    """The compiled step, or what the compiler says of one too large; bytes of a device's state; seconds it took."""
    training, data = config.training, config.data
    sharding.check(decoder, mesh, training.rows, training.accumulation)
    most = build.group_rows(config, mesh) * data.examples_per_row
    recipe = build.recipe_for(config, decoder, mesh, pairs=True, group_pairs=most)
    step = build.build_step(config, recipe, decoder, mesh)
    shards = (math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(step.like))
    state_bytes, start = sum(shards), time.monotonic()
    try:
        # Without the card kernels cannot be tried out.
        options = {"xla_gpu_autotune_level": 0} if mesh.devices.flat[0].platform == "gpu" else None
        compiled = step.lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        compiled = str(error).partition("\n")[0]
    return compiled, state_bytes, time.monotonic() - start


def _caveats(cost: hlo_cost.Cost, on: Machine) -> list[str]:
    found = []
    if cost.kernels_without_estimate:
        found.append(f"{cost.kernels_without_estimate} kernels carry no figures; their FLOPs are not counted")
    if cost.unknown_loops:
        found.append(f"{cost.unknown_loops} loops have a trip count that the program does not say; counted once")
    if on.chip and not on.devices:
        found.append(
            "compiled for this host's CPU, which computes in float32: the state is exact, the rest estimated; with "
            'pip install "jax[cuda13]" (no GPU is needed) it is compiled for the GPU'
        )
    return found


def search(
    config: Config,
    candidates: Sequence[Sequence[Config]],
    compile_one: Callable[[Config], Plan],
    advance: Callable[[str, int, int], None],
) -> list[Plan]:
    """Plans of the candidates tried, at most `plan.compilations`: bisects each chain for its first that fits.

    Args:
      candidates: chains, each from the fastest to the most frugal; see `chains`.
    """
    budget = min(config.plan.compilations, sum(len(chain).bit_length() for chain in candidates))
    plans: list[Plan] = []
    for chain in candidates:
        low, high = 0, len(chain)  # the first that fits is in [low, high]
        while low < high and len(plans) < budget:
            middle = (low + high) // 2
            advance("compiling", len(plans), budget)
            plans.append(compile_one(chain[middle]))
            low, high = (low, middle) if plans[-1].fits else (middle + 1, high)
    advance("compiling", budget, budget)
    return plans


def chains(config: Config, decoder: families.DecoderConfig) -> list[list[Config]]:
    """Candidates of `search`: for each mesh, its settings from what computes least again to what takes least memory.

    Pure FSDP first; the replicas stay as they are. More micro-batches come last in a chain: each gathers the weights
    again.
    """
    *replicas, data, model = sharding.abstract_mesh(config.mesh).axis_sizes
    remats = typing.get_args(typing.get_type_hints(TrainingConfig)["remat"])
    moments = typing.get_args(typing.get_type_hints(OptimizerConfig)["moment_dtype"])
    moments = moments if config.optimizer.kind == "adamw" else (config.optimizer.moment_dtype,)
    found = []
    for size in (m for m in range(1, data * model + 1) if data * model % m == 0):
        spec = "x".join(map(str, (*replicas, data * model // size, size)))
        chain = [
            _with(config, spec, accumulation, remat, moment)
            for accumulation in (2**n for n in range(config.training.rows.bit_length()))
            for remat in (remats if accumulation == 1 else remats[-1:])
            for moment in moments
            if _divides(config, decoder, spec, accumulation)
        ]
        if chain:
            found.append(chain)
    return found


def _with(config: Config, mesh: str, accumulation: int, remat: str, moment_dtype: str) -> Config:
    return dataclasses.replace(
        config,
        mesh=mesh,
        training=dataclasses.replace(config.training, accumulation=accumulation, remat=remat),
        optimizer=dataclasses.replace(config.optimizer, moment_dtype=moment_dtype),
    )


def _divides(config: Config, decoder: families.DecoderConfig, spec: str, accumulation: int) -> bool:
    try:
        sharding.check(decoder, sharding.abstract_mesh(spec), config.training.rows, accumulation)
    except UserError:
        return False
    return True


def fastest(plans: Sequence[Plan]) -> Plan | None:
    """Of those that fit; by the fewest FLOPs where the chip is unknown."""
    fitting = [plan for plan in plans if plan.fits]
    return min(fitting, key=lambda plan: plan.step_seconds or plan.compiled_flops, default=None)


def flags(settings: dict[str, Any]) -> str:
    """The flags of `run.py` that ask for a plan's settings."""
    names = {"mesh": "mesh", "accumulation": "training.accumulation", "remat": "training.remat"}
    names |= {"optimizer": "optimizer.kind", "moment_dtype": "optimizer.moment-dtype"}
    return " ".join(f"--{flag}={settings[name]}" for name, flag in names.items())
