"""What is kept of a step whose loss or gradient is not finite: its batch, and the texts that it was made of."""

from __future__ import annotations

import dataclasses
import json

import numpy as np

from alignx_jax import storage
from alignx_jax.batch import Batch
from alignx_jax.data import pipeline
from alignx_jax.training.checkpoints import reason

_SHOWN = 3  # examples named on screen


def keep(folder: storage.Path, step: int, split: pipeline.Split) -> str:
    """Writes the global batch of `step` (counted from 1) into the run's folder; says where, and what was in it.

    `batch.npz` has the arrays of `Batch` by their names, `examples.jsonl` the record of each example, a line each. Of
    what cannot be written it says why, and raises nothing: what stops the run is the step.
    """
    where, examples = folder / f"nonfinite-{step}", "its examples"
    try:
        records = split.records(step - 1)
        shown = ", ".join(record["origin"] for record in records[:_SHOWN])
        examples = f"examples {shown}" + (f" and {len(records) - _SHOWN} more" if len(records) > _SHOWN else "")
        _write(where, records, next(iter(split.batches(step - 1))))
    except Exception as error:
        return f"{examples} could not be kept in {where} ({storage.failed(error) or reason(error)})"
    return f"{examples}; all of them and the batch are in {where}"


def _write(where: storage.Path, records: list[dict], batch: Batch) -> None:
    written = storage.staging(where)
    written.mkdir(exist_ok=True)
    np.savez(written / "batch.npz", **{f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)})
    lines = (json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)
    (written / "examples.jsonl").write_text("".join(lines), encoding="utf-8")
    storage.publish(written, where)
