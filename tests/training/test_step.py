"""The step against the published losses, gradients and optimizer runs; and against itself on other meshes."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from alignx_jax import sharding
from alignx_jax.config import ContrastiveConfig, LanguageMatchingConfig, ObjectiveConfig, OptimizerConfig
from alignx_jax.data import packing
from alignx_jax.training import optimizer, state, step
from tests.training.published import batch, model, named, recipe, stack

CASES = {"gqa_three_languages": 2, "tied_llama3_rope": 3}
LOSSES = {"loss": "loss", "next_token": "lm_loss", "contrastive": "contrastive_loss"}
LOSSES |= {"language_matching": "language_matching_loss"}
TOLERANCE = {jnp.float32: 1e-5, jnp.float64: 1e-10}


@pytest.fixture(params=[jnp.float32, jnp.float64], ids=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == jnp.float64):
        yield request.param


@pytest.fixture
def mesh():
    mesh = sharding.make_mesh("1x1")
    with jax.set_mesh(mesh):
        yield mesh


def gradients(m, rows, plan):
    return jax.jit(functools.partial(step.gradients, graph=m.graph, recipe=plan))(m.params, rows)


def relative(got, expected) -> float:
    """Norm of the difference over the norm."""
    return float(np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("case", CASES)
def test_published_losses_and_gradients(reference, mesh, dtype, case):
    folder = reference / case
    expected = np.load(folder / "masked_bos_f64.npz")
    m = model(folder / "model", mesh, dtype)
    got, metrics = gradients(m, batch(np.load(folder / "inputs.npz")), recipe(CASES[case], 4, dtype))
    for ours, theirs in LOSSES.items():
        np.testing.assert_allclose(metrics[ours], expected[theirs], rtol=TOLERANCE[dtype])
    grads = named(got, 320)
    assert set(grads) == {k.removeprefix("grad/") for k in expected if k.startswith("grad/")}
    for name, gradient in grads.items():
        assert relative(gradient, expected[f"grad/{name}"]) < TOLERANCE[dtype], name


@pytest.mark.parametrize(
    "case", ["filter_2_of_6", "filter_to_1", "target_of_2_tokens", "labels_response_only", "same_langs"]
)
def test_published_edge_cases(reference, mesh, dtype, case):
    folder = reference / "gqa_three_languages"
    expected = json.loads((folder / "edge_cases.json").read_text())[case]["f64"]
    inputs = np.load(folder / "edge_cases.npz")
    labels = inputs[f"{case}/labels"]  # as published: BOS is predicted from the last position of the padding
    m = model(folder / "model", mesh, dtype)
    _, metrics = gradients(m, batch(inputs, f"{case}/", labels), recipe(2, 4, dtype))
    compared = LOSSES if case == "labels_response_only" else ("contrastive", "language_matching")
    for ours in compared:  # elsewhere BOS is predicted from a masked position
        np.testing.assert_allclose(metrics[ours], expected[LOSSES[ours]], rtol=TOLERANCE[dtype], atol=1e-12)


@pytest.mark.parametrize("run", ["train_five_steps", "train_five_steps_with_decay"])
def test_published_optimizer_steps(shared, mesh, dtype, run):
    folder = shared / "reference" / run
    inputs = np.load(folder / "inputs.npz")
    expected = np.load(folder / ("f64.npz" if dtype == jnp.float64 else "f32.npz"))
    settings, steps = {
        "train_five_steps": (OptimizerConfig(learning_rate=1e-2, warmup_steps=100), 1000),
        "train_five_steps_with_decay": (OptimizerConfig(learning_rate=1e-3, warmup_steps=2), 5),
    }[run]
    m = model(folder / "model", mesh, dtype)
    plan = recipe(m.align_layer, 4, dtype, accumulation=2, group_pairs=4)
    now = state.create(m.params, optimizer.build(settings, steps), mesh)
    update = step.compiled_for(now, graph=m.graph, recipe=plan, config=settings)
    for k in range(5):
        rows = stack(*(batch(inputs, f"micro{2 * k + i}/", equal_weight=4) for i in range(2)))
        now, metrics = update(now, rows, steps)
        np.testing.assert_allclose(metrics["loss"], expected["micro_loss"][2 * k : 2 * k + 2].mean(), rtol=1e-5)
        np.testing.assert_allclose(metrics["gradient_norm"], expected["grad_norm"][k], rtol=1e-5)
        np.testing.assert_allclose(metrics["learning_rate"], expected["lr"][k], rtol=1e-6, atol=1e-12)
    for name, final in named(now.params, 320).items():
        assert relative(final, expected[f"final/{name}"]) < 1e-5, name


def test_published_schedule(reference):
    expected = np.load(reference / "learning_rates_warmup100_total260_lr2e-6.npz")["lr"]
    rate = optimizer.schedule(OptimizerConfig(learning_rate=2e-6, warmup_steps=100), 260)
    np.testing.assert_allclose([rate(k) for k in range(260)], expected, rtol=1e-6, atol=1e-13)


def test_published_clipping_coefficient():
    import torch

    gradient = np.random.default_rng(0).normal(size=(7,)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.zeros(7))
    theirs.grad = torch.tensor(gradient)
    torch.nn.utils.clip_grad_norm_([theirs], 0.5)
    ours = optimizer.clip({"w": jnp.asarray(gradient)}, optax.tree.norm({"w": gradient}), 0.5)
    np.testing.assert_allclose(ours["w"], theirs.grad, rtol=1e-6)


def random_rows(rng, rows=8, length=24, slots=3, vocabulary=320) -> step.Batch:
    """Packed rows of up to three examples each: BOS, source, target, EOS."""
    arrays = {
        name: np.zeros((rows, length), np.int32)
        for name in ("tokens", "positions", "segments", "source_span", "target_span")
    }
    weights = np.zeros((rows, length), np.float32)
    valid = np.zeros((rows, slots), bool)
    for r in range(rows):
        start = 0
        for slot in range(1, rng.integers(1, slots + 1) + 1):
            end = start + int(rng.integers(6, 9))
            arrays["tokens"][r, start:end] = rng.integers(3, vocabulary, end - start)
            arrays["positions"][r, start:end] = np.arange(end - start)
            arrays["segments"][r, start:end] = slot
            arrays["source_span"][r, start + 1 : start + 3] = slot
            arrays["target_span"][r, start + 3 : end - 1] = slot
            weights[r, start + 1 : end] = 1
            valid[r, slot - 1] = True
            start = end
    ids = rng.integers(0, 60, (3, rows, slots)).astype(np.int32)
    languages = rng.integers(0, 3, (2, rows, slots)).astype(np.int32)
    return step.Batch(
        **arrays,
        loss_weights=weights,
        source_language=languages[0],
        target_language=languages[1],
        source_hash=ids[0],
        target_hash=ids[1],
        line_hash=ids[2],
        valid=valid,
    )


def three_steps(folder, spec: str, rows, **changes):
    """Parameters and metrics after three steps on a mesh, from the reference weights.

    In float64: Adam divides a gradient by its own size, so that float32 noise in one that is nearly 0 becomes a step.
    """
    mesh = sharding.make_mesh(spec)
    with jax.enable_x64(True), jax.set_mesh(mesh):
        m = model(folder / "model", mesh, jnp.float64)
        groups = sharding.data_shards(mesh)
        accumulation = changes.pop("accumulation", 1)
        changes = {"group_pairs": 24 // groups, "groups": groups, "accumulation": accumulation} | changes
        plan = recipe(2, 4, jnp.float64, **changes)
        settings = OptimizerConfig(learning_rate=1e-3, warmup_steps=1)
        now = state.create(m.params, optimizer.build(settings, 10), mesh)
        update = step.compiled_for(now, graph=m.graph, recipe=plan, config=settings)
        for _ in range(3):
            placed = jax.tree.map(lambda x: sharding.place_rows(np.asarray(x), mesh), rows)
            now, metrics = update(now, placed, 10)
        return jax.device_get(now.params), jax.device_get(metrics)


def agree(one, other, tolerance):
    chex.assert_trees_all_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.fixture
def folder(reference):
    return reference / "gqa_three_languages"


@pytest.fixture
def packed_rows():
    return random_rows(np.random.default_rng(0))


@pytest.mark.parametrize("standardize", ["batch", "none"])
def test_every_mesh_computes_the_same_steps(folder, packed_rows, standardize):
    objective = ObjectiveConfig(standardize=standardize)
    one_device = three_steps(folder, "1x1", packed_rows, objective=objective)
    for spec in ("8x1", "4x2", "2x2x2"):
        agree(one_device, three_steps(folder, spec, packed_rows, objective=objective), 1e-10)


def test_accumulation_is_one_big_batch(folder, packed_rows):
    """With negatives from one's own micro-batch the groups are the same: 2 devices, or 2 micro-batches."""
    objective = ObjectiveConfig(negatives="micro-batch")
    at_once = three_steps(folder, "2x1", packed_rows, objective=objective)
    in_turn = three_steps(folder, "1x1", packed_rows, objective=objective, accumulation=2, group_pairs=12)
    agree(at_once, in_turn, 1e-10)


def sentences_apart(rows: int) -> step.Batch:
    """Rows of two prompts, each followed by its two sentences in segments of their own (`--data.spans=separate`)."""
    rng = np.random.default_rng(4)
    tokens = rng.integers(3, 320, (2 * rows, 18))
    languages, hashes = rng.integers(0, 3, (2 * rows, 2)), rng.integers(0, 40, (2 * rows, 2))
    made = [
        packing.PackedExample(
            tokens[n], np.arange(18) < 9, (10, 13), (14, 18), tuple(languages[n]), (*hashes[n], hashes[n, 0]), (9, 13)
        )
        for n in range(2 * rows)
    ]
    return stack(*(jax.tree.map(lambda x: x[None], packing.assemble(made[n::rows], 40, 2)) for n in range(rows)))


@pytest.mark.parametrize(("spec", "spans"), [("1x1", "in-prompt"), ("4x2", "separate")])
def test_negatives_of_the_whole_step_are_those_of_one_big_batch(folder, spec, spans):
    """Parameters and metrics after three steps, in float64."""
    rows = sentences_apart(16) if spans == "separate" else random_rows(np.random.default_rng(5), rows=16)
    most = rows.valid.reshape(4 if spec == "4x2" else 1, -1).sum(axis=1).max()
    big = three_steps(folder, spec, rows, objective=ObjectiveConfig(), group_pairs=most)
    whole_step = ObjectiveConfig(negatives="step")
    agree(big, three_steps(folder, spec, rows, objective=whole_step, accumulation=4, group_pairs=most), 1e-10)


def test_other_micro_batches_matter_and_so_do_their_duplicates(folder, mesh, packed_rows):
    m = model(folder / "model", mesh, jnp.float32)

    def contrastive(negatives: str, duplicates: str = "mask") -> float:
        objective = ObjectiveConfig(negatives=negatives, duplicates=duplicates)
        plan = recipe(2, 4, jnp.float32, objective=objective, accumulation=4, group_pairs=24)
        return float(gradients(m, packed_rows, plan)[1]["contrastive"])

    assert contrastive("global") < contrastive("step") < contrastive("step", "keep")


@pytest.mark.parametrize("off", ["contrastive", "language_matching"])
def test_one_pair_loss_alone_meets_the_whole_step(folder, packed_rows, off):
    weight = {off: {"contrastive": ContrastiveConfig, "language_matching": LanguageMatchingConfig}[off](weight=0.0)}
    big, in_turn = (
        three_steps(folder, "2x1", packed_rows, objective=ObjectiveConfig(negatives=n, **weight), accumulation=a)
        for n, a in (("global", 1), ("step", 4))
    )
    agree(big, in_turn, 1e-10)


def test_validation_meets_what_training_meets(folder, mesh, packed_rows):
    m = model(folder / "model", mesh, jnp.float32)

    def validated(negatives: str, accumulation: int):
        plan = recipe(2, 4, jnp.float32, objective=ObjectiveConfig(negatives=negatives), accumulation=accumulation)
        plan = dataclasses.replace(plan, group_pairs=24)
        return jax.jit(functools.partial(step.validation_sums, graph=m.graph, recipe=plan))(m.params, packed_rows)

    agree(validated("global", 1), validated("step", 4), 1e-5)


def test_accumulation_of_the_next_token_loss_alone(folder, packed_rows):
    off = ObjectiveConfig(ContrastiveConfig(weight=0.0), LanguageMatchingConfig(weight=0.0))
    whole, split = (three_steps(folder, "2x1", packed_rows, objective=off, accumulation=a) for a in (1, 4))
    agree(whole, split, 1e-10)


def test_packed_is_unpacked(folder, mesh, packed_rows):
    """The same examples one a row: the same losses and gradients."""
    m = model(folder / "model", mesh, jnp.float32)
    alone = []
    for r, s in zip(*np.nonzero(packed_rows.valid), strict=True):
        where = np.nonzero(packed_rows.segments[r] == s + 1)[0]

        def cut(x, where=where, r=r):
            out = np.zeros((1, x.shape[1]), x.dtype)
            out[0, : len(where)] = x[r, where]
            return out

        one = {f.name: getattr(packed_rows, f.name) for f in dataclasses.fields(packed_rows)}
        one = {k: cut(v) if v.shape[1] == 24 else v[r : r + 1, s : s + 1] for k, v in one.items()}
        for k in ("segments", "source_span", "target_span"):
            one[k] = (one[k] > 0).astype(np.int32)
        alone.append(step.Batch(**one))
    plan = recipe(2, 4, jnp.float32, group_pairs=24, objective=ObjectiveConfig())
    assert len(alone) > len(packed_rows.valid)
    agree(gradients(m, packed_rows, plan), gradients(m, stack(*alone), plan), 1e-5)


def test_one_program_for_runs_of_any_length(folder, mesh, packed_rows):
    """With one step of warm-up only the third update differs: 2/3 of the rate in a run of 4 steps, 8/9 in 10."""
    m = model(folder / "model", mesh, jnp.float32)
    static = {"graph": m.graph, "recipe": recipe(2, 4, jnp.float32, group_pairs=24)}
    settings = OptimizerConfig(learning_rate=1e-3, warmup_steps=1)
    start = state.create(m.params, optimizer.build(settings, 1), mesh)
    update = jax.jit(functools.partial(step.train_step, config=settings, **static))
    update = update.lower(start, packed_rows, jnp.int32(4)).compile()
    changes = []
    for steps, rate in ((4, 1e-3 * 2 / 3), (10, 1e-3 * 8 / 9)):
        now = start
        for _ in range(3):
            before = now.params
            now, metrics = update(now, packed_rows, jnp.int32(steps))
        np.testing.assert_allclose(metrics["learning_rate"], rate, rtol=1e-6)
        changes.append(jax.tree.map(jnp.subtract, now.params, before))
    agree(jax.tree.map(lambda x: x * 4 / 3, changes[0]), changes[1], 1e-6)


def test_sentences_apart_know_nothing_of_their_prompt(folder, mesh):
    """The pair losses are those of the sentences alone; the next-token loss is that of the prompts alone."""
    m = model(folder / "model", mesh, jnp.float32)
    plan = recipe(2, 4, jnp.float32, group_pairs=4, objective=ObjectiveConfig())

    def rows(prompt_seed: int, sentence_seed: int) -> step.Batch:
        prompts, sentences = (
            np.random.default_rng(seed).integers(3, 320, (4, 9)) for seed in (prompt_seed, sentence_seed)
        )
        made = [
            packing.PackedExample(
                np.concatenate([prompts[n], sentences[n]]),
                np.arange(18) < 9,
                source=(10, 13),
                target=(14, 18),
                languages=(0, n % 2 + 1),
                hashes=(n, n + 9, n),
                alone=(9, 13),
            )
            for n in range(4)
        ]
        return stack(*(jax.tree.map(lambda x: x[None], packing.assemble(made[n : n + 2], 40, 2)) for n in (0, 2)))

    def losses(*seeds: int) -> dict[str, float]:
        return {k: float(v) for k, v in gradients(m, rows(*seeds), plan)[1].items()}

    one, other_prompts, other_sentences = losses(0, 1), losses(2, 1), losses(0, 3)
    for name in ("contrastive", "language_matching"):
        assert one[name] == pytest.approx(other_prompts[name], rel=1e-6)
        assert one[name] != pytest.approx(other_sentences[name], rel=1e-3)
    assert one["next_token"] == pytest.approx(other_sentences["next_token"], rel=1e-6)
    assert one["next_token"] != pytest.approx(other_prompts["next_token"], rel=1e-3)
    assert one["tokens"] == 4 * 8


def test_auxiliary_losses_reach_the_layers_they_should_and_no_others(folder, mesh, packed_rows):
    m = model(folder / "model", mesh, jnp.float32)

    def reached(name):
        def loss(params):
            sums = step.loss_sums(nnx.merge(m.graph, params), rows, plan)
            return sums[name]

        plan = recipe(2, 4, jnp.float32, group_pairs=24)
        rows = jax.tree.map(jnp.asarray, packed_rows)
        return jax.jit(jax.grad(loss))(m.params)

    contrastive, matching = reached("contrastive"), reached("language_matching")
    for name, gradient in contrastive["decoder"]["layers"].items():
        assert np.abs(gradient[:2]).sum(axis=tuple(range(1, gradient.ndim))).all(), f"{name} of the layers below"
        assert not np.abs(gradient[2:]).any(), f"{name} of the layers above"
    for name in ("norm", "output"):
        assert not np.abs(contrastive["decoder"][name]).any(), name
        assert np.abs(matching["decoder"][name]).any() == (name == "norm"), name
    assert not any(np.abs(g).any() for g in jax.tree.leaves(contrastive["classifier"]))
    assert all(np.abs(g).any() for g in jax.tree.leaves(matching["classifier"]))
    assert np.abs(contrastive["decoder"]["embedding"]).any() and np.abs(matching["decoder"]["embedding"]).any()
    for name, gradient in matching["decoder"]["layers"].items():
        assert np.abs(gradient).sum(axis=tuple(range(1, gradient.ndim))).all(), name


def test_reach_is_the_gradient_at_the_pooled_states(folder, mesh, packed_rows):
    m = model(folder / "model", mesh, jnp.float32)
    plan = recipe(2, 4, jnp.float32, group_pairs=24)
    _, metrics = gradients(m, packed_rows, plan)
    assert metrics["reach/contrastive"] > 0 and metrics["reach/language_matching"] > 0
    alone = packed_rows.valid & (np.arange(24).reshape(8, 3) == np.flatnonzero(packed_rows.valid)[0])
    _, metrics = gradients(m, dataclasses.replace(packed_rows, valid=alone), plan)
    assert metrics["contrastive"] == 0 and metrics["reach/contrastive"] == 0, "one pair has no negatives"


@pytest.mark.parametrize("negatives", ["global", "step"])
def test_reach_has_any_scale(folder, mesh, packed_rows, negatives):
    """A loss that is learnt to 1e-21 has a gradient whose square is 0 in float32."""
    m = model(folder / "model", mesh, jnp.float32)

    def reach(factor: float) -> np.ndarray:
        objective = ObjectiveConfig(
            chunk=13,
            negatives=negatives,
            contrastive=ContrastiveConfig(weight=factor),
            language_matching=LanguageMatchingConfig(weight=factor),
        )
        plan = recipe(2, 4, jnp.float32, group_pairs=24, accumulation=2, objective=objective)
        _, metrics = gradients(m, packed_rows, plan)
        return np.array([metrics["reach/contrastive"], metrics["reach/language_matching"]])

    np.testing.assert_allclose(reach(1e-25) * 1e25, reach(1.0), rtol=1e-5)


def test_rows_without_pairs_and_empty_batches_are_harmless(folder, mesh, packed_rows):
    m = model(folder / "model", mesh, jnp.float32)
    nothing = jax.tree.map(np.zeros_like, packed_rows)
    grads, metrics = gradients(m, nothing, recipe(2, 4, jnp.float32))
    assert all(v == 0 for v in metrics.values()), metrics
    assert not any(np.abs(g).any() for g in jax.tree.leaves(grads))


def test_stage_2_is_the_same_step_with_the_next_token_loss_alone(folder, mesh, packed_rows):
    m = model(folder / "model", mesh, jnp.float32)
    _, with_pairs = gradients(m, packed_rows, recipe(2, 4, jnp.float32, group_pairs=24))
    _, without = gradients(m, packed_rows, recipe(2, 4, jnp.float32, pairs=False))
    assert set(without) == {"loss", "next_token", "tokens", "pairs"}
    np.testing.assert_allclose(without["loss"], with_pairs["next_token"], rtol=1e-6)


def test_bfloat16_compute_is_close_to_float32_with_float32_gradients(folder, mesh, packed_rows):
    m = model(folder / "model", mesh, jnp.float32)
    exact, losses = gradients(m, packed_rows, recipe(2, 4, jnp.float32, group_pairs=24))
    rough, rough_losses = gradients(m, packed_rows, recipe(2, 4, jnp.bfloat16, group_pairs=24))
    for name in LOSSES:
        assert rough_losses[name].dtype == jnp.float32
        np.testing.assert_allclose(rough_losses[name], losses[name], rtol=2e-2)
    for a, b in zip(jax.tree.leaves(rough), jax.tree.leaves(exact), strict=True):
        assert a.dtype == jnp.float32 and 0 < relative(a, np.asarray(b)) < 0.1
