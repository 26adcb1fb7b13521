import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from alignx_jax import sharding
from alignx_jax.exits import UserError
from alignx_jax.models.architecture import DecoderConfig
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.rope import Rope

CONFIG = DecoderConfig(
    family="llama",
    vocab_size=300,
    hidden_size=48,
    intermediate_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=6,
    norm_epsilon=1e-5,
    rope=Rope(),
    tie_embeddings=False,
    attention_bias=True,
    mlp_bias=True,
    activation="silu",
    initializer_range=0.02,
    max_positions=64,
    output_bias=True,
    qk_norms=True,
    post_norms=True,
)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("1x1", {"data": 1, "model": 1}),
        ("4x2", {"data": 4, "model": 2}),
        ("2x2x2", {"replica": 2, "data": 2, "model": 2}),
        ("1x4x2", {"replica": 1, "data": 4, "model": 2}),
    ],
)
def test_mesh(spec, shape):
    mesh = sharding.make_mesh(spec)
    assert dict(mesh.shape) == shape
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sharding.data_shards(mesh) == shape.get("replica", 1) * shape["data"]


@pytest.mark.parametrize("spec", ["", "8", "8x", "x8", "0x8", "8x-1", "2x2x2x1", "8 x 1", "8X1", "axb", "8x1\n", "٨x١"])
def test_what_is_no_mesh(spec):
    for function in (sharding.make_mesh, sharding.prepare_devices):
        with pytest.raises(UserError, match="a mesh is data x model, such as 8x1"):
            function(spec)


@pytest.mark.parametrize("spec", ["8x1", "4x2", "2x2x2"])
def test_a_mesh_and_rows_without_devices_are_those_with(spec):
    mesh, abstract = sharding.make_mesh(spec), sharding.abstract_mesh(spec)
    assert (abstract.shape, abstract.axis_types) == (mesh.shape, mesh.axis_types)
    row = np.zeros((5, 2), np.int16)
    like, placed = sharding.rows_like(row, 8, mesh), sharding.place_rows(np.stack([row] * 8), mesh)
    assert (like.shape, like.dtype, like.sharding) == (placed.shape, placed.dtype, placed.sharding)


def test_too_few_devices():
    message = r"--mesh=3x3 asks for 9 devices, but there are 8 \(cpu\); give a mesh of at most 8"
    with pytest.raises(UserError, match=message):
        sharding.make_mesh("3x3")


@pytest.mark.parametrize(("earlier", "count"), [("", 6), ("jax.config.update('jax_num_cpu_devices', 16)", 16)])
def test_devices_are_simulated_before_a_backend_starts(earlier, count, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    script = f"""
import os
import jax
from jax._src import xla_bridge
from alignx_jax import sharding
{earlier}
sharding.prepare_devices("3x2")
assert not xla_bridge.backends_are_initialized()
kept, added = os.environ["XLA_FLAGS"].split()
assert kept == "--xla_backend_optimization_level=0"
assert added == "--xla_cpu_enable_concurrency_optimized_scheduler=false"
assert int(os.environ["PJRT_NPROC"]) == max(8 * {count}, os.cpu_count())
sharding.make_mesh("3x2")
print(len(jax.devices()))
sharding.prepare_devices("1x1")  # later calls change nothing
print(len(jax.devices()))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.stdout.split() == [str(count)] * 2, run.stderr


def everything():
    return {
        "decoder": nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0))))),
        "classifier": {"gate": np.zeros((96, 16)), "up": np.zeros((96, 16)), "down": np.zeros((16, 2))},
    }


def test_every_parameter_has_a_rule_of_its_rank():
    params = everything()
    shardings = sharding.parameter_shardings(params, sharding.make_mesh("2x2x2"))
    jax.tree.map(lambda x, s: pytest.fail(str(s)) if len(s.spec) != np.ndim(x) else None, params, shardings)
    specs = jax.tree.leaves(jax.tree.map(lambda s: str(s.spec), shardings))
    assert "replica" not in "".join(specs)  # copied over replicas
    large = [
        s
        for x, s in zip(jax.tree.leaves(params["decoder"]), jax.tree.leaves(shardings["decoder"]), strict=True)
        if x.size >= CONFIG.num_layers * CONFIG.hidden_size * CONFIG.num_kv_heads * CONFIG.head_dim
    ]
    assert len(large) == 9  # embedding, output, q, k, v, o, gate, up, down
    for s in large:
        assert s.num_devices == 8
        assert {"data", "model"} <= set(s.spec)


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(KeyError, match="no sharding rule for the parameter decoder/layers/router"):
        sharding.parameter_spec(("decoder", "layers", "router"))


def test_rows_are_placed_over_replicas_and_data():
    rows = np.arange(24, dtype=np.int32).reshape(8, 3)
    mesh = sharding.make_mesh("2x2x2")
    placed = sharding.place_rows(rows, mesh)
    assert placed.sharding.is_equivalent_to(NamedSharding(mesh, P(("replica", "data"), None)), 2)
    np.testing.assert_array_equal(placed, rows)


def test_constraints():
    x = np.ones((2, 8, 4), np.float32)
    np.testing.assert_array_equal(jax.jit(sharding.constrain_micro_batches)(x), x)  # no mesh: nothing happens
    mesh = sharding.make_mesh("2x2x2")
    with jax.set_mesh(mesh):
        found = jax.jit(sharding.constrain_micro_batches)(x)
        assert found.sharding.is_equivalent_to(NamedSharding(mesh, P(None, ("replica", "data"), None)), 3)
        found = jax.jit(lambda x: sharding.constrain(x, None, "rows", "model"))(x)
        assert found.sharding.is_equivalent_to(NamedSharding(mesh, P(None, ("replica", "data"), "model")), 3)


@pytest.mark.parametrize("spec", ["8x1", "4x2", "2x4", "2x2x2"])
def test_what_fits(spec):
    sharding.check(CONFIG, sharding.make_mesh(spec), rows=16, accumulation=2)


@pytest.mark.parametrize(
    ("spec", "changes", "rows", "accumulation", "message"),
    [
        ("1x3", {}, 8, 1, "a model axis of 3 does not divide the model's 8 attention heads; sizes that work: 1, 2, 4"),
        ("1x8", {}, 8, 1, "a model axis of 8 does not divide the model's 4 key/value heads; sizes that work: 1, 2, 4"),
        ("1x4", {"intermediate_size": 66}, 8, 1, "the model's 66 MLP units; sizes that work: 1, 2"),
        (
            "1x3",
            {"num_heads": 6, "num_kv_heads": 3, "intermediate_size": 66, "vocab_size": 500},
            8,
            1,
            "the model's 512 vocabulary rows (padded); sizes that work: 1",
        ),
        ("5x1", {}, 5, 1, "a data axis of 5 does not divide the model's hidden size 48; give one that does, such as 4"),
        ("1x1", {}, 9, 2, "--training.rows=9 cannot be split into --training.accumulation=2 micro-batches"),
        ("8x1", {}, 24, 2, "--training.rows=24 cannot be split into 2 micro-batches over the mesh's 8 data shards"),
        ("2x2x2", {}, 6, 1, "--training.rows=6 cannot be split into 1 micro-batches over the mesh's 4 data shards"),
    ],
)
def test_what_does_not_fit(spec, changes, rows, accumulation, message):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(UserError) as error:
        sharding.check(config, sharding.make_mesh(spec), rows, accumulation)
    assert message in str(error.value)


def test_rows_are_mapped_where_they_lie():
    x = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    with jax.set_mesh(sharding.make_mesh("2x2x2")):
        top = jax.jit(sharding.map_rows(lambda x: jax.lax.top_k(x, 2)[0]))
        np.testing.assert_array_equal(top(x), np.sort(x)[:, :-3:-1])


def test_each_device_takes_its_own_entries():
    x = np.arange(16.0, dtype=np.float32).reshape(8, 2)
    mesh = sharding.make_mesh("4x2")
    with jax.set_mesh(mesh):
        ranked = jax.jit(sharding.on_each_device(lambda x: x - x.max(), mesh))(x)
    np.testing.assert_array_equal(ranked, np.tile([-1.0, 0.0], (8, 1)))
