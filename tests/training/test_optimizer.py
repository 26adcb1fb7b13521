"""AdamW with its first moment in bfloat16, against float64 NumPy; Adafactor against that of optax."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from alignx_jax import sharding
from alignx_jax.config import OptimizerConfig
from alignx_jax.training import optimizer, state
from alignx_jax.training.checkpoints import Checkpoints

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
    tx = optimizer.build(settings, STEPS)
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
    tx = optimizer.build(settings, STEPS)
    weights = jnp.ones(64)
    state = tx.init(weights)
    for n, gradient in enumerate(gradients()):
        updates, new = tx.update(np.full_like(gradient, np.nan) if n == 7 else gradient, state, weights)
        good = jnp.asarray(n != 7)
        weights = jnp.where(good, weights + updates, weights)
        state = optimizer.keep_unless(good, new, state)
    np.testing.assert_allclose(weights, dense(np.float32, without=7), rtol=2e-6)


ADAFACTOR = OptimizerConfig(kind="adafactor", learning_rate=1e-2, warmup_steps=0)
# Of a decoder: factored by D and F, by D and h for each head, by V and D; not factored.
SHAPES = {"gate": (3, 128, 160), "query": (3, 144, 2, 128), "attention_norm": (3, 128), "key": (3, 128, 4, 16)}


def parameters(seed: int, scale: float = 1.0) -> state.Params:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        sizes = scale * 10.0 ** rng.uniform(-3, 0, shape[:1] + (1,) * (len(shape) - 1))
        return jnp.asarray(rng.normal(size=shape) * sizes, jnp.float32)

    layers = {name: normal(*shape) for name, shape in SHAPES.items()}
    return {"decoder": {"layers": layers, "embedding": normal(256, 128), "norm": normal(128)}}


def adafactor_steps(params: state.Params, settings: OptimizerConfig = ADAFACTOR, steps: int = 3, mesh=None):
    tx = optimizer.build(settings, STEPS)
    now = tx.init(params) if mesh is None else state.create(params, tx, mesh).optimizer
    for n in range(steps):
        updates, now = jax.jit(tx.update)(parameters(n + 1, 5.0), now, params)
        params = jax.jit(optax.apply_updates)(params, updates)
    return params, now


def test_adafactor_is_that_of_optax_for_each_layer_by_itself():
    def alone(params: state.Params) -> state.Params:
        layers = params["decoder"]["layers"]
        return params["decoder"] | {"layers": [{k: x[n] for k, x in layers.items()} for n in range(3)]}

    rate = optimizer.schedule(ADAFACTOR, STEPS)
    tx = optax.adafactor(rate, multiply_by_parameter_scale=False)
    expected = alone(parameters(0))
    now = tx.init(expected)
    for n in range(3):
        updates, now = jax.jit(tx.update)(alone(parameters(n + 1, 5.0)), now, expected)
        expected = optax.apply_updates(expected, updates)
    got, _ = adafactor_steps(parameters(0))
    for a, b, before in zip(*map(jax.tree.leaves, (alone(got), expected, alone(parameters(0)))), strict=True):
        change = np.linalg.norm(np.asarray(b) - before)
        assert change > 0 and np.linalg.norm(np.asarray(a) - b) < 1e-5 * change


def test_adafactor_keeps_means_over_rows_and_columns_alone():
    (factors, _), *_ = adafactor_steps(parameters(0))[1]
    layers = {k: getattr(factors, k)["decoder"]["layers"] for k in ("v_row", "v_col", "v")}
    assert {k: x["gate"].shape for k, x in layers.items()} == {"v_row": (3, 128), "v_col": (3, 160), "v": (3, 1)}
    assert {k: x["query"].shape for k, x in layers.items()} == {"v_row": (3, 2, 128), "v_col": (3, 144, 2), "v": (3, 1)}
    assert layers["v"]["attention_norm"].shape == (3, 128), "of a vector every square"


def test_weight_decay_of_adafactor_is_multiplied_by_the_rate_as_that_of_adamw():
    with_decay, without = (
        adafactor_steps(parameters(0), dataclasses.replace(ADAFACTOR, weight_decay=decay), steps=1)[0]
        for decay in (0.1, 0.0)
    )
    for a, b, x in zip(*map(jax.tree.leaves, (with_decay, without, parameters(0))), strict=True):
        np.testing.assert_allclose(a, b - 1e-2 * 0.1 * x, rtol=1e-5, atol=1e-8)


def test_a_factored_state_is_sharded_with_its_parameters_and_restored_on_another_mesh(tmp_path):
    expected, _ = adafactor_steps(parameters(0))
    mesh = sharding.make_mesh("4x2")
    place = functools.partial(jax.device_put, parameters(0))
    got, now = adafactor_steps(place(sharding.parameter_shardings(parameters(0), mesh)), mesh=mesh)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, expected)
    factors = state.abstract(parameters(0), optimizer.build(ADAFACTOR, STEPS), mesh).optimizer[0][0]
    of_row, of_column = factors.v_row["decoder"], factors.v_col["decoder"]
    assert {x.sharding.spec for x in (of_row["layers"]["gate"], of_row["embedding"])} == {
        sharding.P(None, "data"),  # without F
        sharding.P("data"),  # without V
    }
    assert of_column["layers"]["gate"].sharding.spec == sharding.P(None, "model")

    def whole(optimizer_state, params, mesh):
        step = jax.device_put(jnp.int32(3), sharding.NamedSharding(mesh, sharding.P()))
        return state.TrainState(step=step, params=params, optimizer=optimizer_state)

    checkpoints = Checkpoints(tmp_path, writable=True)
    checkpoints.save(3, whole(now, got, mesh), None)
    checkpoints.wait()
    other = sharding.make_mesh("2x2")
    like = state.abstract(parameters(0), optimizer.build(ADAFACTOR, STEPS), other)
    restored = Checkpoints(tmp_path).restore(3, like)
    jax.tree.map(np.testing.assert_array_equal, restored.optimizer, now)
    assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, restored.optimizer, like.optimizer))
