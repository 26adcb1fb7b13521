"""One stage from its first step to its last, continuing where an earlier start of it was stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Iterator
from typing import NoReturn

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from alignx_jax import sharding
from alignx_jax.batch import Batch
from alignx_jax.config import Config, UserError
from alignx_jax.data import pipeline
from alignx_jax.exits import Interrupted, StorageError
from alignx_jax.models import attention
from alignx_jax.models.decoder import Decoder
from alignx_jax.models.families import DecoderConfig
from alignx_jax.training import metrics, nonfinite, optimizer, progress, runs, state, stopping, watch
from alignx_jax.training import step as steps
from alignx_jax.training.checkpoints import Checkpoints, reason


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
    train_step = steps.compiled_for(
        like,
        config=config.optimizer,
        steps=last,
        graph=graph,
        recipe=plan,
        skip_nonfinite=config.on_nonfinite == "skip",
    )
    return Step(graph, like, train_step)


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
    skipped: int
    """Updates left out because they were not finite."""


def train(
    config: Config,
    folder: pathlib.Path,
    source: runs.Source,
    data: pipeline.Data,
    mesh: Mesh,
    console: Console,
    title: str,
    stop: stopping.Stop,
) -> Result:
    """Runs a stage to its end and leaves its folder behind; started again, it continues from its last checkpoint.

    Raises:
      UserError: settings that do not fit the model, the mesh or the folder; before anything is compiled.
      Diverged: a loss or the gradient is not finite, or an auxiliary loss is 0 or without gradient.
      StorageError: something could not be written, or no checkpoint can be read.
      Interrupted: `stop` was requested; the state is saved.
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
    if not runs.can_continue(folder, config, corpora):
        decoder = source.load(mesh)  # before the folder is there: a spoilt model leaves none behind
        runs.claim(folder, config, source, corpora)
    stage = _Stage(config, folder, plan, data, mesh, console, stop)
    try:
        with stage.watch:
            stage.start(source, decoder)
            del decoder  # its arrays are donated to the first step
            stage.run(title)
    except BaseException as error:
        failure = _in_storage(error, folder)
        try:
            stage.close()
        except (OSError, StorageError) as second:
            failure.add_note(str(_in_storage(second, folder)))
        if failure is error:
            raise
        raise failure from error
    stage.close()
    return stage.result()


def _in_storage(error: BaseException, folder: pathlib.Path) -> BaseException:
    """An error of the system while a stage runs, as a sentence."""
    if not isinstance(error, OSError):
        return error
    return StorageError(
        f"{error.filename or folder}: {reason(error)}; what was saved is kept; make room, or see to it that it can be "
        "read and written, and start the same command again"
    )


class _Stage:
    """The pieces that live as long as one stage does."""

    def __init__(
        self,
        config: Config,
        folder: pathlib.Path,
        plan: steps.Recipe,
        data: pipeline.Data,
        mesh: Mesh,
        console: Console,
        stop: stopping.Stop,
    ):
        self.config, self.folder, self.plan, self.data, self.mesh = config, folder, plan, data, mesh
        self.console, self.stop = console, stop
        self.last = data.train.steps
        self.checkpoints = Checkpoints(folder / "checkpoints", config.training.keep, writable=True)
        self.watch = watch.Watch(config.training.stall_seconds, folder, self.note)
        self.log: metrics.MetricsLog | None = None
        self.silent: set[str] = set()  # auxiliary losses that were 0 or without gradient in the last step
        self.skipped = 0  # updates left out

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def start(self, source: runs.Source, decoder: Decoder | None) -> None:
        """Restores the newest checkpoint, or begins with the decoder (loaded if it is not yet) and validates it."""
        step = build_step(self.config, self.plan, source.decoder_config(), self.mesh, self.last)
        self.train_step, self.all_finite = step.train_step, jax.jit(steps.all_finite)
        self.validation_sums = jax.jit(functools.partial(steps.validation_sums, graph=step.graph, recipe=self.plan))
        self.watch.doing("restoring the last checkpoint")
        self.first = self.checkpoints.sound("latest") or 0
        logged = metrics.read(self.folder, "train")
        self.skipped = sum(record.get("skipped") or 0 for record in logged if record["step"] <= self.first)
        self.log = metrics.MetricsLog(self.folder, self.first)
        if gap := self.log.missing:
            self.note(f"{self.folder}/metrics.jsonl lacks {len(gap)} steps between {gap[0]} and {gap[-1]}; going on")
        if self.first >= self.last:
            self.note(f"{self.folder}: all {self.last} steps are done already")
        elif self.first:
            self.state = self.checkpoints.restore(self.first, step.like)
            self.note(f"continuing {self.folder} from step {self.first} of {self.last}")
        else:
            if logged:
                self.note(f"{self.folder}: no checkpoint was saved before; beginning again ({len(logged)} steps)")
            decoder = decoder or source.load(self.mesh)
            tx = optimizer.adamw(self.config.optimizer, self.last)
            self.state = state.create(state.split(_build(self.config, self.plan, decoder))[1], tx, self.mesh)
            if not metrics.read(self.folder, "validation"):
                self.validate(0)

    def place(self, batch: Batch) -> Batch:
        """This process's rows onto its devices."""
        return jax.tree.map(lambda x: sharding.place_rows(x, self.mesh), batch)

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """Steps `first`+1 to `last` with their batches."""
        batches = self.data.train.batches(self.first, jax.process_index(), jax.process_count())
        for step in range(self.first + 1, self.last + 1):
            self.watch.doing(f"waiting for the data of step {step}")
            yield step, next(batches)

    def validate(self, step: int) -> dict[str, float]:
        """Every loss over the validation split, divided once at its end; logged."""
        totals = None
        for batch in self.data.validation.batches(0, jax.process_index(), jax.process_count()):
            self.watch.doing(f"validating after step {step}")
            sums = self.validation_sums(self.state.params, self.place(batch))
            totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)
        values = {}
        if totals is not None:
            sums, weights = jax.device_get(totals)
            values = {k: float(sums[k] / max(weights[k], 1.0)) for k in sums}
            values = {"loss": sum(self.plan.weights[k] * v for k, v in values.items()), **values}
            self.log.write("validation", step, values)
        return values

    def run(self, title: str) -> None:
        """Steps `first`+1 to `last`. Metrics leave the device one step late, so that dispatch never waits."""
        waiting: tuple[int, dict[str, jax.Array]] | None = None
        with (
            contextlib.ExitStack() as to_finish,
            progress.StageProgress(self.console, title, self.first, self.last) as bar,
        ):
            self.bar, begin = bar, time.monotonic()
            for step, batch in self.batches():
                first = step == self.first + 1
                self.watch.doing(f"compiling step {step}" if first else f"waiting for the device at step {step}")
                self.state, values = self.train_step(self.state, self.place(batch))
                if waiting:
                    self.report(*waiting)
                waiting = step, values
                if first:
                    self.report(*waiting)
                    waiting = None
                    bar.note(f"first step after {time.monotonic() - begin:.0f} s of compilation")
                    bar.restart_clock(step)
                    to_finish.enter_context(self.stop.finishing())  # there is something to save from now on
                self.checkpoints.poll()
                stopped = self.stop.reached(step)
                validate = step % self.config.training.validate_every == 0 or step == self.last
                if validate or stopped or step % self.config.training.save_every == 0:
                    if waiting:
                        self.report(*waiting)  # nothing is saved that was not looked at
                    waiting = None
                    self.save(step, validate)
                if stopped and step < self.last:
                    self.wait()
                    raise Interrupted(
                        f"stopped on request after step {step} of {self.last}, which is saved in {self.folder}; "
                        "the same command goes on from there"
                    )
            self.wait()

    def wait(self) -> None:
        self.watch.doing("writing the last checkpoint")
        self.checkpoints.wait()

    def save(self, step: int, validate: bool) -> None:
        loss = None
        if validate:
            values = self.validate(step)
            if values:
                self.bar.note(f"step {step}: validation {progress.losses(values)}")
            loss = values.get("loss")
        self.watch.doing(f"saving step {step}")
        if not self.all_finite(self.state):
            self._diverge(step, "the state after it is not finite")
        self.log.sync()  # a checkpoint may find more metrics than its own, but never fewer
        self.checkpoints.save(step, self.state, loss if loss is not None and math.isfinite(loss) else None)

    def report(self, step: int, values: dict[str, jax.Array]) -> None:
        """Brings a finished step's metrics to the host, looks at them, shows and logs them."""
        self.watch.doing(f"waiting for the device at step {step}")
        values = {k: float(v) for k, v in jax.device_get(values).items()}
        if values.get("skipped"):
            self.skipped += 1
            self.bar.note(f"step {step}: {_not_finite(values)} not finite; update left out ({self.skipped} so far)")
        else:
            self._check(step, values)
        values["tokens_per_second"] = self.bar.step(step, values)
        self.log.write("train", step, values)

    def _check(self, step: int, values: dict[str, float]) -> None:
        if bad := _not_finite(values):
            self._diverge(step, f"{bad} not finite")
        auxiliary = [k for k in self.plan.weights if k != "next_token"]
        silent = {k for k in auxiliary if values["pairs"] > 1 and 0 in (values[k], values[f"reach/{k}"])}
        for name in silent & self.silent:  # once may be chance: a step of nothing but duplicates has no negatives
            raise Diverged(
                f"steps {step - 1} and {step}: {name} is {values[name]} and the norm of its gradient at the pooled "
                f"states {values[f'reach/{name}']}: the loss does not reach the model"
            )
        self.silent = silent

    def _diverge(self, step: int, what: str) -> NoReturn:
        self.checkpoints.wait()
        good = self.checkpoints.latest
        raise Diverged(
            f"step {step}: {what}; {nonfinite.keep(self.folder, step, self.data.train)}; last good checkpoint: "
            f"{'none' if good is None else f'{self.folder}/checkpoints/{good}'}; --on-nonfinite=skip leaves out such "
            "an update"
        )

    def result(self) -> Result:
        validations = {r["step"]: r for r in metrics.read(self.folder, "validation")}

        def finite(step: int) -> dict[str, float]:
            return {k: v for k, v in validations.get(step, {}).items() if v is not None}

        return Result(self.folder, finite(0), finite(self.last), self.checkpoints.best, int(self.skipped))

    def close(self) -> None:
        """Ends what is being written; its errors are raised."""
        try:
            self.checkpoints.wait()
        finally:
            if self.log:
                self.log.close()


def _not_finite(values: dict[str, float]) -> str:
    return ", ".join(k for k, v in values.items() if not math.isfinite(v))
