"""AdamW, or Adafactor where memory is short, with the published schedule; clipping with the published coefficient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from alignx_jax import sharding
from alignx_jax.config import OptimizerConfig


def schedule(config: OptimizerConfig, steps: jax.Array | int) -> optax.Schedule:
    """Learning rate by update, counted from 0: linear from exactly 0 to the peak, then linear to 0 at `steps`.

    Written out because the interpolation of `optax.linear_schedule` loses digits of a small rate to cancellation.
    """
    warmup = config.warmup_steps

    def rate(count: jax.Array) -> jax.Array:
        falling = jnp.maximum((steps - count) / jnp.maximum(steps - warmup, 1), 0.0)
        return config.learning_rate * jnp.where(count < warmup, count / max(warmup, 1), falling)

    return rate


def build(config: OptimizerConfig, steps: jax.Array | int) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` updates, for all parameters, norms and biases included. Its first state is the
    same for any number of them."""
    return adafactor(config, steps) if config.kind == "adafactor" else adamw(config, steps)


def adamw(config: OptimizerConfig, steps: jax.Array | int) -> optax.GradientTransformation:
    """AdamW as published."""
    tx = optax.adamw(
        schedule(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )
    return tx if config.moment_dtype == "float32" else _first_moment_in(jnp.dtype(config.moment_dtype), tx)


def _first_moment_in(dtype: jnp.dtype, tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` with the running mean of the gradient kept in `dtype` between updates, which compute with it in float32.

    Not `mu_dtype` of optax: that multiplies in `dtype`, where a decay of 0.9 is 0.8984 and means come out 1.5% small.
    """

    def cast(state: optax.OptState, to: jnp.dtype) -> optax.OptState:
        return optax.tree.set(state, mu=optax.tree.cast(optax.tree.get(state, "mu"), to))

    def update(gradients, state, params=None):
        updates, state = tx.update(gradients, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(tx.init(params), dtype), update)


def adafactor(config: OptimizerConfig, steps: jax.Array | int) -> optax.GradientTransformation:
    """Adafactor (arXiv 1804.04235) with AdamW's learning rates: no first moment, a mean square a row and a column.

    An update is the gradient over its factored root mean square, at most 1 in the mean over a matrix: as large as one
    of AdamW. The rate is absolute, not relative to the weights, and weight decay is multiplied by it; `optax.adafactor`
    has no such form. Each layer of a stack is a matrix of its own.
    """
    return optax.chain(
        _of_each_layer(optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule(config, steps)),
    )


def _of_each_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` of stacked parameters [L,...] as if each layer's were separate leaves; the layers share its counts."""

    def axes(tree):
        """0 for what belongs to stacked parameters, None for what has no layers."""
        return jax.tree_util.tree_map_with_path(lambda path, _: 0 if sharding.is_stacked(path) else None, tree)

    def init(params):
        shapes = jax.eval_shape(tx.init, params)
        return jax.vmap(tx.init, in_axes=(axes(params),), out_axes=axes(shapes))(params)

    def update(gradients, state, params=None):
        of_both = axes(gradients), axes(state)
        return jax.vmap(tx.update, in_axes=(*of_both, axes(params)), out_axes=of_both)(gradients, state, params)

    return optax.GradientTransformation(init, update)


def keep_unless(good: jax.Array, new: optax.OptState, old: optax.OptState) -> optax.OptState:
    """`new` where `good`, else `old` but for the schedule's count, which goes on: it is the position in the data."""

    def choose(new, old):
        return new if isinstance(new, optax.ScaleByScheduleState) else jnp.where(good, new, old)

    return jax.tree.map(choose, new, old, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState))


def clip(gradients, norm: jax.Array, limit: float):
    """Scales by min(1, limit / (norm + 1e-6)), the coefficient of torch's clip_grad_norm_."""
    scale = jnp.minimum(1.0, limit / (norm + 1e-6))
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
