"""Saving, restoring on another mesh, which checkpoints stay, and half-written ones."""

import contextlib
import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from alignx_jax import sharding
from alignx_jax.config import OptimizerConfig, UserError
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.families import decoder_config
from alignx_jax.training import optimizer, state
from alignx_jax.training.checkpoints import Checkpoints

CONFIG = decoder_config(
    {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "test",
)


def fresh(spec: str, seed: int = 0):
    mesh = sharding.make_mesh(spec)
    model = state.build(Decoder(CONFIG, rngs=nnx.Rngs(seed)), 8, seed=seed)
    return state.create(state.split(model)[1], optimizer.adamw(OptimizerConfig(), 10), mesh)


def numbered(like, step: int):
    return dataclasses.replace(
        like, step=jnp.asarray(step, jnp.int32), optimizer=jax.tree.map(lambda x: x + 1, like.optimizer)
    )


def test_any_mesh_restores_what_another_saved(tmp_path):
    saved = numbered(fresh("8x1"), 7)
    checkpoints = Checkpoints(tmp_path, writable=True)
    checkpoints.save(7, saved, None)
    checkpoints.close()
    like = fresh("2x2", seed=1)
    with contextlib.closing(Checkpoints(tmp_path)) as again:
        restored = again.restore(7, like)
    for a, b, there in zip(*map(jax.tree.leaves, (saved, restored, like)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert b.dtype == a.dtype and (b.ndim == 0 or b.sharding == there.sharding)


def test_a_folder_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints(pathlib.Path("run/checkpoints"), writable=True)
    checkpoints.save(7, numbered(fresh("1x1"), 7), None)
    checkpoints.close()
    with contextlib.closing(Checkpoints(tmp_path / "run" / "checkpoints")) as again:
        assert again.latest == 7


def test_the_latest_and_the_best_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, writable=True)
    now = fresh("1x1")
    for step, loss in enumerate([3.0, 1.0, None, 2.0, 2.5, None], start=1):
        checkpoints.save(step, now, loss)
    checkpoints.close()
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [2, 5, 6]
    with contextlib.closing(Checkpoints(tmp_path)) as again:
        assert (again.latest, again.best) == (6, 2)


def test_without_validation_the_latest_is_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, writable=True)
    assert checkpoints.latest is None and checkpoints.best is None
    checkpoints.save(1, fresh("1x1"), None)
    checkpoints.close()
    with contextlib.closing(Checkpoints(tmp_path)) as again:
        assert again.best == 1


def test_a_half_written_checkpoint_does_not_count(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3, writable=True)
    for step in (1, 2):
        checkpoints.save(step, fresh("1x1"), None)
    checkpoints.close()
    (tmp_path / "2" / "commit_success.txt").unlink()
    shutil.move(tmp_path / "2", tmp_path / "2.orbax-checkpoint-tmp")
    with contextlib.closing(Checkpoints(tmp_path, writable=True)) as again:
        assert again.latest == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of reads given up half-way
def test_another_model_is_told_apart(tmp_path):
    checkpoints = Checkpoints(tmp_path, writable=True)
    now = fresh("1x1")
    checkpoints.save(1, now, None)
    checkpoints.close()
    wrong = dict(now.params["decoder"], norm=jnp.zeros((17,)))
    with (
        contextlib.closing(Checkpoints(tmp_path)) as again,
        pytest.raises(UserError, match="not of this model"),
    ):
        again.restore_part(1, {"decoder": wrong})
