"""The loop of one's own: the run of the program, and a folder that transformers and we read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import alignx_jax
from alignx_jax.console import Screen
from alignx_jax.training import begin, build, metrics, stopping
from examples import own_loop


@pytest.mark.slow
def test_it_takes_the_steps_that_the_program_takes(tmp_path):
    config = alignx_jax.load_config("configs/sample.py")
    small = dataclasses.replace(config.data, limit=40, row_length=128, validation=20, cache=str(tmp_path / "cache"))
    training = dataclasses.replace(config.training, rows=2, steps=3)
    config = dataclasses.replace(config, data=small, training=training)
    history = own_loop.train(config, str(tmp_path / "own"))

    mesh, source = alignx_jax.make_mesh("1x1"), alignx_jax.find("sample")
    with jax.set_mesh(mesh):
        weights, tokenizer = build.Weights(source, config, mesh), alignx_jax.load_tokenizer(source.huggingface)
        data = alignx_jax.build_data(config, "1", tokenizer)
        config, _ = alignx_jax.with_layer(config, weights.look(), tokenizer, data, mesh)
        begin.train(config, tmp_path / "stage1", weights, data, mesh, Screen(quiet=True), "stage 1", stopping.Stop())
        program = alignx_jax.find(str(tmp_path / "stage1")).load(mesh, jnp.bfloat16)
    for ours, theirs in zip(history, metrics.read(tmp_path / "stage1", "train"), strict=True):
        assert ours == {name: theirs[name] for name in ours}
    own = alignx_jax.find(str(tmp_path / "own")).load(mesh, jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(own), nnx.state(program))
    assert alignx_jax.load_tokenizer(tmp_path / "own").vocab_size == 4096
