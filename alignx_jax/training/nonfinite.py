"""What is kept of a step whose loss or gradient is not finite: its batch, and the texts that it was made of."""

from __future__ import annotations

import dataclasses
import json

import numpy as np

from alignx_jax import storage
from alignx_jax.data import pipeline

_SHOWN = 3  # examples named on screen


def keep(folder: storage.Path, step: int, split: pipeline.Split) -> str:
    """Writes the global batch of `step` (counted from 1) into the run's folder; says where, and what was in it.

    `batch.npz` has the arrays of `Batch` by their names, `examples.jsonl` the record of each example, a line each.
    """
    records, batch = split.records(step - 1), next(iter(split.batches(step - 1)))
    where = folder / f"nonfinite-{step}"
    written = storage.staging(where)
    written.mkdir(exist_ok=True)
    np.savez(written / "batch.npz", **{f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)})
    lines = (json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)
    (written / "examples.jsonl").write_text("".join(lines), encoding="utf-8")
    storage.publish(written, where)
    shown = ", ".join(record["origin"] for record in records[:_SHOWN])
    more = f" and {len(records) - _SHOWN} more" if len(records) > _SHOWN else ""
    return f"examples {shown}{more}; all of them and the batch are in {where}"
