"""What a step changes: the model (decoder and pair classifier), the optimizer's moments, the step count."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from alignx_jax import sharding
from alignx_jax.models.decoder import Decoder
from alignx_jax.objectives.language_matching import Classifier

Params = dict[str, Any]
"""Nested dictionary of arrays; the leaves of an `AlignX` module."""


class PairClassifier(nnx.Module):
    """The gated classifier of the language matching loss; initialised N(0, 0.02) as published."""

    def __init__(self, hidden_size: int, width: int, *, rngs: nnx.Rngs, dtype=jnp.float32):
        normal = nnx.initializers.normal(0.02)
        self.gate = nnx.Param(normal(rngs.params(), (2 * hidden_size, width), dtype))
        self.up = nnx.Param(normal(rngs.params(), (2 * hidden_size, width), dtype))
        self.down = nnx.Param(normal(rngs.params(), (width, 2), dtype))

    def weights(self) -> Classifier:
        return Classifier(self.gate[...], self.up[...], self.down[...])


class AlignX(nnx.Module):
    """The decoder with what stage 1 trains beside it; only the decoder is exported."""

    def __init__(self, decoder: Decoder, classifier: PairClassifier):
        self.decoder = decoder
        self.classifier = classifier


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Donated to every step and returned by it."""

    step: jax.Array
    """int32 number of updates made."""
    params: Params
    optimizer: optax.OptState


def abstract_state(graph: nnx.GraphDef, params: Params, tx: optax.GradientTransformation, mesh) -> TrainState:
    """Shapes, types and shardings of a state, without its arrays: for restoring one and for compiling ahead."""
    specs = sharding.parameter_shardings(params, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def like(x, s):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)

    moments = jax.eval_shape(tx.init, params)
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
        params=jax.tree.map(like, params, specs),
        optimizer=optax.tree_utils.tree_map_params(
            tx, like, moments, specs, transform_non_params=lambda x: like(x, everywhere)
        ),
    )


def create(model: AlignX, tx: optax.GradientTransformation, mesh) -> tuple[nnx.GraphDef, TrainState]:
    """The state before the first step, each moment sharded as its parameter."""
    graph, variables = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(variables)
    abstract = abstract_state(graph, params, tx, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    params = jax.device_put(params, shardings.params)
    optimizer = jax.jit(tx.init, out_shardings=shardings.optimizer)(params)
    return graph, TrainState(step=jax.device_put(jnp.zeros((), jnp.int32), shardings.step), params=params, optimizer=optimizer)
