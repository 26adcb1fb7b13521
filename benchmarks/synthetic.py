"""A step with nothing to read: random weights and full rows of random pairs, of any shapes and on any mesh.

For benchmarks of speed and memory alone; `step.py` has real sentences.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from alignx_jax import sharding
from alignx_jax.batch import Batch
from alignx_jax.config import Config
from alignx_jax.data import packing
from alignx_jax.models.architecture import DecoderConfig
from alignx_jax.runs import loading
from alignx_jax.training import build, optimizer, state
from alignx_jax.training import step as training

LANGUAGES = 10


@dataclasses.dataclass(frozen=True)
class Job:
    """What one process needs to take steps."""

    compile: Callable[[], Callable[[training.TrainState, Batch], tuple[training.TrainState, training.Metrics]]]
    """Gives the step."""
    state: Callable[[], training.TrainState]
    """Makes the state on its devices."""
    place: Callable[[Batch], Batch]


def examples(rng: np.random.Generator, vocab_size: int, row_length: int, pairs: int) -> list[packing.PackedExample]:
    """The examples of one full row, all equally long: a source in their first half, a target in their second."""
    found = []
    for tokens in np.array_split(rng.integers(3, vocab_size, row_length).astype(np.int32), pairs):
        middle, end = len(tokens) // 2, len(tokens)
        languages = tuple(rng.integers(0, LANGUAGES, 2).tolist())
        source, target = rng.integers(0, 2**31 - 1, 2).tolist()
        spans, hashes = ((1, middle), (middle, end)), (source, target, source)
        found.append(packing.PackedExample(tokens, np.ones(end, bool), *spans, languages, hashes))
    return found


def batch(config: Config, vocab_size: int, pairs: int, rows: range) -> Batch:
    """The rows of those numbers [R,...], the same wherever they are made."""
    made = [
        packing.assemble(
            examples(np.random.default_rng([config.seed, row]), vocab_size, config.data.row_length, pairs),
            config.data.row_length,
            config.data.examples_per_row,
        )
        for row in rows
    ]
    return jax.tree.map(lambda *x: np.stack(x), *made)


def job(config: Config, decoder: DecoderConfig, mesh: Mesh, pairs: int) -> Job:
    """Stage 1 of `config` with `pairs` pairs in each row; use it inside `jax.set_mesh(mesh)`."""
    rows = build.group_rows(config, mesh)
    recipe = build.recipe_for(config, decoder, mesh, pairs=True, group_pairs=rows * pairs)
    step = build.build_step(config, recipe, decoder, mesh)
    tx = optimizer.build(config.optimizer, config.training.steps)

    def fresh() -> training.TrainState:
        model = state.build(loading.random_decoder(decoder), config.objective.language_matching.width, seed=config.seed)
        params = state.split(model)[1]
        return training.TrainState(step=jax.numpy.zeros((), "int32"), params=params, optimizer=tx.init(params))

    def compiled() -> Callable[[training.TrainState, Batch], tuple[training.TrainState, training.Metrics]]:
        train_step, last = step.lower().compile(), jax.numpy.int32(config.training.steps)
        last = jax.device_put(last, step.like.step.sharding)
        return lambda now, batch: train_step(now, batch, last)

    shardings = jax.tree.map(lambda x: x.sharding, step.like)
    return Job(
        compile=compiled,
        state=jax.jit(fresh, out_shardings=shardings),
        place=functools.partial(jax.tree.map, lambda x: sharding.place_rows(x, mesh)),
    )


def batches(config: Config, vocab_size: int, pairs: int) -> Iterator[Batch]:
    """Endless batches, no two alike, the same in every process."""
    for first in itertools.count(step=config.training.rows):
        yield batch(config, vocab_size, pairs, range(first, first + config.training.rows))
