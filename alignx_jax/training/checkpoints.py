"""Checkpoints of a run: Orbax, asynchronous, with a checksum of every file; the latest few and the best are kept.

A checkpoint is a folder named by its step. Orbax writes it; then, still in the background, its `checksums.json` is
added; only then are older ones deleted, that file of theirs first. So what has it is finished, and what has not is
never looked at, on a file system and in object storage alike. Nothing is restored before its files match it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Collection

from orbax.checkpoint import v1 as ocp

from alignx_jax import console, hosts, storage
from alignx_jax.exits import StorageError, UserError
from alignx_jax.runs import lineage
from alignx_jax.training import written
from alignx_jax.training.state import Params, TrainState

Warn = Callable[[str], None]
CHECKSUMS = "checksums.json"
_DAMAGED = "damaged.txt"  # takes the place of the checksums
_ORBAX = ".orbax-checkpoint-tmp"  # in names of what Orbax has not finished, on a file system
_LATEST = "latest.json"


# Threads of Orbax log the errors that `wait` raises, with their tracebacks, once each.
logging.getLogger("absl").addFilter(lambda record: not (record.module == "future" and record.exc_info))


class Deleted(Exception):
    """A checkpoint was deleted while it was read."""


class Damaged(Exception):
    """A checkpoint that cannot be trusted; says why."""


def hide_late_writes() -> None:
    """For a program, once: a save that failed prints nothing but its error.

    Orbax leaves a failed save at its first error and closes the event loop that the other arrays' writes still answer
    to. TensorStore then prints a traceback for each of them, through `sys.unraisablehook`, with no object named.
    """
    print_it = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
            print_it(unraisable)

    sys.unraisablehook = hook


class Checkpoints:
    """The checkpoints in one folder.

    The data position is the step itself: batch k of a run is a function of its configuration and k alone.
    """

    def __init__(self, folder: storage.Path, keep: int = 1, *, writable: bool = False, warn: Warn = console.warn):
        """
        Raises:
          UserError: `writable`, and the path has a character that checkpoints cannot be written with.
        """
        self._folder, self._keep, self._writable, self._warn = storage.absolute(folder), keep, writable, warn
        self._saving: tuple[int, float | None, concurrent.futures.Future] | None = None
        self._background = concurrent.futures.ThreadPoolExecutor(1)
        self._first = hosts.is_first()
        if writable:
            storage.check_place(self._folder)
        if writable and self._first:
            storage.make(self._folder)
            self._clean()
        self._losses = self._list()

    def _list(self) -> dict[int, float | None]:
        """The validation loss of each finished step."""
        losses = {}
        for step in self._finished():
            try:
                losses[step] = self._checksums(step)["validation_loss"]
            except Damaged:
                losses[step] = None  # `sound` says what is wrong with it
        return losses

    @property
    def latest(self) -> int | None:
        """The newest step that was saved."""
        return max(self._losses, default=None)

    @property
    def best(self) -> int | None:
        """The step with the lowest validation loss; the latest where nothing was validated."""
        measured = [(loss, step) for step, loss in self._losses.items() if loss is not None]
        return min(measured)[1] if measured else self.latest

    def sound(self, which: str, parts: Collection[str] = ()) -> int | None:
        """The `latest` or `best` step whose files are what was saved; None where none was ever saved.

        Damaged ones are named in a warning, and set aside if the folder is written to: they neither count among the
        checkpoints that are kept nor stand in the way of the same step's next save.

        Args:
          parts: items of a state that will be restored; empty: all.

        Raises:
          StorageError: there were checkpoints, and all are damaged or gone.
        """
        return self._of_first(lambda: self._find(which, parts))

    def _find(self, which: str, parts: Collection[str]) -> int | None:
        damaged, newest = {}, self._newest_ever()
        if which == "latest" and newest is not None and newest not in self._losses and not self._is_known(newest):
            there = (self._folder / f"{newest}").is_dir()
            damaged[newest] = f"{CHECKSUMS} is missing" if there else "it is gone"
        while (step := getattr(self, which)) is not None:
            try:
                self._verify(step, parts)
                break
            except Damaged as error:
                if self.is_deleted(step):
                    self._losses = {k: loss for k, loss in self._list().items() if k not in damaged}
                    continue
                damaged[step] = str(error)
                del self._losses[step]
        listed = [f"{self._folder}/{k}: {why}" for k, why in damaged.items()]
        if step is None and (listed or self._ever_saved()):
            raise StorageError(
                f"no checkpoint is left ({'; '.join(listed) or 'what was saved is damaged or gone'}); restore "
                f"{self._folder} from a copy, or delete {self._folder.parent} to begin again"
            )
        for text in listed:
            self._warn(f"damaged checkpoint {text}; going back to " + (f"step {step}" if step else "the beginning"))
        if self._writable:
            for bad, why in damaged.items():
                if (self._folder / f"{bad}").is_dir():
                    storage.write(self._folder / f"{bad}" / _DAMAGED, f"{why}\n")
                    (self._folder / f"{bad}" / CHECKSUMS).unlink(missing_ok=True)
        return step

    def is_deleted(self, step: int) -> bool:
        """Whether the run, which is only read here and still trains, has deleted a step since it was listed."""
        folder = self._folder / f"{step}"
        return not self._writable and not (folder / CHECKSUMS).is_file() and not self._is_known(step)

    def _is_known(self, step: int) -> bool:
        """To be damaged, since an earlier start."""
        return (self._folder / f"{step}" / _DAMAGED).is_file()

    def _ever_saved(self) -> bool:
        """Whether something tells of a checkpoint, readable or not."""
        names = [f.name for f in self._folder.iterdir()] if self._folder.is_dir() else []
        return _LATEST in names or any(name.isdecimal() and self._is_known(int(name)) for name in names)

    def _newest_ever(self) -> int | None:
        """The newest step ever saved, whether it is there or not; None also where its record cannot be read."""
        try:
            return int(json.loads((self._folder / _LATEST).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            return None

    def save(self, step: int, state: TrainState, validation_loss: float | None) -> None:
        """Starts writing; the arrays may be donated as soon as this returns. An error surfaces in `poll` or `wait`.

        Raises:
          StorageError: this save, or the one before, failed.
        """
        self.wait()
        try:
            if self._first:
                self._delete(step)  # a damaged one; Orbax's own start lets no process write before
            parts = _parts(state)
            kinds = written.kinds(parts)
            response = ocp.save_checkpointables_async(self._folder / f"{step}", parts)
        except Exception as error:
            raise self._failed(step, error) from error
        finish = self._background.submit(self._finish, response, step, validation_loss, kinds)
        self._saving = step, validation_loss, finish

    def _finish(
        self, response: ocp.AsyncResponse, step: int, validation_loss: float | None, kinds: written.Kinds
    ) -> None:
        """In the background."""
        response.result()
        if self._first:
            self._mark(step, validation_loss, kinds)

    def poll(self) -> None:
        """Learns how the save under way ended, if it has; never waits.

        Raises:
          StorageError: it failed.
        """
        if self._saving and self._saving[2].done():
            self.wait()

    def wait(self) -> None:
        """Waits for what is being written, and then deletes what need not be kept.

        Raises:
          StorageError: it could not be written; checkpoints before it are as they were.
        """
        if self._saving is None:
            return
        (step, validation_loss, future), self._saving = self._saving, None
        try:
            future.result()
        except Exception as error:
            raise self._failed(step, error) from error
        self._losses[step] = validation_loss
        if self._first:
            try:
                self._tidy(step)
            except OSError as error:
                raise self._failed(step, error) from error

    def _tidy(self, step: int) -> None:
        storage.write(self._folder / _LATEST, f"{step}\n")
        for old in set(self._losses) - set(sorted(self._losses)[-self._keep :]) - {self.best}:
            del self._losses[old]
            self._delete(old)

    def _delete(self, step: int, ignore_errors: bool = False) -> None:
        """Half-deleted, it counts no more."""
        with contextlib.suppress(*[OSError] if ignore_errors else []):
            (self._folder / f"{step}" / CHECKSUMS).unlink(missing_ok=True)
        storage.remove(self._folder / f"{step}", ignore_errors)

    def _clean(self, ignore_errors: bool = False) -> None:
        """What was not finished; but the newest, if that once was, is for `sound` to tell of."""
        kept = {*self._finished(), self._newest_ever()}
        for folder in self._folder.iterdir() if self._folder.is_dir() else ():
            step, orbax, _ = folder.name.partition(_ORBAX)
            if step.isdecimal() and (orbax or not (int(step) in kept or self._is_known(int(step)))):
                storage.remove(folder, ignore_errors)

    def _failed(self, step: int, error: Exception) -> StorageError:
        if self._first:
            if step not in self._losses:
                self._delete(step, ignore_errors=True)
            self._clean(ignore_errors=True)
        good = "there is none before it" if self.latest is None else f"the one of step {self.latest} is intact"
        return StorageError(
            f"{self._folder}/{step}: the checkpoint could not be written ({reason(error)}); {good}; make room or give "
            "a folder that can be written, and start the same command again"
        )

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of `step` in the shardings of `like`, whatever mesh wrote it, without what is frozen."""
        found = self.restore_part(step, _parts(like))
        params = {k: found[k] for k in like.params}
        return TrainState(step=found["count"]["step"], params=params, optimizer=found["optimizer"])

    def restore_part(self, step: int, like: dict[str, Params]) -> dict[str, Params]:
        """Some of a state's items alone, such as the decoder's parameters, by their names.

        Raises:
          Deleted: the run, which still trains, has deleted the step.
          UserError: it is not of this model.
        """
        where = f"{self._folder}/{step}"
        try:
            return ocp.load_checkpointables(self._folder / f"{step}", like)
        except Exception as error:  # half of its files may be there
            if self.is_deleted(step):
                raise Deleted(where) from error
            if isinstance(error, ValueError | KeyError):
                raise UserError(f"{where}: this checkpoint is not of this model: {error}") from error
            raise

    def digest(self, step: int, part: str) -> str:
        """Of what was written of one item of a state, by its checksums.

        Raises:
          StorageError: these are gone or damaged.
        """
        try:
            files = self._checksums(step)["files"]
        except Damaged as error:
            raise StorageError(f"{self._folder}/{step}: {error}; start the same command again") from None
        return lineage.combined([of for name, (_, of) in files.items() if name.partition("/")[0] == part])

    def _finished(self) -> list[int]:
        if not self._folder.is_dir():
            return []
        steps = [f for f in self._folder.iterdir() if f.name.isdecimal()]
        return sorted(int(f.name) for f in steps if (f / CHECKSUMS).is_file())

    def _of_first(self, find: Callable[[], int | None]) -> int | None:
        """What process 0 finds, on all processes."""
        return hosts.share(f"checkpoint of {self._folder}", find() if self._first else None)

    def _mark(self, step: int, validation_loss: float | None, kinds: written.Kinds) -> None:
        """Checksums of everything, once it is seen to be there: with them the checkpoint is finished."""
        folder = self._folder / f"{step}"
        sizes = storage.files(folder)
        if lacks := written.incomplete(folder, sizes, kinds):
            raise Damaged(lacks)
        record = {"step": step, "validation_loss": validation_loss, "files": _digests(folder, sizes)}
        storage.write(folder / CHECKSUMS, json.dumps(record | {"sha256": _digest_of(record)}, indent=1) + "\n")

    def _checksums(self, step: int) -> dict:
        try:
            record = json.loads((self._folder / f"{step}" / CHECKSUMS).read_text(encoding="utf-8"))
            if record.pop("sha256") == _digest_of(record) and record["step"] == step:
                return record
        except FileNotFoundError:
            raise Damaged(f"{CHECKSUMS} is missing") from None
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
            pass
        raise Damaged(f"{CHECKSUMS} is damaged")

    def _verify(self, step: int, parts: Collection[str]) -> None:
        folder = self._folder / f"{step}"
        wanted, sizes = self._checksums(step)["files"], storage.files(folder)
        if parts:
            wanted = {name: of for name, of in wanted.items() if name.partition("/")[0] in parts}
        for name, (size, _) in wanted.items():
            if name not in sizes:
                raise Damaged(f"{name} is missing")
            if sizes[name] != size:
                raise Damaged(f"{name} has {sizes[name]:,} bytes instead of {size:,}")
        try:
            found = _digests(folder, {name: sizes[name] for name in wanted})
        except OSError as error:
            raise Damaged(f"{error.filename}: {error.strerror}") from None
        for name, of in wanted.items():
            if found[name] != of:
                raise Damaged(f"{name} is not what was written (checksum)")


def reason(error: BaseException) -> str:
    """An error's text in one line; of a system error inside tensorstore's text only what the system says."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    if number := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(number[1]))
    return " ".join(text.split())[:300]


def _digest_of(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _digests(folder: storage.Path, sizes: dict[str, int]) -> dict[str, list]:
    """Size and SHA-256 of every file, several at a time: hashing lets other threads run."""

    def digest(name: str) -> list:
        with (folder / name).open("rb") as file:
            return [sizes[name], hashlib.file_digest(file, "sha256").hexdigest()]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return dict(zip(sizes, pool.map(digest, sizes), strict=True))


def _parts(state: TrainState) -> dict[str, Params]:
    """Separate items, so that the decoder can be read without the rest. What is frozen is in none."""
    return {**state.params, "optimizer": state.optimizer, "count": {"step": state.step}}
