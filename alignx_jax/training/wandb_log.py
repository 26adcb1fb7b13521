"""The scalars of a run on Weights & Biases, besides the files that metrics.py writes. Its failures stop no training."""

from __future__ import annotations

import importlib.util
import math
import secrets
from collections.abc import Callable
from typing import Any

from alignx_jax import storage
from alignx_jax.config import Config
from alignx_jax.config_files import flat
from alignx_jax.exits import UserError

_ID = "wandb_id"
"""File of a stage's folder: a start that continues the stage continues its W&B run."""
_FINISH_SECONDS = 120  # by default W&B waits for a network without end


def check(config: Config) -> None:
    """Refuses to log to W&B without its package.

    Raises:
      UserError: says what to install.
    """
    if config.training.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("--training.wandb needs wandb; install it (pip install wandb), or leave the flag out")


class WandbLog:
    """A stage's run of W&B, named by its folder: `sample/stage1`.

    A step is logged as the metric `step`, over which all others are drawn: W&B's own steps cannot go back to those
    that a killed run had logged after its last checkpoint.

    Args:
      note: is told, once, of the first failure; nothing more is logged then.
    """

    def __init__(self, config: Config, folder: storage.Path, note: Callable[[str], None]):
        self._note, self._run = note, None
        self._try(lambda: self._begin(config, folder))

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """The scalars of `MetricsLog.write`, under TensorBoard's names; those that are not finite are left out."""
        if self._run:
            finite = {f"{kind}/{name}": value for name, value in values.items() if math.isfinite(value)}
            self._try(lambda: self._run.log({"step": step, **finite}))

    def close(self) -> None:
        """Waits for what is under way to W&B, for a while."""
        if self._run:
            self._try(self._run.finish)
            self._run = None

    def _begin(self, config: Config, folder: storage.Path) -> None:
        import wandb

        known = folder / _ID
        number = known.read_text() if known.is_file() else secrets.token_hex(8)
        storage.write(known, number)
        self._run = wandb.init(
            project=config.training.wandb,
            id=number,
            resume="allow",
            name="/".join(storage.absolute(folder).parts[-2:]),
            config=flat(config),
            dir=str(storage.staging(folder)),
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, disable_code=True, finish_timeout=_FINISH_SECONDS
            ),
        )
        self._run.define_metric("*", step_metric="step")

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:  # of whatever kind: the training is worth more than its curves
            self._run = None
            self._note(f"W&B: {type(error).__name__}: {' '.join(str(error).split())[:300]}; going on without it")
