"""AdamW with the published schedule; clipping with the published coefficient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from alignx_jax.config import OptimizerConfig


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by update, counted from 0: linear from exactly 0 to the peak, then linear to 0 at `steps`.

    Written out because the interpolation of `optax.linear_schedule` loses digits of a small rate to cancellation.
    """
    warmup = config.warmup_steps

    def rate(count: jax.Array) -> jax.Array:
        falling = jnp.maximum((steps - count) / max(steps - warmup, 1), 0.0)
        return config.learning_rate * jnp.where(count < warmup, count / max(warmup, 1), falling)

    return rate


def adamw(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW on all parameters, norms and biases included, as published."""
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


def keep_unless(good: jax.Array, new: optax.OptState, old: optax.OptState) -> optax.OptState:
    """`new` where `good`, else `old` but for the schedule's count, which goes on: it is the position in the data."""

    def choose(new, old):
        return new if isinstance(new, optax.ScaleByScheduleState) else jnp.where(good, new, old)

    return jax.tree.map(choose, new, old, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState))


def clip(gradients, norm: jax.Array, limit: float):
    """Scales by min(1, limit / (norm + 1e-6)), the coefficient of torch's clip_grad_norm_."""
    scale = jnp.minimum(1.0, limit / (norm + 1e-6))
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
