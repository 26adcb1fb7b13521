"""Checkpoints of a run: Orbax, asynchronous, the latest few and the best by validation loss."""

from __future__ import annotations

import pathlib

from orbax.checkpoint import v1 as ocp

from alignx_jax.config import UserError
from alignx_jax.training.state import Params, TrainState

_BEST_BY = "validation_loss"


class Checkpoints:
    """The checkpoints in one folder. A half-written one has no commit mark, is never listed, and is cleaned up.

    The data position is the step itself: batch k of a run is a function of its configuration and k alone.
    """

    def __init__(self, folder: pathlib.Path, keep: int = 1, *, writable: bool = False):
        folder = folder.absolute()  # Orbax writes to no other
        policies = ocp.training.preservation_policies
        self._orbax = ocp.training.Checkpointer(
            folder,
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(keep),
                    policies.BestN(
                        get_metric_fn=lambda metrics: metrics[_BEST_BY],
                        reverse=True,
                        n=1,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
            cleanup_tmp_directories=writable,
        )
        self._folder = folder

    @property
    def latest(self) -> int | None:
        return max((c.step for c in self._orbax.checkpoints), default=None)

    @property
    def best(self) -> int | None:
        """The step with the lowest validation loss; the latest where nothing was validated."""
        measured = [c for c in self._orbax.checkpoints if c.metrics]
        return min(measured, key=lambda c: (c.metrics[_BEST_BY], c.step)).step if measured else self.latest

    def save(self, step: int, state: TrainState, validation_loss: float | None) -> None:
        """Starts writing; the arrays may be donated as soon as this returns. An error surfaces here or in `close`."""
        self._orbax.save_checkpointables_async(
            step,
            _parts(state),
            metrics=None if validation_loss is None else {_BEST_BY: validation_loss},
            force=True,
        )

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of `step` in the shardings of `like`, whatever mesh wrote it."""
        found = self._load(step, _parts(like))
        params = {k: found[k] for k in like.params}
        return TrainState(step=found["count"]["step"], params=params, optimizer=found["optimizer"])

    def restore_part(self, step: int, like: dict[str, Params]) -> dict[str, Params]:
        """Some of a state's items alone, such as the decoder's parameters, by their names."""
        return self._load(step, like)

    def _load(self, step: int, like: dict) -> dict:
        try:
            return self._orbax.load_checkpointables(step, like)
        except (ValueError, KeyError) as error:
            raise UserError(f"{self._folder}/{step}: this checkpoint is not of this model: {error}") from error

    def close(self) -> None:
        """Waits for what is being written."""
        self._orbax.close()


def _parts(state: TrainState) -> dict[str, Params]:
    """Separate items, so that the decoder can be read without the rest."""
    return {**state.params, "optimizer": state.optimizer, "count": {"step": state.step}}
