"""Training with adapters: against PEFT and PyTorch, on every mesh, and a whole stage with what it leaves behind."""

import dataclasses
import functools
import io
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx

from alignx_jax import exits, sharding
from alignx_jax.config import LoraConfig, ObjectiveConfig, OptimizerConfig
from alignx_jax.exits import UserError
from alignx_jax.models import lora
from alignx_jax.models import peft as folders
from alignx_jax.runs import lineage, loading
from alignx_jax.training import build, optimizer, state, step
from benchmarks import parity
from benchmarks.torch_reference import AlignXTorch
from tests.models import llamas
from tests.models.test_lora import LORA, adapted
from tests.training import published
from tests.training.test_loop import STEPS, Trainer, arrays, prepared, records, saved  # noqa: F401
from tests.training.test_step import agree, random_rows, relative

RUN = LoraConfig(rank=4, targets="q_proj|o_proj|down_proj")


@pytest.mark.parametrize(
    "variant", ["biases", *(pytest.param(variant, marks=pytest.mark.slow) for variant in ("qwen3", "gemma2"))]
)
def test_gradients_of_stage_1_are_those_of_peft_and_pytorch(variant, tmp_path):
    """By A, B and the pair classifier, and by nothing else; in float64."""
    folder = llamas.save(llamas.make(variant), tmp_path / "model")
    family = json.loads((folder / "config.json").read_text())["model_type"]
    inputs = parity.stage_1_inputs()
    with jax.enable_x64(True), jax.set_mesh(sharding.make_mesh("1x1")):
        decoder = adapted(folder, dtype=jnp.float64)
        folders.export(decoder, LORA, tmp_path / "adapter", "model")
        modeling = getattr(transformers.models, family)
        with parity.float64(getattr(modeling, f"modeling_{family}")):
            reference = AlignXTorch(folder, 1, attn_implementation="eager", dtype=torch.float64)
            peft.PeftModel.from_pretrained(reference.llm, tmp_path / "adapter", is_trainable=True)
            reference(inputs)["loss"].backward()
        found = parity.stage_1_gradients(decoder, reference, inputs)
    theirs = dict(reference.llm.named_parameters())
    assert {name for name, p in theirs.items() if p.grad is not None} == {n for n in theirs if "lora_" in n}
    assert set(found) == {"decoder", "classifier"} and set(found["decoder"]["layers"]) == {"adapters"}
    compared = 0
    for weight in lora.linear_layers(decoder.config).values():
        inputs_and_outputs = [int(np.prod(axes)) for axes in lora.shapes(weight, decoder.config)]
        ours = found["decoder"]["layers"]["adapters"][weight.path[-1]]
        for layer, key in enumerate(weight.keys(decoder.config)):
            module = key.removesuffix(".weight")
            a = ours["a"][layer].reshape(inputs_and_outputs[0], -1).T
            b = ours["b"][layer].reshape(-1, inputs_and_outputs[1]).T
            for name, gradient in (("A", a), ("B", b)):
                expected = theirs[f"{module}.lora_{name}.default.weight"].grad.numpy()
                assert relative(gradient, expected) < 1e-10, f"{module} {name}"
                compared += 1
    assert compared == 2 * 7 * decoder.config.num_layers
    for name, kernel in reference.language_matching_classifier.named_parameters():
        assert relative(found["classifier"][name.partition("_")[0]].T, kernel.grad.numpy()) < 1e-10


def three_steps(folder: pathlib.Path, spec: str, rows, settings: OptimizerConfig, **changes):
    """The state before and after three steps on a mesh, on the host; in float64 but for the frozen weights."""
    mesh = sharding.make_mesh(spec)
    with jax.enable_x64(True), jax.set_mesh(mesh):
        decoder = adapted(folder, spec, dtype=jnp.bfloat16)
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), nnx.state(decoder, nnx.LoRAParam))
        nnx.update(decoder, wide)
        graph, params, frozen = state.split(state.build(decoder, 16, seed=0))
        params["classifier"] = jax.tree.map(lambda x: x.astype(jnp.float64), params["classifier"])
        groups = sharding.data_shards(mesh)
        plan = published.recipe(1, 3, jnp.float64, group_pairs=24 // groups, groups=groups, **changes)
        now = state.create(params, optimizer.build(settings, 10), mesh, frozen)
        before = jax.device_get(jax.tree.map(jnp.copy, now))
        update = step.compiled_for(now, graph=graph, recipe=plan, config=settings)
        for _ in range(3):
            given = jax.tree.leaves((now.params, now.frozen))
            placed = jax.tree.map(lambda x: sharding.place_rows(np.asarray(x), mesh), rows)
            now, metrics = update(now, placed, 10)
            assert all(x.is_deleted() for x in given), "donated"
        return before, jax.device_get(now), jax.device_get(metrics)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return llamas.save(llamas.make("gqa"), tmp_path_factory.mktemp("gqa"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_any_mesh_and_accumulation_train_the_same_and_leave_the_frozen_weights(folder, kind):
    rows = random_rows(np.random.default_rng(0), vocabulary=99)
    settings = OptimizerConfig(kind=kind, learning_rate=1e-2, warmup_steps=1)
    before, expected, losses = three_steps(folder, "1x1", rows, settings)
    size = sum(x.size for x in jax.tree.leaves(expected.params))
    if kind == "adamw":
        counts = [x.size for x in jax.tree.leaves(expected.optimizer) if x.ndim]
        assert sum(counts) == 2 * size, "moments of what is trained alone"
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before.params, expected.params)
    assert all(jax.tree.leaves(moved)), moved
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(expected.frozen))
    for spec, changes in (("4x2", {"remat": "none"}), ("2x1", {"accumulation": 2, "objective": STEP})):
        objective = changes.get("objective")
        if objective:  # pairs of the whole step, as one micro-batch has them
            _, expected, losses = three_steps(folder, "1x1", rows, settings, objective=GLOBAL)
        _, found, metrics = three_steps(folder, spec, rows, settings, **changes)
        agree(found.params, expected.params, 1e-9)
        agree(metrics["loss"], losses["loss"], 1e-9)
        for a, b in zip(jax.tree.leaves(found.frozen), jax.tree.leaves(before.frozen), strict=True):
            np.testing.assert_array_equal(a, b)


GLOBAL = ObjectiveConfig(duplicates="keep", standardize="none")
STEP = dataclasses.replace(GLOBAL, negatives="step")


@pytest.fixture(scope="module")
def trainer(prepared):  # noqa: F811
    config, source, data = prepared
    return Trainer(dataclasses.replace(config, lora=RUN), source, data)


@pytest.fixture(scope="module")
def whole(trainer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer(folder)
    return folder / "stage1"


@pytest.mark.slow
def test_a_stopped_run_ends_bit_for_bit_and_keeps_only_what_is_trained(trainer, whole, tmp_path):
    with pytest.raises(exits.Interrupted):
        trainer(tmp_path, stop=3)
    trainer(tmp_path)
    there = tmp_path / "stage1"
    assert records(there) == records(whole)
    for a, b in zip(arrays(there, STEPS), arrays(whole, STEPS), strict=True):
        np.testing.assert_array_equal(a, b)
    sizes = sum(x.size for x in arrays(there, STEPS, "decoder"))
    assert sizes == lora.count(RUN, trainer.source.decoder_config())
    assert lineage.read(there).below.model == trainer.config.model


@pytest.mark.slow
def test_a_stage_goes_on_with_the_adapters_of_the_one_before(trainer, whole, tmp_path):
    best = loading.Checkpoints(whole / "checkpoints").best
    source = loading.find(str(whole))
    again = dataclasses.replace(
        trainer, config=dataclasses.replace(trainer.config, model=str(whole)), source=source, out=io.StringIO()
    )
    again(tmp_path)
    (first,) = [r for r in records(tmp_path / "stage1") if r["kind"] == "validation" and r["step"] == 0]
    (last,) = [r for r in records(whole) if r["kind"] == "validation" and r["step"] == best]
    assert first["next_token"] == last["next_token"] and first["contrastive"] == last["contrastive"]
    after = loading.find(str(tmp_path / "stage1"))
    assert after.base_model() == trainer.config.model, "not the stage before"
    assert not after.load(sharding.make_mesh("1x1")).layers.adapters
    for changes in ({"rank": 2}, {"alpha": 1.0}, {"targets": "q_proj"}):
        other = dataclasses.replace(again.config, lora=dataclasses.replace(RUN, **changes))
        with pytest.raises(UserError, match=r"^--lora: .*has adapters of --lora.rank=4 .*; give the same, or export"):
            build.check(other, source, sharding.make_mesh("2x1"))
    build.check(dataclasses.replace(again.config, lora=LoraConfig()), source, sharding.make_mesh("2x1"))


def test_exports_of_a_run_are_the_same_model(trainer, whole, tmp_path):
    source, mesh = loading.find(str(whole)), sharding.make_mesh("2x1")
    source.export(source.load(mesh), tmp_path / "merged")
    source.export_adapters(mesh, tmp_path / "adapter", "model", {"README.md": b"card"})
    assert (tmp_path / "adapter" / "README.md").read_bytes() == b"card"
    tokens = llamas.random_tokens(2, 20)
    load = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
    merged, plain = load(tmp_path / "merged"), load(trainer.config.model)
    before = llamas.states(plain, tokens)[1]
    expected = llamas.states(peft.PeftModel.from_pretrained(plain, tmp_path / "adapter"), tokens)[1]
    assert np.abs(expected - before).max() > 1e-3
    np.testing.assert_allclose(llamas.states(merged, tokens)[1], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match=r"^--export.adapter: model has no adapters, as it was trained without"):
        dataclasses.replace(trainer.source, name="model").export_adapters(mesh, tmp_path / "none", "model")
    assert not (tmp_path / "none").exists()


def test_other_weights_below_the_adapters_are_refused(trainer, whole, tmp_path):
    folder = pathlib.Path(shutil.copytree(whole, tmp_path / "run" / "stage1"))
    model = pathlib.Path(shutil.copytree(trainer.config.model, tmp_path / "model"))
    record = lineage.read(folder)
    moved = dataclasses.replace(record, below=dataclasses.replace(record.below, model=str(model)))
    (folder / lineage.FILE).write_text(lineage.text(moved))
    source, mesh = loading.find(str(folder)), sharding.make_mesh("1x1")
    source.load(mesh)  # a model that was moved is the same model
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-1] ^= 1  # of one number
    (model / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=rf"^{folder} holds adapters alone, .*{model} has other weights than they were"):
        source.load(mesh)
    shutil.rmtree(model)
    with pytest.raises(
        UserError, match=rf"^{folder} holds adapters alone, .*no such folder.* in {folder}/lineage.json"
    ):
        source.load(mesh)
    for text in ("[]", lineage.text(dataclasses.replace(record, below=None))):
        (folder / lineage.FILE).write_text(text)
        with pytest.raises(UserError, match=r"lineage.json is damaged"):
            loading.find(str(folder)).load(mesh)


def test_a_run_that_goes_on_with_other_weights_is_refused(trainer, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "stage1")
    before = saved(tmp_path / "stage1")
    record = lineage.read(tmp_path / "stage1")
    for part, what in (("start", "model"), ("below", "model below the adapters")):
        other = dataclasses.replace(getattr(record, part), weights="0")
        (tmp_path / "stage1" / lineage.FILE).write_text(lineage.text(dataclasses.replace(record, **{part: other})))
        with pytest.raises(UserError, match=f"was begun with another {what} than .* is now"):
            trainer(tmp_path)
    (tmp_path / "stage1" / lineage.FILE).write_text(lineage.text(record))
    assert saved(tmp_path / "stage1") == before


def test_the_embeddings_are_frozen_and_cannot_be_aligned(trainer):
    contrastive = dataclasses.replace(trainer.config.objective.contrastive, layer=0)
    objective = dataclasses.replace(trainer.config.objective, contrastive=contrastive)
    with pytest.raises(UserError, match=r"^--objective.contrastive.layer=0: with --lora.rank the embeddings are"):
        build.check(dataclasses.replace(trainer.config, objective=objective), trainer.source, sharding.make_mesh("1x1"))
