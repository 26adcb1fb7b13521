"""One stage from its first step to its last, continuing where an earlier start of it was stopped."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from alignx_jax import hosts, sharding
from alignx_jax.batch import Batch
from alignx_jax.config import Config, UserError
from alignx_jax.data import pipeline
from alignx_jax.models import attention
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.families import DecoderConfig
from alignx_jax.training import metrics, optimizer, progress, runs, state
from alignx_jax.training import step as steps
from alignx_jax.training.checkpoints import Checkpoints


class Diverged(RuntimeError):
    """Training cannot go on: a loss or gradient is not finite, or an auxiliary loss does not reach the model."""


def check(config: Config, source: runs.Source, mesh: Mesh) -> None:
    """Refuses what cannot work, before data is prepared and anything is compiled.

    Raises:
      UserError: the mesh does not divide the model or the batch, a layer is not in the model, negatives are asked of
        micro-batches that a step does not have, or the kernel that is asked for cannot compute attention there.
    """
    if config.objective.negatives == "step" and config.training.accumulation == 1 and config.stage != "2":
        raise UserError(
            "--objective.negatives=step: with --training.accumulation=1 a step is one micro-batch; "
            "give global, which is the same at no cost, or a larger accumulation"
        )
    sharding.check(source.decoder_config(), mesh, config.training.rows, config.training.accumulation)
    align_layer(config, source.decoder_config())
    matching_layer(config, source.decoder_config())
    attention_kernel(config, source.decoder_config(), mesh)


def align_layer(config: Config, decoder: DecoderConfig) -> int:
    """Layers run before the state that is aligned: half of the model's unless set (published: 16 of 32).

    `auto` has to be replaced by a number before training; until then it stands for half.
    """
    layer = config.objective.contrastive.layer
    return _layer("contrastive", None if layer == "auto" else layer, decoder.num_layers // 2, decoder)


def matching_layer(config: Config, decoder: DecoderConfig) -> int:
    """Layers run before the state whose language is matched: all unless set."""
    return _layer("language-matching", config.objective.language_matching.layer, decoder.num_layers, decoder)


def _layer(loss: str, layer: int | None, default: int, decoder: DecoderConfig) -> int:
    if layer is None:
        return default
    if not 0 <= layer <= decoder.num_layers:
        raise UserError(
            f"--objective.{loss}.layer={layer}: the model has {decoder.num_layers} layers; "
            f"give a number from 0 (embeddings) to {decoder.num_layers} (after the final norm)"
        )
    return layer


def group_rows(config: Config, mesh: Mesh) -> int:
    """Rows of one device's group whose pairs meet: of one micro-batch, or of the step."""
    rows = config.training.rows // sharding.data_shards(mesh)
    return rows if config.objective.negatives == "step" else rows // config.training.accumulation


def attention_kernel(config: Config, decoder: DecoderConfig, mesh: Mesh) -> attention.Choice:
    """How a stage computes attention, and why so: `attention.choose` for the devices of the mesh."""
    dtype = jnp.dtype(config.training.compute_dtype)
    return attention.choose(config.training.attention, mesh.devices.flat[0].platform, decoder.head_dim, dtype)


def recipe(config: Config, decoder: DecoderConfig, data: pipeline.Data, mesh: Mesh) -> steps.Recipe:
    """The static settings of the step on `data`."""
    rows = group_rows(config, mesh)
    most = max(data.train.most_examples(rows), data.validation.most_examples(rows))
    return recipe_for(config, decoder, mesh, pairs=data.pairs, group_pairs=most)


def recipe_for(config: Config, decoder: DecoderConfig, mesh: Mesh, *, pairs: bool, group_pairs: int) -> steps.Recipe:
    """The static settings of the step.

    Args:
      pairs: whether batches hold pairs (stage 1).
      group_pairs: most pairs in any `group_rows` rows.
    """
    return steps.Recipe(
        objective=config.objective,
        contrastive_layer=align_layer(config, decoder),
        matching_layer=matching_layer(config, decoder),
        pairs=pairs,
        groups=sharding.data_shards(mesh),
        group_pairs=group_pairs,
        accumulation=config.training.accumulation,
        compute_dtype=jnp.dtype(config.training.compute_dtype),
        remat=config.training.remat,
        attention=attention_kernel(config, decoder, mesh).kernel,
    )


@dataclasses.dataclass(frozen=True)
class Step:
    """What one stage compiles; shapes only, no weights."""

    graph: nnx.GraphDef
    like: state.TrainState
    """Shapes, types and shardings of the state."""
    train_step: jax.stages.Wrapped


def build_step(config: Config, plan: steps.Recipe, decoder: DecoderConfig, mesh: Mesh, last: int) -> Step:
    """The step that trains, of a run of `last` steps. What is compiled ahead of time is this same function."""
    tx = optimizer.adamw(config.optimizer, last)
    graph, shapes = state.split(nnx.eval_shape(lambda: _build(config, plan, runs.random_decoder(decoder))))
    like = state.abstract(shapes, tx, mesh)
    return Step(graph, like, steps.compiled_for(like, config=config.optimizer, steps=last, graph=graph, recipe=plan))


def _build(config: Config, plan: steps.Recipe, decoder: Decoder) -> state.AlignX:
    width = config.objective.language_matching.width if "language_matching" in plan.weights else None
    return state.build(decoder, width, seed=config.seed)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished stage shows."""

    folder: pathlib.Path
    before: dict[str, float]
    """Validation losses before the first step; empty where nothing is held out."""
    after: dict[str, float]
    best_step: int


def train(
    config: Config,
    folder: pathlib.Path,
    source: runs.Source,
    data: pipeline.Data,
    mesh: Mesh,
    console: Console,
    title: str,
) -> Result:
    """Runs a stage to its end and leaves its folder behind; started again, it continues from its last checkpoint.

    Raises:
      UserError: settings that do not fit the model, the mesh or the folder; before anything is compiled.
      Diverged: a loss or the gradient is not finite, or an auxiliary loss is 0 or without gradient.
    """
    check(config, source, mesh)
    if config.objective.contrastive.layer == "auto":
        raise ValueError("the layer to align has to be a number here")
    plan = recipe(config, source.decoder_config(), data, mesh)
    met = plan.group_pairs * (plan.groups if plan.scope == "global" else 1)
    if "contrastive" in plan.weights and met < 2:
        raise UserError(
            "no pair ever meets another, so the contrastive loss has no negatives; raise --training.rows, lower "
            "--training.accumulation, or set --objective.negatives=global"
        )
    if plan.two_passes:
        share = "quarter" if plan.remat == "block" else "third"  # of 4 forward passes' products, or of 3
        console.print(
            f"--objective.negatives=step: pairs meet those of all {plan.accumulation} micro-batches, "
            f"and each step runs the layers forward once more (at most a {share} more computation)",
            soft_wrap=True,
        )
    corpora = {c.source: c.fingerprint for c in data.corpora}
    decoder = None
    if not hosts.share("continue", runs.can_continue(folder, config, corpora)):
        decoder = source.load(mesh)  # before the folder is there: a spoilt model leaves none behind
        hosts.gather("loaded", None)
        hosts.first("claim", lambda: runs.claim(folder, config, source, corpora))
    runs.check_shared(folder)
    stage = _Stage(config, folder, plan, data, mesh, console)
    try:
        stage.start(source, decoder)
        del decoder  # its arrays are donated to the first step
        stage.run(title)
        return stage.result()
    finally:
        stage.close()


class _Stage:
    """The pieces that live as long as one stage does."""

    def __init__(self, config: Config, folder: pathlib.Path, plan: steps.Recipe, data, mesh: Mesh, console: Console):
        self.config, self.folder, self.plan, self.data, self.mesh, self.console = (
            config,
            folder,
            plan,
            data,
            mesh,
            console,
        )
        self.last = data.train.steps
        self.checkpoints = Checkpoints(folder / "checkpoints", config.training.keep, writable=True)
        self.log: metrics.MetricsLog | None = None  # of the first process
        self.silent: set[str] = set()  # auxiliary losses that were 0 or without gradient in the last step

    def start(self, source: runs.Source, decoder: Decoder | None) -> None:
        """Restores the newest checkpoint, or begins with the decoder (loaded if it is not yet) and validates it."""
        step = build_step(self.config, self.plan, source.decoder_config(), self.mesh, self.last)
        self.train_step = step.train_step
        self.validation_sums = jax.jit(functools.partial(steps.validation_sums, graph=step.graph, recipe=self.plan))
        self.first = self.checkpoints.latest or 0
        hosts.agree({f"the latest checkpoint of {self.folder}": self.first})
        if hosts.is_first():
            self.log = metrics.MetricsLog(self.folder, self.first)
        if self.first:
            self.state = self.checkpoints.restore(self.first, step.like)
            self.console.print(f"continuing {self.folder} from step {self.first} of {self.last}", soft_wrap=True)
        else:
            decoder = decoder or source.load(self.mesh)
            tx = optimizer.adamw(self.config.optimizer, self.last)
            self.state = state.create(state.split(_build(self.config, self.plan, decoder))[1], tx, self.mesh)
            if not hosts.share("validated", bool(metrics.read(self.folder, "validation"))):
                self.validate(0)

    def batches(self, split: pipeline.Split, start: int) -> Iterator[Batch]:
        """The batches from `start` on, on the devices; every process reads its own rows."""
        own = sharding.own_rows(split.rows_per_step, self.mesh)
        for batch in split.batches(start, own):
            yield jax.tree.map(lambda x: sharding.place_rows(x, self.mesh, own, split.rows_per_step), batch)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        if self.log:
            self.log.write(kind, step, values)

    def validate(self, step: int) -> dict[str, float]:
        """Every loss over the validation split, divided once at its end; logged."""
        totals = None
        for batch in self.batches(self.data.validation, 0):
            sums = self.validation_sums(self.state.params, batch)
            totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)
        values = {}
        if totals is not None:
            sums, weights = jax.device_get(totals)
            values = {k: float(sums[k] / max(weights[k], 1.0)) for k in sums}
            values = {"loss": sum(self.plan.weights[k] * v for k, v in values.items()), **values}
            self.write("validation", step, values)
        return values

    def run(self, title: str) -> None:
        """Steps `first`+1 to `last`. Metrics leave the device one step late, so that dispatch never waits."""
        batches = self.batches(self.data.train, self.first)
        waiting: tuple[int, dict[str, jax.Array]] | None = None
        with progress.StageProgress(self.console, title, self.first, self.last) as bar:
            self.bar, begin = bar, time.monotonic()
            for step, batch in enumerate(batches, start=self.first + 1):
                self.state, values = self.train_step(self.state, batch)
                if waiting:
                    self.report(*waiting)
                waiting = step, values
                if step == self.first + 1:
                    self.report(*waiting)
                    waiting = None
                    bar.note(f"first step after {time.monotonic() - begin:.0f} s of compilation")
                    bar.restart_clock(step)
                validate = step % self.config.training.validate_every == 0 or step == self.last
                if validate or step % self.config.training.save_every == 0:
                    if waiting:
                        self.report(*waiting)  # nothing is saved that was not looked at
                    waiting = None
                    self.save(step, validate)

    def save(self, step: int, validate: bool) -> None:
        loss = None
        if validate:
            values = self.validate(step)
            if values:
                self.bar.note(f"step {step}: validation {progress.losses(values)}")
            loss = values.get("loss")
        self.checkpoints.save(step, self.state, loss)

    def report(self, step: int, values: dict[str, jax.Array]) -> None:
        """Brings a finished step's metrics to the host, looks at them, shows and logs them."""
        values = {k: float(v) for k, v in jax.device_get(values).items()}
        self._check(step, values)
        values["tokens_per_second"] = self.bar.step(step, values)
        self.write("train", step, values)

    def _check(self, step: int, values: dict[str, float]) -> None:
        bad = [k for k, v in values.items() if not math.isfinite(v)]
        if bad:
            good, examples = self.checkpoints.latest, self.data.train.example_ids(step - 1)
            raise Diverged(
                f"step {step}: {', '.join(bad)} not finite; examples {', '.join(examples)}; "
                f"last good checkpoint: {'none' if good is None else f'{self.folder}/checkpoints/{good}'}"
            )
        auxiliary = [k for k in self.plan.weights if k != "next_token"]
        silent = {k for k in auxiliary if values["pairs"] > 1 and 0 in (values[k], values[f"reach/{k}"])}
        for name in silent & self.silent:  # once may be chance: a step of nothing but duplicates has no negatives
            raise Diverged(
                f"steps {step - 1} and {step}: {name} is {values[name]} and the norm of its gradient at the pooled "
                f"states {values[f'reach/{name}']}: the loss does not reach the model"
            )
        self.silent = silent

    def result(self) -> Result:
        self.checkpoints.close()
        checkpoints = Checkpoints(self.folder / "checkpoints")
        best = checkpoints.best
        checkpoints.close()
        validations = {r["step"]: r for r in metrics.read(self.folder, "validation")}
        return Result(self.folder, validations.get(0, {}), validations.get(self.last, {}), best)

    def close(self) -> None:
        self.checkpoints.close()
        if self.log:
            self.log.close()
