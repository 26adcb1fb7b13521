"""What a step changes: the model (decoder and pair classifier), the optimizer's moments, the step count.

With adapters (LoRA) only these and the classifier are trained; the decoder's other weights are frozen.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alignx_jax import sharding
from alignx_jax.config import LoraConfig
from alignx_jax.models import lora
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
    """What is trained."""
    optimizer: optax.OptState
    frozen: Params = dataclasses.field(default_factory=dict)
    """The other weights: no gradient, no moments, and not in a checkpoint; empty where all are trained."""


def build(decoder: Decoder, classifier_width: int | None, *, seed: int, adapters: LoraConfig | None = None) -> AlignX:
    """A decoder with what it is trained with, random from `seed`: the classifier, none without a width; adapters, none
    of rank 0, and those that it has already stay."""
    if adapters and adapters.rank and not decoder.layers.adapters:
        lora.attach(decoder, adapters, seed=seed)
    if classifier_width is None:
        return AlignX(decoder, None)
    hidden_size = decoder.config.hidden_size
    return AlignX(decoder, PairClassifier(hidden_size, classifier_width, rngs=nnx.Rngs(seed)))


def split(model: AlignX) -> tuple[nnx.GraphDef, Params, Params]:
    """The model's structure, what is trained and what is frozen; `nnx.merge` puts them together again."""
    beside = nnx.PathContains("classifier")
    trained = nnx.Any(nnx.LoRAParam, beside) if model.decoder.layers.adapters else nnx.Param
    graph, params, frozen = nnx.split(model, trained, nnx.Param)
    return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(frozen)


def abstract(params: Params, tx: optax.GradientTransformation, mesh: Mesh, frozen: Params | None = None) -> TrainState:
    """Shapes, types and shardings of a state: for restoring one, and for compiling its step.

    Args:
      params, frozen: arrays, or their shapes.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())

    def like(x, s):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)

    moments = jax.eval_shape(tx.init, params)
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
        params=jax.tree.map(like, params, sharding.parameter_shardings(params, mesh)),
        optimizer=jax.tree.map(like, moments, sharding.moment_shardings(moments, params, mesh)),
        frozen=jax.tree.map(like, frozen or {}, sharding.parameter_shardings(frozen or {}, mesh)),
    )


def create(params: Params, tx: optax.GradientTransformation, mesh: Mesh, frozen: Params | None = None) -> TrainState:
    """The state before the first step, each moment sharded as its parameter."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract(params, tx, mesh, frozen))
    params = jax.device_put(params, shardings.params)
    return TrainState(
        step=jax.device_put(jnp.zeros((), jnp.int32), shardings.step),
        params=params,
        optimizer=jax.jit(tx.init, out_shardings=shardings.optimizer)(params),
        frozen=jax.device_put(frozen or {}, shardings.frozen),
    )
