"""A stage while it runs: from its last checkpoint, or the beginning, to its end, or to where it has to stop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from alignx_jax import hosts, sharding, storage
from alignx_jax.batch import Batch
from alignx_jax.config import Config
from alignx_jax.console import Screen, say
from alignx_jax.data import pipeline
from alignx_jax.exits import Diverged, Interrupted, StorageError, UserError
from alignx_jax.models.decoder import Decoder
from alignx_jax.training import (
    balance,
    compiling,
    metrics,
    nonfinite,
    profiling,
    progress,
    stopping,
    wandb_log,
    watch,
)
from alignx_jax.training import step as steps
from alignx_jax.training.build import Step
from alignx_jax.training.checkpoints import Checkpoints, reason
from alignx_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished stage shows."""

    folder: storage.Path
    before: dict[str, float]
    """Validation losses before the first step; empty where nothing is held out."""
    after: dict[str, float]
    best_step: int
    skipped: int
    """Updates left out because they were not finite."""


class Stage:
    """The pieces that live as long as one stage does."""

    def __init__(
        self,
        config: Config,
        folder: storage.Path,
        step: Step,
        data: pipeline.Data,
        mesh: Mesh,
        console: Screen,
        stop: stopping.Stop,
        begun: float,
        accept: Callable[[], None] | None = None,
    ):
        """
        Args:
          begun: by `time.monotonic`, when the stage had its data.
          accept: writes changed settings down; called on process 0 once a step has been made with them.
        """
        self.accept = accept
        self.config, self.folder, self.data, self.mesh = config, folder, data, mesh
        self.console, self.stop, self.step, self.plan = console, stop, step, step.recipe
        self.last, self.begun = data.train.steps, begun
        self.fifth = math.ceil(self.last / 5)
        self.profiler = profiling.Profiler(profiling.steps(config.profile, self.last), folder / "profile")
        self.all_finite = jax.jit(steps.all_finite)
        self.validation_sums = jax.jit(functools.partial(steps.validation_sums, graph=step.graph, recipe=step.recipe))
        self.balance = balance.compiled(step.graph, step.recipe)
        self.checkpoints = Checkpoints(folder / "checkpoints", config.training.keep, writable=True)
        self.watch = watch.Watch(config.training.stall_seconds, folder, console)
        self.log: metrics.MetricsLog | None = None  # of the first process
        self.wandb: wandb_log.WandbLog | None = None  # of the first process, if asked for
        self.connected: set[str] = set()  # auxiliary losses whose gradient has reached the model in this run
        self.silent: set[str] = set()  # those that have never, and did not in the last step
        self.skipped = 0  # updates left out
        self.first = 0  # the step that this start goes on from
        self.state: TrainState | None = None  # from `start` on
        self.bar: progress.StageProgress | None = None  # from `run` on

    def note(self, text: str) -> None:
        say(self.console, text)

    def train(self, title: str, load: Callable[[], Decoder]) -> Result:
        """From wherever the folder stands to the end; `load` is called at the beginning, or if weights are frozen."""
        raised: list[BaseException] = []
        try:
            with self.watch:
                self.start(load)
                self.run(title)
        except BaseException as error:
            raised.append(error)
        self.console.doing("finishing the stage's files")
        raised += self.close()
        if raised:
            raise _all_told(raised, self.folder)
        return self.result()

    def start(self, load: Callable[[], Decoder]) -> None:
        """Restores the newest checkpoint, or begins with the decoder and validates it."""
        self.watch.doing("restoring the last checkpoint")
        self.first = self.checkpoints.sound("latest") or 0
        logged = metrics.read(self.folder, "train")
        self.skipped = sum(record.get("skipped") or 0 for record in logged if record["step"] <= self.first)
        self.connected = set(hosts.share("connected", _connected(r for r in logged if r["step"] <= self.first)))
        if hosts.is_first():
            self.log = metrics.MetricsLog(self.folder, self.first)
            if self.config.training.wandb and self.first < self.last:
                self.wandb = wandb_log.WandbLog(self.config, self.folder, self.note)
        if self.log and (gap := self.log.missing):
            self.note(f"{self.folder}/metrics.jsonl lacks {len(gap)} steps between {gap[0]} and {gap[-1]}; going on")
        if self.first < self.last:
            _ = self.step.compiled  # begins
        if self.first >= self.last:
            self.note(f"{self.folder}: all {self.last} steps are done already")
        elif self.first:
            self.watch.doing(f"restoring step {self.first}")
            self.state = self.checkpoints.restore(self.first, self.step.like)
            if self.step.like.frozen:
                self.state = self.step.go_on(self.state, load())
            self.note(f"continuing {self.folder} from step {self.first} of {self.last}")
        else:
            if logged:
                self.note(f"{self.folder}: no checkpoint was saved before; beginning again ({len(logged)} steps)")
            self.watch.doing("building the first state")
            self.state = self.step.begin(load())
            if not hosts.share("validated", bool(metrics.read(self.folder, "validation"))):
                self.validate(0)
            if self.plan.taps and not hosts.share("weighed", bool(metrics.read(self.folder, "balance"))):
                _, batch = next(self.batches(self.data.train, 0, "weighing the losses of step"))
                self.show_balance(self.weigh(0, batch))

    def batches(self, split: pipeline.Split, start: int, waiting: str) -> Iterator[tuple[int, Batch]]:
        """From `start` on, the number of each batch, counted from 1, and the batch on the devices. Every process reads
        its own rows."""
        own = sharding.own_rows(split.rows_per_step, self.mesh)
        batches = split.batches(start, own)
        for number in range(start + 1, split.steps + 1):
            self.watch.doing(f"{waiting} {number} of {split.steps}")
            place = functools.partial(sharding.place_rows, mesh=self.mesh, own=own, rows=split.rows_per_step)
            yield number, jax.tree.map(place, next(batches))

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        if self.log:
            self.log.write(kind, step, values)
        if self.wandb:
            self.wandb.write(kind, step, values)

    def validate(self, step: int) -> dict[str, float]:
        """Every loss over the validation split, divided once at its end; logged."""
        totals = None
        for _, batch in self.batches(self.data.validation, 0, f"validating after step {step}, batch"):
            sums = self.validation_sums(self.state.params, batch, self.state.frozen)
            totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)
        values = {}
        if totals is not None:
            sums, weights = jax.device_get(totals)
            values = {k: float(sums[k] / max(weights[k], 1.0)) for k in sums}
            values = {"loss": sum(self.plan.weights[k] * v for k, v in values.items()), **values}
            self.write("validation", step, values)
        return values

    def weigh(self, step: int, batch: Batch) -> dict[str, float]:
        """Value, chance, gradient and share of every loss on a batch after `step` steps; logged."""
        self.watch.doing(f"weighing the losses after step {step}")
        values = jax.device_get(self.balance(self.state.params, batch, self.state.frozen))
        values = {k: float(v) for k, v in values.items()}
        self.write("balance", step, values)
        return values

    def show_balance(self, values: dict[str, float]) -> None:
        balance.show(self.console, values, self.plan)
        if balance.is_dead(values):
            raise UserError(
                f"--objective.contrastive.layer={self.plan.contrastive_layer}: the pooled states of all sentences are "
                "equal there, so that the contrastive loss has no gradient; give another layer, or another model"
            )

    def weigh_again(self, step: int, batch: Batch) -> None:
        values = self.weigh(step, batch)
        if step == self.fifth and balance.is_at_chance(values):
            self.bar.note(
                f"WARNING: step {step}: after a fifth of the run the contrastive loss is {values['contrastive']:.3f}, "
                f"and chance is {values['chance/contrastive']:.3f}: it teaches nothing; stop, and give another "
                "--objective.contrastive.layer or a higher --objective.contrastive.weight"
            )

    def run(self, title: str) -> None:
        """Steps `first`+1 to `last`. Metrics leave the device one step late, so that dispatch never waits."""
        waiting: tuple[int, dict[str, jax.Array]] | None = None
        at_best = compiling.at_best(self.config, self.step.decoder, self.mesh)
        with (
            contextlib.ExitStack() as to_finish,
            progress.StageProgress(self.console, title, self.first, self.last, at_best) as bar,
        ):
            self.bar, asked = bar, time.monotonic()
            self.watch.doing("compiling the step")
            train_step = self.step.compiled.result() if self.first < self.last else None
            count = jax.device_put(jnp.int32(self.last), self.step.like.step.sharding)
            waited = time.monotonic() - asked
            for step, batch in bar.watch(self.batches(self.data.train, self.first, "waiting for the data of step")):
                first = step == self.first + 1
                self.watch.doing(f"waiting for the device at step {step} of {self.last}")
                self.state, values = self.profiler.run(step, functools.partial(train_step, self.state, batch, count))
                if waiting:
                    self.report(*waiting)
                waiting = step, values
                if first:
                    to_finish.enter_context(self.stop.finishing())  # there is something to save from now on
                    self.report(*waiting)
                    waiting = None
                    if self.accept:
                        hosts.first("accept", self.accept)
                    passed = time.monotonic() - self.begun
                    waiting_for = f", {waited:.0f} s of them waiting for the compiler" if waited >= 1 else ""
                    bar.note(f"first step {passed:.0f} s after the data{waiting_for}")
                    bar.restart_clock(step)
                self.checkpoints.poll()
                stopped = self.stop.reached()
                validate = step % self.config.training.validate_every == 0 or step == self.last
                save = validate or stopped or step % self.config.training.save_every == 0
                weigh = bool(self.plan.taps) and (validate or step == self.fifth)
                if waiting and (save or weigh):
                    self.report(*waiting)  # nothing is saved that was not looked at
                    waiting = None
                if weigh:
                    self.weigh_again(step, batch)
                if save:
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
        if not (self.folder / "config.json").is_file():
            raise StorageError(f"{self.folder} is gone: nothing can be saved; bring it back, or begin again elsewhere")
        if self.log:
            self.log.sync()  # a checkpoint may find more metrics than its own, but never fewer
        self.checkpoints.save(step, self.state, loss if loss is not None and math.isfinite(loss) else None)

    def report(self, step: int, values: dict[str, jax.Array]) -> None:
        """Brings a finished step's metrics to the host, looks at them, shows and logs them."""
        self.watch.doing(f"waiting for the device at step {step} of {self.last}")
        values = {k: float(v) for k, v in jax.device_get(values).items()}
        if values.get("skipped"):
            self.skipped += 1
            self.bar.note(f"step {step}: {_not_finite(values)} not finite; update left out ({self.skipped} so far)")
        else:
            self._check(step, values)
        values |= self.bar.step(step, values) | {"host_tokens_per_second": self.data.train.tokens_per_second}
        self.write("train", step, values)

    def _check(self, step: int, values: dict[str, float]) -> None:
        if bad := _not_finite(values):
            self._diverge(step, f"{bad} not finite")
        self.connected.update(_connected([values]))  # what is learnt may be 0 from here on
        auxiliary = {k for k in self.plan.weights if k != "next_token"}
        silent = auxiliary - self.connected if values["pairs"] > 1 else set()
        for name in silent & self.silent:  # once may be chance: a step of nothing but duplicates has no negatives
            raise Diverged(
                f"steps {step - 1} and {step}: {name} is {values[name]} and the norm of its gradient at the pooled "
                f"states {values[f'reach/{name}']}: the loss does not reach the model"
            )
        self.silent = silent

    def _diverge(self, step: int, what: str) -> NoReturn:
        """All processes come here, and leave together: one that ended would soon end the one that still writes."""
        self.watch.doing(f"keeping the examples of step {step}")
        raised = _errors_of(self.checkpoints.wait)
        kept = hosts.share("kept", nonfinite.keep(self.folder, step, self.data.train) if hosts.is_first() else None)
        good = self.checkpoints.latest
        diverged = Diverged(
            f"step {step}: {what}; {kept}; last good checkpoint: "
            f"{'none' if good is None else f'{self.folder}/checkpoints/{good}'}; --on-nonfinite=skip leaves out such "
            "an update"
        )
        raise _all_told([diverged, *raised], self.folder)

    def result(self) -> Result:
        validations = {r["step"]: r for r in metrics.read(self.folder, "validation")}

        def finite(step: int) -> dict[str, float]:
            return {k: v for k, v in validations.get(step, {}).items() if v is not None}

        return Result(self.folder, finite(0), finite(self.last), self.checkpoints.best, int(self.skipped))

    def close(self) -> list[Exception]:
        """Ends all that is being written; what went wrong with it, what matters most first."""
        logs = [log.close for log in (self.log, self.wandb) if log]
        return _errors_of(self.checkpoints.wait, *logs, self.profiler.close)


def _connected(records: Iterable[dict[str, float | None]]) -> list[str]:
    """The auxiliary losses whose gradient was above 0 in any of these records."""
    return sorted({k.removeprefix("reach/") for r in records for k, v in r.items() if k.startswith("reach/") and v})


def _not_finite(values: dict[str, float]) -> str:
    return ", ".join(k for k, v in values.items() if not math.isfinite(v))


def _errors_of(*calls: Callable[[], None]) -> list[Exception]:
    """Makes each call, whatever becomes of the others; what they raised."""
    raised = []
    for call in calls:
        try:
            call()
        except Exception as error:  # also what the clients of object storage raise
            raised.append(error)
    return raised


def _all_told(raised: Sequence[BaseException], folder: storage.Path) -> BaseException:
    """The first error, with a note of each of the others; a full disk makes several say the same."""
    first, *others = (_in_storage(error, folder) for error in raised)
    for text in dict.fromkeys(str(other) or type(other).__name__ for other in others):
        if text != str(first):
            first.add_note(text)
    return first


def _in_storage(error: BaseException, folder: storage.Path) -> BaseException:
    """An error of the system, or of remote storage, while a stage runs, as a sentence."""
    remote = storage.failed(error)
    if not (remote or isinstance(error, OSError)):
        return error
    where = getattr(error, "filename", None) or folder
    told = StorageError(
        f"{where}: {remote or reason(error)}; what was saved is kept; make room, or see to it that it can be read and "
        "written, and start the same command again"
    )
    told.__cause__ = error
    return told
