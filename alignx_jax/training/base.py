"""The model below the adapters of a stage: where it is, and whether its weights are still those trained on.

Checkpoints of such a stage hold the adapters alone; its folder has `base.json` besides.
"""

from __future__ import annotations

import dataclasses
import json

from alignx_jax import saved, storage
from alignx_jax.exits import UserError
from alignx_jax.models import lora
from alignx_jax.models.decoder import Decoder

FILE = "base.json"


@dataclasses.dataclass
class _Base:
    model: str
    fingerprint: str


def record(model: str, decoder: Decoder) -> str:
    """The text of `base.json` for the `decoder` at the place `model`."""
    return json.dumps({"model": model, "fingerprint": lora.fingerprint(decoder)}, indent=2) + "\n"


def model(folder: storage.Path) -> str:
    """The place of the model below the adapters of a stage's folder.

    Raises:
      UserError: its record is gone or damaged.
    """
    return _read(folder)["model"]


def check(folder: storage.Path, decoder: Decoder) -> None:
    """Whether `decoder` has the weights that a stage's folder was begun with.

    Raises:
      UserError: it has others, or their record is gone or damaged.
    """
    known = _read(folder)
    if lora.fingerprint(decoder) != known["fingerprint"]:
        raise UserError(
            f"{known['model']}: its weights are not those that the adapters of {folder} were trained on, as "
            f"{FILE} there has it; put them back, or give another --run"
        )


def _read(folder: storage.Path) -> dict[str, str]:
    return saved.read(folder / FILE, _Base, "restore it, or give another --run")
