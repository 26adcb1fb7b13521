"""AdamW with its first moment in bfloat16, against float64 NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from alignx_jax.config import OptimizerConfig
from alignx_jax.training import optimizer

SETTINGS = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.1, moment_dtype="bfloat16")
STEPS = 20


def gradients() -> np.ndarray:
    """[steps,n], of sizes from 1e-4 to 1."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(STEPS, 64)) * 10.0 ** rng.uniform(-4, 0, 64)).astype(np.float32)


def dense(moment_dtype, without: int | None = None) -> np.ndarray:
    """Weights after all steps (Loshchilov and Hutter, arXiv 1711.05101), the first moment rounded after each.

    Args:
      without: a step that there is only in the schedule.
    """
    weights, mean, square, updates = np.ones(64), np.zeros(64, moment_dtype), np.zeros(64), 0
    for n, gradient in enumerate(gradients().astype(np.float64)):
        if n == without:
            continue
        updates += 1
        fresh = SETTINGS.beta1 * mean.astype(np.float64) + (1 - SETTINGS.beta1) * gradient
        square = SETTINGS.beta2 * square + (1 - SETTINGS.beta2) * gradient**2
        update = fresh / (1 - SETTINGS.beta1**updates)
        update /= np.sqrt(square / (1 - SETTINGS.beta2**updates)) + SETTINGS.epsilon
        rate = SETTINGS.learning_rate * (STEPS - n) / STEPS
        weights = weights - rate * (update + SETTINGS.weight_decay * weights)
        mean = fresh.astype(moment_dtype)
    return weights


def trained(settings: OptimizerConfig) -> tuple[np.ndarray, optax.OptState]:
    tx = optimizer.adamw(settings, STEPS)
    weights = jnp.ones(64)
    state = tx.init(weights)
    for gradient in gradients():
        updates, state = jax.jit(tx.update)(jnp.asarray(gradient), state, weights)
        weights = optax.apply_updates(weights, updates)
    return np.asarray(weights), state


def test_the_first_moment_is_kept_in_bfloat16_and_nothing_else_is():
    _, state = trained(SETTINGS)
    adam = state[0]
    assert (adam.mu.dtype, adam.nu.dtype) == (jnp.bfloat16, jnp.float32)
    _, state = trained(dataclasses.replace(SETTINGS, moment_dtype="float32"))
    assert state[0].mu.dtype == jnp.float32


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_the_weights_are_those_of_a_rounded_moment(moment_dtype):
    weights, _ = trained(dataclasses.replace(SETTINGS, moment_dtype=moment_dtype))
    rounded, exact = dense(ml_dtypes.bfloat16), dense(np.float64)
    far = np.abs(rounded - exact).max()  # what rounding itself changes
    ours = rounded if moment_dtype == "bfloat16" else exact
    assert np.abs(weights - ours).max() < far / 3
    assert far < 0.01 * np.abs(exact - 1).max()


def test_an_update_left_out_uses_up_its_place_in_the_schedule_alone():
    settings = dataclasses.replace(SETTINGS, moment_dtype="float32")
    tx = optimizer.adamw(settings, STEPS)
    weights = jnp.ones(64)
    state = tx.init(weights)
    for n, gradient in enumerate(gradients()):
        updates, new = tx.update(np.full_like(gradient, np.nan) if n == 7 else gradient, state, weights)
        good = jnp.asarray(n != 7)
        weights = jnp.where(good, weights + updates, weights)
        state = optimizer.keep_unless(good, new, state)
    np.testing.assert_allclose(weights, dense(np.float32, without=7), rtol=2e-6)
