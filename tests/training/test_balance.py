"""How the losses stand to each other, against gradients taken one by one and dense NumPy."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rich.console import Console

from alignx_jax import sharding
from alignx_jax.config import ObjectiveConfig
from alignx_jax.training import balance, step
from tests.conftest import ROOT
from tests.training.published import model, recipe
from tests.training.test_step import random_rows


@pytest.fixture(scope="module")
def mesh():
    mesh = sharding.make_mesh("1x1")
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture(scope="module")
def weighed(mesh):
    """Of the first of two micro-batches; sentences recur, and one slot's pair has the source of another."""
    folder = ROOT / "tests/data/reference/gqa_three_languages"
    m, rows = model(folder / "model", mesh, jnp.float32), random_rows(np.random.default_rng(0))
    plan = recipe(2, 4, jnp.float32, objective=ObjectiveConfig(), group_pairs=24, accumulation=2)
    values = balance.compiled(m.graph, plan)(m.params, rows)
    first = jax.tree.map(lambda x: jnp.asarray(x)[:4], rows)
    return m, first, dataclasses.replace(plan, accumulation=1), {k: float(v) for k, v in values.items()}


def test_each_gradient_by_itself(weighed):
    m, rows, plan, values = weighed
    weights = step.loss_weights(rows, plan)
    norms = {}
    for name, factor in plan.weights.items():

        def loss(params, name=name, factor=factor):
            return factor * step.loss_sums(nnx.merge(m.graph, params), rows, plan)[name] / weights[name]

        value, gradient = jax.jit(jax.value_and_grad(loss))(m.params)
        assert factor * values[name] == pytest.approx(float(value), rel=1e-5)
        norms[name] = float(optax.tree.norm(gradient))
        assert values[f"gradient/{name}"] == pytest.approx(norms[name], rel=1e-4)
    assert values["loss"] == pytest.approx(sum(f * values[k] for k, f in plan.weights.items()), rel=1e-5)
    for name, norm in norms.items():
        assert values[f"share/{name}"] == pytest.approx(norm / sum(norms.values()), rel=1e-4)


def test_chance(weighed):
    _, rows, _, values = weighed
    valid = np.asarray(rows.valid)
    ids = (rows.source_hash, rows.target_hash, rows.line_hash)
    sentences = list(zip(*(np.asarray(x)[valid] for x in ids), strict=True))
    met = [sum(not {*one} & {*other} for other in sentences) + 1 for one in sentences]
    assert min(met) < len(sentences), "the rows hold repeated sentences"
    assert values["chance/contrastive"] == pytest.approx(np.mean(np.log(met)) / 2, rel=1e-6)
    languages = np.concatenate([np.asarray(rows.source_language)[valid], np.asarray(rows.target_language)[valid]])
    same = np.mean(languages[:, None] == languages[None, :])
    entropy = -same * np.log(same) - (1 - same) * np.log(1 - same)
    assert values["chance/language_matching"] == pytest.approx(entropy, rel=1e-6)
    assert values["chance/next_token"] == pytest.approx(np.log(320), rel=1e-6)


def test_cosines_are_those_that_the_loss_sees(weighed):
    m, rows, plan, values = weighed
    _, pooled = step.forward(nnx.merge(m.graph, m.params), rows, plan)
    pairs = step.pairs(pooled, rows, plan)
    valid = np.asarray(pairs.valid_GxN)[0]
    x = np.asarray(pairs.aligned_Gx2NxD, np.float64)[0]
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    source, target = (of[valid] for of in np.split(unit, 2))
    cosines = source @ target.T
    sentences = list(zip(*(np.asarray(h)[0][valid] for h in pairs.ids), strict=True))
    other = np.array([[not {*one} & {*another} for another in sentences] for one in sentences])
    assert values["cosine/translations"] == pytest.approx(np.diag(cosines).mean(), rel=1e-4)
    assert values["cosine/others"] == pytest.approx(cosines[other].mean(), rel=1e-3, abs=1e-6)
    assert values["cosine/deviation"] == pytest.approx(cosines[other].std(), rel=1e-4)


VALUES = {
    "next_token": 3.7,
    "contrastive": 1.79,
    "language_matching": 5.1,
    **{"chance/next_token": 12.5, "chance/contrastive": 1.8, "chance/language_matching": 0.6},
    **{"gradient/next_token": 9.0, "gradient/contrastive": 0.01, "gradient/language_matching": 160.0},
    **{"share/next_token": 0.053, "share/contrastive": 0.00006, "share/language_matching": 0.947},
    **{"cosine/translations": 0.997, "cosine/others": 0.994, "cosine/deviation": 0.002},
}
"""As the published losses are on Gemma 3 270M."""
HEALTHY = VALUES | {
    "contrastive": 1.4,
    "cosine/deviation": 0.1,
    **{"share/next_token": 0.6, "share/contrastive": 0.3, "share/language_matching": 0.1},
}


def test_what_cannot_act_and_what_drowns_the_rest_is_said_with_the_flag_that_helps():
    raw = recipe(11, 18, jnp.float32, objective=ObjectiveConfig(standardize="none"))
    flat, drowning = balance.advice(VALUES, raw)
    assert "layer 11 are nearly equal" in flat and "0.01% of the gradient; give --objective.standardize=batch" in flat
    assert drowning == (
        "matching drowns the other losses: it has 95% of the gradient; give --objective.standardize=batch"
    )
    ours = recipe(11, 18, jnp.float32, objective=ObjectiveConfig())
    flat, drowning = balance.advice(VALUES, ours)
    assert flat.endswith("give another --objective.contrastive.layer")
    assert drowning.endswith("give a smaller --objective.language-matching.weight than 0.4")
    assert balance.advice(HEALTHY, raw) == [] == balance.advice(HEALTHY, ours)
    at_chance_but_not_flat = HEALTHY | {"contrastive": 1.79}
    assert balance.is_at_chance(at_chance_but_not_flat) and balance.advice(at_chance_but_not_flat, ours) == []
    assert balance.is_at_chance(VALUES) and not balance.is_at_chance(HEALTHY)


def test_equal_states_are_told_from_a_batch_without_negatives():
    assert balance.is_dead(VALUES | {"gradient/contrastive": 0.0}) and not balance.is_dead(VALUES)
    assert not balance.is_dead(VALUES | {"gradient/contrastive": 0.0, "chance/contrastive": 0.0})
    assert not balance.is_dead({"share/next_token": 1.0}), "no contrastive loss"


def test_the_table_has_a_line_for_each_loss():
    console = Console(file=io.StringIO(), width=80)
    console.print(balance.table(VALUES))
    lines = console.file.getvalue().splitlines()
    (matching,) = (line for line in lines if "matching" in line)
    assert [part.strip() for part in matching.strip("│ ").split("│")] == ["matching", "5.1", "0.6", "160", "94.7%"]
    assert max(map(len, lines)) <= 80 and sum("next-token" in line for line in lines) == 1
    apart = (
        "mean cosine of translations 0.997, of other sentences 0.994 with a deviation of 0.002: 1.5 deviations apart"
    )
    assert balance.cosines(VALUES, 11) == f"layer 11: {apart}"
