"""Traces of training steps with JAX's profiler, for TensorBoard (XProf) or Perfetto."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

import jax

from alignx_jax import storage
from alignx_jax.exits import StorageError, UserError
from alignx_jax.training.checkpoints import reason

Result = TypeVar("Result")


def steps(asked: str | None, last: int | None) -> range:
    """The steps of `--profile`, counted from 1; none if it is unset.

    Args:
      last: of the run; None: not known yet.

    Raises:
      UserError: no steps, or steps that are not in the run.
    """
    if asked is None:
        return range(0)
    given = re.fullmatch(r"([1-9]\d*)(?:-([1-9]\d*))?", asked, flags=re.ASCII)
    found = range(int(given[1]), int(given[2] or given[1]) + 1) if given else range(0)
    if not found:
        raise UserError(f"--profile={asked}: no steps; give a step, counted from 1, or a range such as 10-12")
    if last is not None and found[-1] > last:
        raise UserError(f"--profile={asked}: the run has steps 1 to {last}; give one of them, or a range of them")
    return found


class Profiler:
    """Traces some steps of a run into `folder`."""

    def __init__(self, steps: range, folder: storage.Path):
        self._steps, self._folder, self._tracing = steps, folder, False
        self._written = storage.staging(folder)

    def run(self, step: int, update: Callable[[], Result]) -> Result:
        """`update()`, traced if `step` is one of the steps; the last is waited for, so that the trace has all of it."""
        if step not in self._steps:
            return update()
        if not self._tracing:
            jax.profiler.start_trace(str(self._written))
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            result = update()
        if step == self._steps[-1]:
            jax.block_until_ready(result)
            self.close()
        return result

    def close(self) -> None:
        """Writes the trace of a run that ends amid the steps.

        Raises:
          StorageError: it cannot be written.
        """
        if self._tracing:
            self._tracing = False  # whatever comes of it: there is no second attempt
            try:
                jax.profiler.stop_trace()
            except jax.errors.JaxRuntimeError as error:
                raise StorageError(
                    f"{self._written}: the trace could not be written ({reason(error)}); make room or give a "
                    "folder that can be written, and start the same command again"
                ) from error
            storage.publish(self._written, self._folder)
