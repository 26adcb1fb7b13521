"""What a step changes: the model (decoder and pair classifier), the optimizer's moments, the step count."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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


def build(decoder: Decoder, classifier_width: int | None, *, seed: int) -> AlignX:
    """A decoder with the classifier it is trained beside, random from `seed`; none without a width."""
    if classifier_width is None:
        return AlignX(decoder, None)
    hidden_size = decoder.config.hidden_size
    return AlignX(decoder, PairClassifier(hidden_size, classifier_width, rngs=nnx.Rngs(seed)))


def split(model: AlignX) -> tuple[nnx.GraphDef, Params]:
    """The model's structure and its parameters; `nnx.merge` puts them together again."""
    graph, variables = nnx.split(model, nnx.Param)
    return graph, nnx.to_pure_dict(variables)


def abstract(params: Params, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of a state: for restoring one, and for compiling its step.

    Args:
      params: arrays, or their shapes.
    """
    specs = sharding.parameter_shardings(params, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def like(x, s):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)

    moments = jax.eval_shape(tx.init, params)
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
        params=jax.tree.map(like, params, specs),
        optimizer=jax.tree.map(like, moments, sharding.moment_shardings(moments, params, mesh)),
    )


def create(params: Params, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state before the first step, each moment sharded as its parameter."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract(params, tx, mesh))
    params = jax.device_put(params, shardings.params)
    return TrainState(
        step=jax.device_put(jnp.zeros((), jnp.int32), shardings.step),
        params=params,
        optimizer=jax.jit(tx.init, out_shardings=shardings.optimizer)(params),
    )
